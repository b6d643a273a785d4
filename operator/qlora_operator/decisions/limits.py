"""Enforces a job's limits: its cancellation, interruptions, failures, time without progress."""

from datetime import datetime

from qlora_api.contract import ExitCode
from qlora_api.duration import format_duration
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, StepName, StepStatus
from qlora_operator.decisions.observed.conditions import condition, is_finished, truncate
from qlora_operator.decisions.observed.endings import CANCELLED, fail, failure_of
from qlora_operator.decisions.observed.facts import next_attempt
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, parse_time
from qlora_operator.decisions.pods.attempts import active_seconds, charge_running

DEFAULT_PROGRESS_DEADLINE_SECONDS = 3600
LIMIT_FAILURES = ("DeadlineExceeded", "ProgressDeadlineExceeded")
_REPORTING: tuple[StepName, ...] = ("prepare", "train")
"""The steps that report while they run. Publish does not while it merges or uploads a large model."""


def enforce_cancellation(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime) -> QLoRAJobStatus:
    """Fail a job that its user cancels, unless it has ended."""
    if not job.spec.cancel or is_finished(status):
        return status
    step = status.step.name if status.step is not None else "prepare"
    message = "spec.cancel is true, which ends the job for good: to train after all, create a job with another name"
    return fail(charge_running(status, observed, now), job, now, failure_of(step, CANCELLED, message, now))


def enforce_disruptions(status: QLoRAJobStatus, job: QLoRAJob, now: datetime) -> QLoRAJobStatus:
    """Fail a job that is interrupted too often: its Jobs have no limit for that."""
    limit, step = job.spec.retry.max_disruptions, status.step
    # A step that has lost no pod yet may run, even if interruptions of the one before were counted late.
    if is_finished(status) or step is None or not step.counted_pod or status.disruptions <= limit:
        return status
    last = status.last_failure
    # Nodes that have lost one another may have a network failure, and no Event shows that.
    reported = f"; the latest report is {last.reason}: {last.message}" if last and last.step == step.name else ""
    message = truncate(
        f"the pods were interrupted {status.disruptions} times, and spec.retry.maxDisruptions allows {limit}: see "
        f"`kubectl get events` for what evicts or deletes them, then set a new spec.retry.request{reported}"
    )
    return fail(status, job, now, failure_of(step.name, ExitCode.RETRIES_EXHAUSTED.reason, message, now))


def enforce_failures(status: QLoRAJobStatus, job: QLoRAJob, now: datetime) -> QLoRAJobStatus:
    """Fail a job whose step fails too often in a way that its Jobs do not count.

    An eviction that the step caused is one.
    """
    step, limit = status.step, job.spec.retry.max_failures
    if is_finished(status) or step is None or status.last_failure is None:
        return status
    return status if step.failures <= limit else fail(status, job, now, status.last_failure)


def enforce_deadline(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime) -> QLoRAJobStatus:
    """Fail a job whose steps have run for longer than it allows."""
    limit = job.spec.active_deadline_seconds
    if is_finished(status) or limit is None or status.step is None:
        return status
    ran = active_seconds(status, observed, now)
    if ran < limit:
        return status
    message = (
        f"the steps have run for {ran} seconds, and spec.activeDeadlineSeconds allows {limit}: raise it, and "
        "set a new spec.retry.request to retry the job"
    )
    failure = failure_of(status.step.name, "DeadlineExceeded", message, now)
    # Count the time until now, for a later retry: the pods have not ended yet.
    return fail(charge_running(status, observed, now), job, now, failure)


def enforce_progress(
    status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime, *, log_read: bool
) -> QLoRAJobStatus:
    """Restart a step without progress if the job asks for it, up to its retry limit."""
    step = status.step
    idle = idle_seconds(status, job, observed, now, log_read=log_read)
    if is_finished(status) or step is None or idle is None or job.spec.retry.on_no_progress != "restart":
        return status
    failure = failure_of(step.name, "ProgressDeadlineExceeded", no_progress(step, idle), now)
    failures = step.failures + 1
    status = charge_running(status, observed, now)
    status = replace(status, failures=status.failures + 1, last_failure=failure)
    if failures > job.spec.retry.max_failures:
        return fail(status, job, now, failure)
    return replace(status, step=replace(next_attempt(step, job), failures=failures))


def idle_seconds(
    status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime, *, log_read: bool
) -> int | None:
    """Return the seconds that the running step has made no progress.

    Returns None up to the limit of the job, and for a pod that was asked to stop: it saves a checkpoint.
    """
    step = status.step
    if step is None or step.name not in _REPORTING or step.progressed_at is None or job.stops:
        return None
    running = (pod for pod in observed.pods_of(step.job_uid) if pod.running and pod.deletion_requested is None)
    if not any(pod.uid == step.running_pod for pod in running):
        return None
    # A log that cannot be read adds nothing, and does not revoke the finding of an earlier one.
    known = log_read or _is_stalled(job.status, step)
    idle = int((now - parse_time(step.progressed_at)).total_seconds())
    limit = job.spec.progress_deadline_seconds or DEFAULT_PROGRESS_DEADLINE_SECONDS
    return idle if known and idle >= limit else None


def _is_stalled(stored: QLoRAJobStatus, step: StepStatus) -> bool:
    found = condition(stored, "Progressing")
    same = stored.step is not None and stored.step.progressed_at == step.progressed_at
    return same and found is not None and found.status == "False"


def no_progress(step: StepStatus, idle: int) -> str:
    """The sentence about a step that has made no progress for `idle` seconds."""
    return (
        f"pod of Job {step.job_name} runs and has reported no progress for {format_duration(idle)}: see "
        f"`kubectl logs job/{step.job_name}`; suspend and resume the job to restart it from its checkpoint"
    )
