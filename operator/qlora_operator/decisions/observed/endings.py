"""Ends a job: decides every condition of a finished one."""

from qlora_api.figures import without_remaining
from qlora_api.schema import replace
from qlora_api.status import FailureStatus, QLoRAJobStatus, StepName
from qlora_operator.decisions.observed.conditions import ConditionType, Value, truncate
from qlora_operator.decisions.observed.facts import Facts, set_condition
from qlora_operator.decisions.observed.objects import Reason, format_time

# Tools read the summary of an end in one condition; the others have separate reasons.
NOT_FAILED = Reason("NotFailed", "")
NOT_STALLED = Reason("NotStalled", "")
NOT_SUSPENDED = Reason("NotSuspended", "")
_FINISHED = Reason("Finished", "the job has ended")
DONE: dict[StepName, ConditionType] = {"prepare": "Prepared", "train": "Trained"}


def succeed(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """The end of a job that has done all its steps."""
    uri = status.adapter.uri if status.adapter else ""
    merged = f", the merged model at {status.merged.uri}" if status.merged else ""
    base = f", its base at {status.base.uri}" if status.base and status.base.uri else ""
    done = Reason("Succeeded", f"the adapter is at {uri}{merged}{base}")
    ends: tuple[tuple[ConditionType, Value, Reason], ...] = (
        ("Succeeded", "True", done),
        ("Failed", "False", NOT_FAILED),
        ("Suspended", "False", NOT_SUSPENDED),
        ("Progressing", "Unknown", _FINISHED),
        ("Reconciling", "False", _FINISHED),
        ("Ready", "True", done),
        ("Stalled", "False", NOT_STALLED),
    )
    for kind, value, why in ends:
        status = set_condition(status, facts, kind, value, why)
    return without_remaining(replace(status, completion_time=format_time(facts.now)))


def fail(status: QLoRAJobStatus, facts: Facts, failure: FailureStatus) -> QLoRAJobStatus:
    """The end of the job, with both summary conditions decided: neither stays Unknown."""
    reason = Reason(failure.reason, failure.message)
    if failure.step in DONE:
        brief = Reason(failure.reason, f"the {failure.step} step has failed")
        status = set_condition(status, facts, DONE[failure.step], "False", brief)
    ends: tuple[tuple[ConditionType, Value, Reason], ...] = (
        ("Succeeded", "False", reason),
        ("Failed", "True", reason),
        ("Suspended", "False", NOT_SUSPENDED),
        ("Progressing", "Unknown", _FINISHED),
        ("Reconciling", "False", _FINISHED),
        ("Ready", "False", not_ready(failure.reason)),
        ("Stalled", "True", reason),
    )
    for kind, value, why in ends:
        status = set_condition(status, facts, kind, value, why)
    return without_remaining(replace(status, last_failure=failure, completion_time=format_time(facts.now)))


def not_ready(word: str) -> Reason:
    """Why a job that has failed for that reason is not ready."""
    return Reason(word, "the job has failed: the condition Failed reports why")


def failure_of(step: StepName, reason: str, message: str, facts: Facts) -> FailureStatus:
    """A failure that the operator has found, now."""
    return FailureStatus(
        step=step, reason=truncate(reason, 128), message=truncate(message), time=format_time(facts.now)
    )
