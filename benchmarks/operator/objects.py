"""The created jobs, and the operator's settings."""

from typing import Any

from qlora_api.profile import PROFILE_KIND, Profile
from qlora_api.spec.job import API_VERSION, GROUP, KIND, PLURAL, VERSION

NAMESPACE = "team"
PROFILE = Profile.model_validate(
    {"image": "registry.example.org/qlora-trainer:1.0.0", "gpuResource": "nvidia.com/gpu", "workspace": {"size": "1Gi"}}
)
QLORA = f"/apis/{GROUP}/{VERSION}"
BATCH = "/apis/batch/v1"
CORE = "/api/v1"

# Label of a pod that has ended before it is created: no node must start it.
COPIED_LABEL = "qlora.dev/copied"


def jobs_path(namespace: str = NAMESPACE) -> str:
    """The path of a namespace's QLoRAJobs."""
    return f"{QLORA}/namespaces/{namespace}/{PLURAL}"


def qlora_job(number: int, namespace: str = NAMESPACE, name: str = "", **spec: Any) -> dict[str, Any]:
    """A job with the required fields, and the schema's defaults for the rest."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name or f"job-{number}", "namespace": namespace},
        "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}, **spec},
    }


def profile(spec: Profile = PROFILE) -> dict[str, Any]:
    """The only profile."""
    return {
        "apiVersion": API_VERSION,
        "kind": PROFILE_KIND,
        "metadata": {"name": "default"},
        "spec": spec.dump(),
    }


def operator_settings(probe_port: int, metrics_port: int) -> dict[str, Any]:
    """The operator's settings: its defaults, apart from the ports."""
    return {"probePort": probe_port, "metricsPort": metrics_port}
