"""Decides when a finished job or sweep is deleted, by ttlSecondsAfterFinished."""

from collections.abc import Mapping
from datetime import datetime, timedelta

from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decisions.announcing import is_to_be_announced
from qlora_operator.decisions.cleanup import cleanup_at
from qlora_operator.decisions.observed.conditions import condition, is_finished
from qlora_operator.decisions.observed.objects import QLoRAJob, parse_time
from qlora_operator.decisions.retention import is_claim_to_be_deleted
from qlora_operator.decisions.retry import is_to_be_taken_up
from qlora_operator.decisions.usage.usage import still_counts


def deletion_at(job: QLoRAJob, status: QLoRAJobStatus, profiles: Mapping[str, Profile]) -> datetime | None:
    """Return when the job is deleted, if nothing holds it up then; None if never.

    A cell is deleted with its sweep, and a job that this version cannot read by the one that can.
    """
    if job.sweep or job.problem or job.deleting or not is_finished(status) or is_to_be_taken_up(job):
        return None
    profile = profiles.get(job.spec.scheduling.profile_name)
    ttl = effective_ttl(job.spec.ttl_seconds_after_finished, profile, announces=job.spec.output.announce is not None)
    return expires(status, ttl)


def effective_ttl(own: int | None, profile: Profile | None, *, announces: bool) -> int | None:
    """Return the seconds from the end to the deletion, None for never.

    With the deletion, servers lose an announced adapter: no default decides that.
    """
    if profile is None:
        return own
    default = None if announces else profile.ttl_seconds_after_finished
    limit = None if profile.limits is None else profile.limits.ttl_seconds_after_finished
    wanted = default if own is None else own
    return min((seconds for seconds in (wanted, limit) if seconds is not None), default=None)


def expires(status: QLoRAJobStatus | QLoRASweepStatus, ttl: int | None) -> datetime | None:
    """Return the end of the status plus so many seconds, None without one of them."""
    if ttl is None or status.completion_time is None:
        return None
    return parse_time(status.completion_time) + timedelta(seconds=ttl)


def is_held_up(job: QLoRAJob, due: datetime) -> bool:
    """Whether something is left to do for the job, or a cell, before it is deleted.

    A retry, GPU time to count, an announcement, the deletion of its claim, and a clean-up that is due by then. A
    rejected or failed one of these holds up nothing.
    """
    status = job.status
    if is_to_be_taken_up(job) or still_counts(job) or is_claim_to_be_deleted(job, status):
        return True
    if is_to_be_announced(job, status) and status.announcement is None:
        return True
    cleanup, cleaned_up = cleanup_at(job, status), condition(status, "CleanedUp")
    has_failed = cleaned_up is not None and cleaned_up.reason == "CleanupFailed"
    return cleanup is not None and cleanup <= due and not has_failed
