"""Detects Jobs that another process deletes, and delays the next one.

The first deleted Job is replaced immediately. If a janitor's or a tenant's loop deletes more, each pause is twice as
long as the one before. The status has all inputs: the number of the attempt, the reason, and the end of the counted
seconds, which is when the deletion was seen.
"""

from datetime import datetime, timedelta

from qlora_api.naming import child_job_name
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, StepStatus
from qlora_operator.decisions.observed.conditions import condition
from qlora_operator.decisions.observed.endings import NOT_SUSPENDED
from qlora_operator.decisions.observed.facts import set_condition
from qlora_operator.decisions.observed.holds import HOLDS
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, Reason, format_time, parse_time
from qlora_operator.decisions.pods.attempts import charge_running
from qlora_operator.decisions.pods.blockers import POD_DETACHED

FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=5), timedelta(minutes=5)
RAN_FOR_LONG = LONGEST_PAUSE
"""A step whose Jobs each run for so long before they are deleted needs no pause to be slow."""
_JOB_DELETED = "JobDeleted"


def note_deletion(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime) -> QLoRAJobStatus:
    """Return the status after the Job of its step was deleted.

    It has the reason, if the next Job must wait for that.
    """
    step = status.step
    if step is None or _is_own_deletion(job) or _ran_for_long(step, now):
        return status
    if _gone(job, status, observed, step.attempt) < 2:
        return status
    status = charge_running(status, observed, now)
    until = max(now, parse_time(status.active_until)) if status.active_until else now
    sentence = (
        f"Job {step.job_name} was deleted, as were earlier Jobs of this step: the next is created after a pause of up "
        "to five minutes; the API server's audit log shows who deleted it"
    )
    status = replace(status, active_until=format_time(until))
    return set_condition(status, job, now, "Succeeded", "Unknown", Reason(_JOB_DELETED, sentence))


def deletion(status: QLoRAJobStatus) -> Reason | None:
    """Return why the step has no Job: another process deletes them.

    Returns None if it has one, or waits for another reason.
    """
    found = condition(status, "Succeeded")
    if status.step is None or status.step.job_uid or found is None or found.reason != _JOB_DELETED:
        return None
    return Reason(found.reason, found.message)


def next_job_at(job: QLoRAJob, status: QLoRAJobStatus, observed: Observed) -> datetime | None:
    """When the step that waits after such a deletion gets its next Job."""
    step = status.step
    if step is None or status.active_until is None or deletion(status) is None:
        return None
    gone = _gone(job, status, observed, step.attempt - 1)
    pause: timedelta = FIRST_PAUSE * 2 ** min(max(gone - 2, 0), 10)
    return parse_time(status.active_until) + min(pause, LONGEST_PAUSE)


def _gone(job: QLoRAJob, status: QLoRAJobStatus, observed: Observed, last: int) -> int:
    """Count the step's Jobs up to that attempt that no longer exist.

    Restarts for lack of progress are left out. Those that suspensions, detached pods and retries have ended count: the
    status has no number of them.
    """
    if status.step is None:
        return 0
    # The operator has deleted a Job for each restart, and each counts as a failure.
    restarts = status.step.failures if job.spec.retry.on_no_progress == "restart" else 0
    attempts = range(status.first_attempt, last + 1)
    names = {child_job_name(job.name, status.step.name, attempt) for attempt in attempts}
    return len(names - {child.name for child in observed.children}) - restarts


def _is_own_deletion(job: QLoRAJob) -> bool:
    """Whether the operator has deleted the Job, for a stop or a detached pod."""
    suspended, shown = condition(job.status, "Suspended"), condition(job.status, "Succeeded")
    if suspended is not None and suspended.reason != NOT_SUSPENDED.word:
        return True
    return shown is not None and shown.reason in (POD_DETACHED, *HOLDS)


def _ran_for_long(step: StepStatus, now: datetime) -> bool:
    return step.running_since is not None and now - parse_time(step.running_since) >= RAN_FOR_LONG
