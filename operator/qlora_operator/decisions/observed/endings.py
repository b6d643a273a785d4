"""Ends a job: decides every condition of a finished one."""

from datetime import datetime

from qlora_api.artifact_status import published_text
from qlora_api.figures import without_remaining
from qlora_api.schema import replace
from qlora_api.status import FailureStatus, QLoRAJobStatus, StepName
from qlora_operator.decisions.observed.conditions import ConditionType, Value, condition, truncate
from qlora_operator.decisions.observed.facts import set_condition
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason, format_time

# Tools read the summary of an end in one condition; the others have separate reasons.
NOT_FAILED = Reason("NotFailed", "")
NOT_STALLED = Reason("NotStalled", "")
NOT_SUSPENDED = Reason("NotSuspended", "")
CANCELLED = "Cancelled"
_FINISHED = Reason("Finished", "the job has ended")


def succeed(status: QLoRAJobStatus, job: QLoRAJob, now: datetime) -> QLoRAJobStatus:
    """The end of a job that has done all its steps."""
    done = Reason("Succeeded", published_text(status.adapter, status.merged, status.base))
    ends: tuple[tuple[ConditionType, Value, Reason], ...] = (
        ("Succeeded", "True", done),
        ("Failed", "False", NOT_FAILED),
        ("Suspended", "False", NOT_SUSPENDED),
        ("Progressing", "Unknown", _FINISHED),
        ("Reconciling", "False", _FINISHED),
        ("Stalled", "False", NOT_STALLED),
    )
    for kind, value, why in ends:
        status = set_condition(status, job, now, kind, value, why)
    return without_remaining(replace(status, completion_time=format_time(now)))


def fail(status: QLoRAJobStatus, job: QLoRAJob, now: datetime, failure: FailureStatus) -> QLoRAJobStatus:
    """The end of the job, with both summary conditions decided: neither stays Unknown."""
    reason = Reason(failure.reason, failure.message)
    if failure.step == "prepare":
        unprepared = Reason(failure.reason, "prepare has not succeeded")
        status = set_condition(status, job, now, "Prepared", "False", unprepared)
    ends: tuple[tuple[ConditionType, Value, Reason], ...] = (
        ("Succeeded", "False", reason),
        ("Failed", "True", reason),
        ("Suspended", "False", NOT_SUSPENDED),
        ("Progressing", "Unknown", _FINISHED),
        ("Reconciling", "False", _FINISHED),
        ("Stalled", "True", reason),
    )
    for kind, value, why in ends:
        status = set_condition(status, job, now, kind, value, why)
    return without_remaining(replace(status, last_failure=failure, completion_time=format_time(now)))


def is_canceled(job: QLoRAJob, status: QLoRAJobStatus) -> bool:
    """Whether the job was canceled before it had ended."""
    failed = condition(status, "Failed")
    return bool(job.spec.cancel) and failed is not None and (failed.status, failed.reason) == ("True", CANCELLED)


def failure_of(step: StepName, reason: str, message: str, now: datetime) -> FailureStatus:
    """A failure that the operator has found, now."""
    return FailureStatus(step=step, reason=truncate(reason, 128), message=truncate(message), time=format_time(now))
