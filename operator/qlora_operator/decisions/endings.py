"""Ends a job: decides every condition that a finished job has; pure."""

from qlora_api.status import FailureStatus, QLoRAJobStatus, StepName
from qlora_operator.decisions.conditions import ConditionType, Value
from qlora_operator.decisions.facts import Facts, set_condition
from qlora_operator.decisions.figures import without_remaining
from qlora_operator.decisions.observe import Reason, format_time

_ON_SUCCESS: tuple[tuple[ConditionType, Value], ...] = (
    ("Succeeded", "True"),
    ("Failed", "False"),
    ("Suspended", "False"),
    ("Progressing", "Unknown"),
    ("Reconciling", "False"),
    ("Ready", "True"),
    ("Stalled", "False"),
)
_ON_FAILURE: tuple[tuple[ConditionType, Value], ...] = (
    ("Succeeded", "False"),
    ("Failed", "True"),
    ("Suspended", "False"),
    ("Progressing", "Unknown"),
    ("Reconciling", "False"),
    ("Ready", "False"),
    ("Stalled", "True"),
)
DONE: dict[StepName, ConditionType] = {"prepare": "Prepared", "train": "Trained"}


def succeed(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """The end of a job that has done all its steps."""
    uri = status.adapter.uri if status.adapter else ""
    merged = f", the merged model at {status.merged.uri}" if status.merged else ""
    done = Reason("Succeeded", f"the adapter is at {uri}{merged}")
    for kind, value in _ON_SUCCESS:
        status = set_condition(status, facts, kind, value, done)
    return without_remaining(status.model_copy(update={"completion_time": format_time(facts.now)}))


def fail(status: QLoRAJobStatus, facts: Facts, failure: FailureStatus) -> QLoRAJobStatus:
    """The end of the job, with both summary conditions decided: neither stays Unknown."""
    reason = Reason(failure.reason, failure.message)
    if failure.step in DONE:
        status = set_condition(status, facts, DONE[failure.step], "False", reason)
    for kind, value in _ON_FAILURE:
        status = set_condition(status, facts, kind, value, reason)
    changes = {"last_failure": failure, "completion_time": format_time(facts.now)}
    return without_remaining(status.model_copy(update=changes))


def failure_of(step: StepName, reason: str, message: str, facts: Facts) -> FailureStatus:
    """A failure that the operator has found, now."""
    return FailureStatus(step=step, reason=reason, message=message, time=format_time(facts.now))
