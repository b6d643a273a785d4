"""Decides where a pod runs, and what of its node it gets."""

from typing import Any

from qlora_api.kubernetes_values import Toleration
from qlora_api.naming import JOB_UID_LABEL, STEP_LABEL
from qlora_api.profile import Profile, StepResources
from qlora_api.status import StepName
from qlora_operator.decisions.manifests.environment import node_count
from qlora_operator.decisions.observed.objects import QLoRAJob

Manifest = dict[str, Any]


def placement(job: QLoRAJob, profile: Profile, step: StepName) -> Manifest:
    """Return the pod's fields for the scheduler, some of them empty."""
    fields: Manifest = {}
    if step == "train" or profile.workspace.topology != "shared":
        # All steps mount the workspace volume, which may exist in one zone or on one node only.
        fields = {
            "schedulerName": profile.scheduler_name,
            "nodeSelector": {**(job.spec.scheduling.node_selector or {}), **profile.node_selector},
            "tolerations": _tolerations(job, profile),
            "affinity": profile.affinity.dump() if profile.affinity is not None else None,
        }
    if step != "train":
        return fields
    if node_count(job, step) > 1:
        pods = {"labelSelector": {"matchLabels": {JOB_UID_LABEL: job.uid, STEP_LABEL: "train"}}}
        spread = profile.topology_spread_constraints or ()
        fields["topologySpreadConstraints"] = [each.dump() | pods for each in spread]
    return fields | {"resourceClaims": [claim.dump() for claim in profile.resource_claims or ()]}


def resources(job: QLoRAJob, profile: Profile, step: StepName) -> Manifest:
    """Return what the step's container requests, and its limits."""
    wanted: StepResources = profile.resources.publish if step == "clean" else getattr(profile.resources, step)
    cpu, memory = wanted.cpu, wanted.memory
    limits: Manifest = {}
    claims: Manifest = {}
    if step == "train":
        cpu, memory = job.spec.resources.cpu or cpu, job.spec.resources.memory or memory
        limits = {name: str(count) for name, count in (profile.extra_resources or {}).items()}
        limits |= {profile.gpu_resource: str(job.spec.resources.gpus)} if profile.gpu_resource else {}
        claims = {"claims": [{"name": claim.name} for claim in profile.resource_claims or ()]}
    both = {"memory": memory}
    if wanted.ephemeral_storage is not None:
        both["ephemeral-storage"] = wanted.ephemeral_storage
    return {
        "requests": {"cpu": cpu, **both},
        "limits": both | limits,
        **(claims if claims.get("claims") else {}),
    }


def _tolerations(job: QLoRAJob, profile: Profile) -> list[Manifest]:
    tolerations: list[Toleration] = [*profile.tolerations, *(job.spec.scheduling.tolerations or ())]
    if profile.gpu_resource:
        # GPU nodes have this taint by convention, and not every cluster adds the toleration by itself.
        tolerations.append(Toleration(key=profile.gpu_resource, operator="Exists", effect="NoSchedule"))
    return [toleration.dump() for toleration in dict.fromkeys(tolerations)]
