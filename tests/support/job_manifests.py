"""Jobs as the operator builds them, and parts of their pods."""

from typing import Any

from qlora_api.profile import Profile
from qlora_api.status import StepName
from qlora_operator.decisions.manifests.objects import build_job, document
from tests.support.builders import NAME, make_job, resolved

STEPS: tuple[StepName, ...] = ("prepare", "train", "publish", "clean")
WORKSPACE = f"{NAME}-0a1b2c3d"


EVERYTHING: dict[str, Any] = {
    "model": {"source": "hf://org/model", "tokenSecretRef": {"name": "hub", "key": "read"}},
    "dataset": {"source": "configMap://rows/a.jsonl", "eval": {"source": "pvc://held-out/b.jsonl"}},
    "lora": {"from": {"source": "pvc://earlier/first"}},
    "output": {"destination": "pvc://adapters/tuned"},
}


_NODES = {"matchExpressions": [{"key": "gpu", "operator": "NotIn", "values": ["old"]}]}
_PODS = {"labelSelector": {"matchLabels": {"team": "a"}}, "topologyKey": "rack"}
POD_OPTIONS: dict[str, Any] = {
    "gpuResource": "nvidia.com/gpu",
    "nodeSelector": {"pool": "gpu"},
    "schedulerName": "gang-scheduler",
    "podLabels": {"cost-center": "42"},
    "podAnnotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
    "extraResources": {"rdma/hca": 2},
    "resourceClaims": [{"name": "nics", "resourceClaimTemplateName": "fast-nics"}],
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "rack"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [_NODES]},
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 5, "preference": _NODES}],
        },
        "podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [_PODS]},
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "podAffinityTerm": _PODS}]
        },
    },
}
"""Every option of a profile's pods."""


def build(step: StepName, /, profile: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    full = Profile.model_validate({"image": "example.org/trainer", "gpuResource": "nvidia.com/gpu"} | (profile or {}))
    job = make_job(**spec)
    return build_job(job, resolved(full).model_copy(update={"document": document(job, full)}), step, 2)


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    return pod_of(job)["containers"][0]


def environment_of(job: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container_of(job)["env"]}


def mounts_of(job: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Mount path -> (volume, whether it can be written)."""
    volumes = {volume["name"]: volume for volume in pod_of(job)["volumes"]}
    assert len(volumes) == len(pod_of(job)["volumes"])

    def kind(volume: dict[str, Any]) -> str:
        claim = volume.get("persistentVolumeClaim")
        return claim["claimName"] if claim else next(key for key in volume if key != "name")

    return {
        mount["mountPath"]: (kind(volumes[mount["name"]]), not mount.get("readOnly", False))
        for mount in container_of(job)["volumeMounts"]
    }
