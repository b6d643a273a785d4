"""Decides whether jobs can be trained together: on one base, in one process, each as it would be alone."""

from collections.abc import Sequence

from qlora_api.group import trained_alone
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.training.prepared_job import PreparedJob

_ALONE = "remove it, or train the job alone"


def reject_unjoinable(jobs: Sequence[PreparedJob]) -> None:
    """Raise StepFailure (BAD_CONFIGURATION), naming job and setting, unless all jobs can share one base."""
    for job in jobs:
        reason = _reason_alone(job) or _difference(job, jobs[0])
        if reason:
            raise _not_joinable(job, reason)


def _not_joinable(job: PreparedJob, reason: str) -> StepFailure:
    return bad_configuration(
        f"{job.context.document.metadata.name} cannot be trained together with other jobs: {reason}"
    )


def _reason_alone(job: PreparedJob) -> str:
    """The setting with which a job is trained alone only; empty for none."""
    prepared = job.prepared
    if field := trained_alone(job.context.spec):
        return f"spec.{field} is set, which that does not support: {_ALONE}"
    if not prepared.packed and not prepared.rows_apart:
        return f"models of type {prepared.model_type} cannot keep the rows of several jobs apart: train it alone"
    return ""


def _difference(job: PreparedJob, first: PreparedJob) -> str:
    """What differs from the first job in what they have to share; empty for nothing."""
    name, spec, first_spec = first.context.document.metadata.name, job.context.spec, first.context.spec
    if job.prepared.base_sha256 != first.prepared.base_sha256:
        return (
            f"its 4-bit base has other bytes than that of {name}: give both the same model, revision and quantization"
        )
    if spec.training.gradient_checkpointing != first_spec.training.gradient_checkpointing:
        return f"spec.training.gradientCheckpointing differs from that of {name}: give both the same"
    return ""
