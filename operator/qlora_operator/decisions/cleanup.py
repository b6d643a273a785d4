"""Follows the clean-up after the end of a job."""

from datetime import datetime, timedelta

from qlora_api.naming import child_job_name
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.observed.conditions import Value, condition, has_started, is_true
from qlora_operator.decisions.observed.endings import is_canceled
from qlora_operator.decisions.observed.facts import set_condition
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, Reason, format_time, parse_time
from qlora_operator.decisions.pods.blockers import blocking_reason
from qlora_operator.decisions.pods.kueue import not_supported
from qlora_operator.decisions.retention import claim_goes_now


def cleanup_at(job: QLoRAJob, status: QLoRAJobStatus) -> datetime | None:
    """Return when to delete Jobs and scratch data, or None if never, or if done.

    A canceled job needs none of it. The pod of its sweep may still write to a cell's.
    """
    seconds = job.spec.cleanup_after_seconds
    if seconds is None and is_canceled(job, status) and not job.sweep:
        seconds = 0
    if seconds is None or status.completion_time is None or is_true(status, "CleanedUp") or not has_started(status):
        return None
    return parse_time(status.completion_time) + timedelta(seconds=seconds)


def clean_job_name(job: QLoRAJob) -> str:
    """Name of the one Job that deletes scratch data."""
    return child_job_name(job.name, "clean", 1)


def follow_cleanup(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime) -> QLoRAJobStatus:
    """The status of a finished job with the state of its clean-up."""
    due = cleanup_at(job, status)
    if due is None:
        scheduled = condition(status, "CleanedUp")
        asked = job.spec.cleanup_after_seconds is not None
        if asked or scheduled is None or scheduled.status == "True" or scheduled.reason == "NotScheduled":
            return status
        return set_condition(
            status, job, now, "CleanedUp", "False", Reason("NotScheduled", "spec.cleanupAfterSeconds is not set")
        )
    cleaning = observed.child(clean_job_name(job))
    value: Value = "False"
    reason = Reason("Scheduled", f"pods, checkpoints and prepared data are deleted at {format_time(due)}")
    if claim_goes_now(job, status):
        # The data goes with the claim: no pod is needed, and none could mount it.
        is_done = now >= due and status.claim_deletion_time is not None and not observed.children
    else:
        is_done = cleaning is not None and cleaning.complete and observed.children == (cleaning,)
    if is_done:
        value = "True"
        reason = Reason("CleanedUp", "pods, checkpoints and prepared data are deleted; the adapter stays")
    elif cleaning is None and now >= due and status.resolved is None and not claim_goes_now(job, status):
        sentence = f"ControllerRevision {status.current_revision}, which names the workspace and the image, is gone"
        reason = Reason("CleanupFailed", sentence)
    elif cleaning is not None and cleaning.failure is not None:
        sentence = (
            f"Job {cleaning.name}: {cleaning.failure.sentence}; see `kubectl logs job/{cleaning.name}`, and delete "
            "that Job to try again"
        )
        reason = Reason("CleanupFailed", sentence)
    elif cleaning is not None and cleaning.managed_by:
        why = not_supported(cleaning.name, cleaning.managed_by, None)
        reason = Reason("CleanupFailed", f"{why.sentence}; delete that Job to try again")
    elif cleaning is not None:
        reason = blocking_reason(cleaning, observed, now) or reason
    return set_condition(status, job, now, "CleanedUp", value, reason)
