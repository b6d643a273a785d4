"""Decides whether the run of another job can be taken up, and says where its checkpoints are; pure."""

from collections.abc import Iterable

from qlora_api.profile import Profile
from qlora_api.status import ContinuedRun
from qlora_operator.decisions.manifests.volumes import claim_not_allowed, reserved_claims
from qlora_operator.decisions.observed.conditions import is_finished, is_true
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason


def waits_for_other_job(job: QLoRAJob) -> bool:
    """Whether the job that spec.continues names must be looked at, again and again: this one has not started."""
    return job.spec.continues is not None and job.status.resolved is None and not job.spec.suspend and not job.deleting


def is_at_rest(other: QLoRAJob) -> bool:
    """Whether the other job has ended or is suspended, as its status says; a pod of it may not have ended yet."""
    return is_finished(other.status) or is_true(other.status, "Suspended")


def continued_run(facts: Facts) -> ContinuedRun | None:
    """Where the run is that spec.continues takes up; None without it, or if that job has nothing to take up yet.

    Claim and folder are what the operator has written about the other job, so that no manifest can name others. Once
    that is resolved it stays so: the other job may be changed or deleted.
    """
    other, own = facts.continued, facts.job.status.resolved
    if own is not None:
        return own.continued
    if other is None or other.status.resolved is None:
        return None
    resolved = other.status.resolved
    return ContinuedRun(
        job=other.name, uid=other.uid, claim_name=resolved.claim_name, workspace_path=resolved.workspace_path
    )


def objection_of_other_job(facts: Facts, profiles: Iterable[Profile]) -> Reason | None:
    """Why the run that spec.continues names cannot be taken up now; None if it can, or none is named."""
    name, other = facts.job.spec.continues, facts.continued
    if name is None or facts.job.status.resolved is not None:
        return None
    if other is None:
        return Reason(
            "ContinuedJobNotFound",
            f"QLoRAJob {name!r} (spec.continues) was not found: create this job again with the name of one that "
            "exists, or use the adapter of a deleted job in spec.lora.from",
        )
    run = continued_run(facts)
    if run is None:
        return Reason(
            "ContinuedJobNotStarted",
            f"QLoRAJob {name!r} (spec.continues) has not started, so that it has no checkpoint to take up: this job "
            "starts when that one has ended or is suspended",
        )
    if not is_at_rest(other):
        return Reason(
            "ContinuedJobRunning",
            f"QLoRAJob {name!r} (spec.continues) is still running: this job starts when that one has ended or is "
            "suspended (spec.suspend: true saves a checkpoint)",
        )
    if facts.continued_writer:
        return Reason(
            "ContinuedJobRunning",
            f"{facts.continued_writer} may still save a checkpoint of QLoRAJob {name!r} (spec.continues): this job "
            "starts when it has ended",
        )
    if run.claim_name in reserved_claims(profiles):
        return claim_not_allowed("spec.continues", run.claim_name)
    return None
