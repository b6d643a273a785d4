"""Lists the models that can be fine-tuned, and those that have been."""

from collections.abc import Iterable, Sequence
from typing import Any

from qlora_api.channel import parse_adapter_name
from qlora_door.errors import ApiError
from qlora_door.job import Job

_OWNER = "system"


def models_of(templates: Iterable[str], jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return the administrator's models, then the finished adapters, the newest first."""
    bases = [_model(name, 0, _OWNER) for name in templates]
    made = [(job.fine_tuned_model, job) for job in jobs]
    return bases + [_model(name, job.finished_at or 0, job.namespace) for name, job in made if name is not None]


def base_model(name: str) -> dict[str, Any]:
    """Return a model of the administrator."""
    return _model(name, 0, _OWNER)


def tuned_model(name: str, job: Job) -> dict[str, Any]:
    """Return a finished adapter. Raises ApiError if the job has made another one, or none."""
    if job.fine_tuned_model != name:
        raise missing_model(name)
    return _model(name, job.finished_at or 0, job.namespace)


def job_of(name: str, namespace: str) -> str:
    """Return the job that the name of an adapter states. Raises ApiError."""
    try:
        adapter = parse_adapter_name(name)
    except ValueError:
        raise missing_model(name) from None
    if adapter.namespace != namespace:
        raise missing_model(name)
    return adapter.job


def missing_model(name: str) -> ApiError:
    """Return the error of a model that does not exist."""
    return ApiError(404, f"model {name[:200]} was not found", code="model_not_found", param="model")


def _model(name: str, created: int, owner: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owner}
