"""Decides when the claim that the operator created for a job or a sweep is deleted.

The policy of the profile is for jobs and sweeps that leave no adapter in their workspace: that is the job that the
schema lets set such a policy.
"""

from typing import Literal

from qlora_api.profile import WorkspaceDefaults
from qlora_api.retention import ClaimRetentionPolicy
from qlora_api.spec.execution import WorkspaceSpec
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.observed.conditions import is_true
from qlora_operator.decisions.observed.endings import is_canceled
from qlora_operator.decisions.observed.objects import QLoRAJob

_When = Literal["when_deleted", "when_finished"]


def deletes_claim(
    when: _When, workspace: WorkspaceSpec, default: ClaimRetentionPolicy | None, *, is_outside: bool
) -> bool:
    """Whether the claim is deleted then.

    `default`: the profile's policy. `is_outside`: whether no adapter to keep is left in the workspace.
    """
    if workspace.claim_name is not None:
        return False
    own = workspace.persistent_volume_claim_retention_policy
    found = (_value(policy, when) for policy in ((own, default) if is_outside else (own,)))
    return next((value for value in found if value is not None), "Retain") == "Delete"


def _value(policy: ClaimRetentionPolicy | None, when: _When) -> str | None:
    if policy is None:
        return None
    return policy.when_deleted if when == "when_deleted" else policy.when_finished


def claim_goes_with_job(job: QLoRAJob, defaults: WorkspaceDefaults) -> bool:
    """Whether the claim of the job is deleted together with it."""
    is_outside, default = job.spec.output.is_outside_workspace, defaults.persistent_volume_claim_retention_policy
    return deletes_claim("when_deleted", job.spec.workspace, default, is_outside=is_outside)


def is_claim_to_be_deleted(job: QLoRAJob, status: QLoRAJobStatus) -> bool:
    """Whether the claim is deleted now, and that has not been done."""
    return status.claim_deletion_time is None and claim_goes_now(job, status)


def claim_goes_now(job: QLoRAJob, status: QLoRAJobStatus) -> bool:
    """Whether the claim is deleted, or about to be, as the job has succeeded or was canceled.

    A job that has failed otherwise needs its claim for a retry.
    """
    if status.claim_deletion_time is not None:
        return True
    if job.problem or status.workspace is None or not (is_true(status, "Succeeded") or is_canceled(job, status)):
        return False
    is_outside, default = job.spec.output.is_outside_workspace, status.workspace.retention_policy
    return deletes_claim("when_finished", job.spec.workspace, default, is_outside=is_outside)
