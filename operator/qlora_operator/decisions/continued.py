"""Decides whether a job can continue another job's run, and finds its checkpoints."""

from collections.abc import Iterable

from qlora_api.profile import Profile
from qlora_api.status import ContinuedRun
from qlora_operator.decisions.manifests.volumes import claim_not_allowed, reserved_claims
from qlora_operator.decisions.observed.conditions import is_finished, is_true
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason


def waits_for_other_job(job: QLoRAJob) -> bool:
    """Whether to read the job in spec.continues again: this one has not started."""
    return job.spec.continues is not None and job.status.resolved is None and not job.stops and not job.deleting


def is_at_rest(other: QLoRAJob) -> bool:
    """Whether the other job's status shows that it has ended or is suspended.

    One of its pods may not have ended yet.
    """
    return is_finished(other.status) or is_true(other.status, "Suspended")


def continued_run(job: QLoRAJob, other: QLoRAJob | None) -> ContinuedRun | None:
    """Return the location of the run that spec.continues names.

    Returns None without that field, or if that job has no run to continue yet. The operator has written claim and
    folder into the other job's status, so that no manifest can name others. Once resolved they stay: the other job may
    be changed or deleted.
    """
    own = job.status.resolved
    if own is not None:
        return own.continued
    if other is None or other.status.workspace is None:
        return None
    workspace = other.status.workspace
    return ContinuedRun(job=other.name, uid=other.uid, claim_name=workspace.claim_name, workspace_path=workspace.path)


def objection_of_other_job(
    job: QLoRAJob, other: QLoRAJob | None, writer: str, profiles: Iterable[Profile]
) -> Reason | None:
    """Return why the run in spec.continues cannot be continued now, or None if it can.

    Returns None without that field, too. `writer`: a pod or Job that may still save a checkpoint of it, or empty.
    """
    name = job.spec.continues
    if name is None or job.status.resolved is not None:
        return None
    if other is None:
        return Reason(
            "ContinuedJobNotFound",
            f"QLoRAJob {name!r} (spec.continues) was not found, or has another managedBy: create this job again with "
            "the name of one that exists, or use the adapter of a deleted job in spec.lora.from",
        )
    run = continued_run(job, other)
    if run is None:
        return Reason(
            "ContinuedJobNotStarted",
            f"QLoRAJob {name!r} (spec.continues) has not started, so that it has no checkpoint to take up: this job "
            "starts when that one has ended or is suspended",
        )
    if other.status.claim_deletion_time is not None:
        return Reason(
            "ContinuedJobDeletedItsClaim",
            f"the workspace of QLoRAJob {name!r} (spec.continues) was deleted when it succeeded (whenFinished: "
            "Delete), and its checkpoints with it: create this job again with its adapter in spec.lora.from",
        )
    if not is_at_rest(other):
        return Reason(
            "ContinuedJobRunning",
            f"QLoRAJob {name!r} (spec.continues) is still running: this job starts when that one has ended or is "
            "suspended (spec.suspend: true saves a checkpoint)",
        )
    if writer:
        return Reason(
            "ContinuedJobRunning",
            f"{writer} may still save a checkpoint of QLoRAJob {name!r} (spec.continues): this job "
            "starts when it has ended",
        )
    if run.claim_name in reserved_claims(profiles):
        return claim_not_allowed("spec.continues", run.claim_name)
    return None
