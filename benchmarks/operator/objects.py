"""The jobs that are created, and the settings that the operator runs them with."""

from typing import Any

from qlora_api.profile import Profile
from qlora_api.spec.job import API_VERSION, GROUP, KIND, PLURAL, VERSION

NAMESPACE = "team"
PROFILE = Profile.model_validate(
    {"image": "registry.example.org/qlora-trainer:1.0.0", "gpuResource": "nvidia.com/gpu", "workspace": {"size": "1Gi"}}
)
QLORA = f"/apis/{GROUP}/{VERSION}"
BATCH = "/apis/batch/v1"
CORE = "/api/v1"

# Label of a pod whose life is over when it is created: no node is to start it.
COPIED_LABEL = "qlora.dev/copied"


def jobs_path(namespace: str = NAMESPACE) -> str:
    """Where the QLoRAJobs of a namespace are."""
    return f"{QLORA}/namespaces/{namespace}/{PLURAL}"


def qlora_job(number: int, namespace: str = NAMESPACE, name: str = "", **spec: Any) -> dict[str, Any]:
    """A job with the fields that a user has to give, and the schema's defaults for the rest."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name or f"job-{number}", "namespace": namespace},
        "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}, **spec},
    }


def operator_settings(probe_port: int, metrics_port: int) -> dict[str, Any]:
    """The operator's settings: its defaults, apart from the ports."""
    return {"profiles": {"default": PROFILE.dump()}, "probePort": probe_port, "metricsPort": metrics_port}
