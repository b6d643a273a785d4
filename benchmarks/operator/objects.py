"""The jobs that are created, and the settings that the operator runs them with."""

from typing import Any

from qlora_api.profile import Profile
from qlora_api.v1alpha1 import API_VERSION, KIND

NAMESPACE = "team"
PROFILE = Profile.model_validate(
    {"image": "registry.example.org/qlora-trainer:1.0.0", "gpuResource": "nvidia.com/gpu", "workspace": {"size": "1Gi"}}
)


def qlora_job(number: int) -> dict[str, Any]:
    """A job with the fields that a user has to give, and the schema's defaults for the rest."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": f"job-{number}", "namespace": NAMESPACE},
        "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}},
    }


def operator_settings(probe_port: int, metrics_port: int, workers: int | None) -> dict[str, Any]:
    """The operator's settings: its defaults, apart from the ports."""
    settings: dict[str, Any] = {
        "profiles": {"default": PROFILE.dump()},
        "probePort": probe_port,
        "metricsPort": metrics_port,
    }
    return settings if workers is None else settings | {"workers": workers}
