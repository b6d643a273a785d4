"""Decides whether jobs can be trained together: on one base, in one process, each as it would be alone."""

from collections.abc import Sequence

from qlora_api.joinable import SAME_BASE, different_pass, not_joinable, rows_not_apart, setting_alone
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.training.prepared_job import PreparedJob


def reject_unjoinable(jobs: Sequence[PreparedJob]) -> None:
    """Raise StepFailure (BAD_CONFIGURATION), naming job and setting, unless all jobs can share one base."""
    for job in jobs:
        reason = _reason_alone(job) or _difference(job, jobs[0])
        if reason:
            raise bad_configuration(not_joinable(job.context.document.metadata.name, reason))


def _reason_alone(job: PreparedJob) -> str:
    """Why a job is trained alone only; empty for no reason."""
    prepared = job.prepared
    apart = prepared.packed or prepared.rows_apart
    return setting_alone(job.context.spec) or ("" if apart else rows_not_apart(prepared.model_type))


def _difference(job: PreparedJob, first: PreparedJob) -> str:
    """What differs from the first job in what they have to share; empty for nothing."""
    name = first.context.document.metadata.name
    if job.prepared.base_sha256 != first.prepared.base_sha256:
        return f"its 4-bit base has other bytes than that of {name}: {SAME_BASE}"
    return different_pass(job.context.spec, first.context.spec, name)
