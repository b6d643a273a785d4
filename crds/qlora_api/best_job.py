"""The QLoRAJob that publishes the adapter of a sweep's best cell, with spec.publish: best, as it is to be created."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from qlora_api.sweep import BEST_SUFFIX, Cell, QLoRASweepSpec, first_problem
from qlora_api.v1alpha1 import QLoRAJobSpec

CHANGEABLE = ("activeDeadlineSeconds", "progressDeadlineSeconds", "retry", "gate", "budget")
"""What may change in a cell that exists, besides its memory, and counts for the job that publishes its adapter.

Not: whether it is suspended, and when it is cleaned up.
"""


@dataclass(frozen=True, slots=True)
class FoundRun:
    """What the run of a cell has read, as its status names it."""

    model_revision: str = ""
    """Commit or digest of the base model; empty if it is not known."""
    initial_adapter: str = ""
    """Address of the adapter of lora.from, with the commit or digest; empty without one."""


def best_job(name: str, spec: QLoRASweepSpec, best: Cell, stored: Mapping[str, Any], run: FoundRun) -> Cell:
    """The QLoRAJob that publishes the adapter of the best cell of the sweep `name`: it takes that run up at its end.

    `stored`: the spec of the cell's QLoRAJob as it is now, of which it has what a user may have changed since. It reads
    the model of that run and no later commit. Raises ValueError, naming the cell, if this version cannot read a change.
    """
    template = spec.template.spec.dump()
    taken = {key: template[key] for key in ("output", "cleanupAfterSeconds") if key in template}
    content = _pinned(best.spec.dump() | taken, run) | {"continues": best.name}
    for field in ("group", *CHANGEABLE):
        content.pop(field, None)
    content |= {field: stored[field] for field in CHANGEABLE if field in stored}
    # A request is for the job in which it is raised.
    content["retry"] = {field: value for field, value in content.get("retry", {}).items() if field != "request"}
    resources = {field: value for field, value in content["resources"].items() if field != "memory"}
    memory = stored.get("resources", {}).get("memory")
    content["resources"] = resources | ({} if memory is None else {"memory": memory})
    try:
        return Cell(best_job_name(name), best.overrides, QLoRAJobSpec.model_validate(content))
    except ValidationError as error:
        raise ValueError(f"the spec of QLoRAJob {best.name}: {first_problem(error)}") from error


def _pinned(content: dict[str, Any], run: FoundRun) -> dict[str, Any]:
    """The spec with the commit of the model, and the earlier adapter, that the run has read."""
    model, lora = content["model"], content["lora"]
    if run.model_revision and model["source"].startswith("hf://"):
        model = model | {"revision": run.model_revision}
    if run.initial_adapter and "from" in lora:
        lora = lora | {"from": lora["from"] | {"source": run.initial_adapter}}
    return content | {"model": model, "lora": lora}


def best_job_name(name: str) -> str:
    """The name of that job."""
    return f"{name}{BEST_SUFFIX}"
