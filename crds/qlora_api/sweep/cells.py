"""Finds repeated cells of a sweep, and builds the job that publishes the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from qlora_api.problems import explain_first
from qlora_api.schema import ApiModel, replace
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.sweep.spec import BEST_SUFFIX, Cell, QLoRASweepSpec

CHANGEABLE = ("activeDeadlineSeconds", "progressDeadlineSeconds", "retry", "gate", "budget")
"""What may change in a cell that exists, besides its memory, and counts for the job that publishes its adapter.

Not: whether it is suspended or canceled, and when it is cleaned up.
"""


@dataclass(frozen=True, slots=True)
class FoundRun:
    """The inputs of a cell's run, as its status names them."""

    model_revision: str = ""
    """Commit or digest of the base model; empty if it is not known."""
    initial_adapter: str = ""
    """Address of the adapter of lora.from, with commit or digest; empty without one."""


def best_job(name: str, spec: QLoRASweepSpec, best: Cell, stored: Mapping[str, Any], run: FoundRun) -> Cell:
    """Build the QLoRAJob that publishes the best cell's adapter.

    It continues that run at its end. `stored`: the current spec of the cell's QLoRAJob, for fields that a user may have
    changed since. It reads the model of that run and no later commit. Raises ValueError, naming the cell, if this
    version cannot read a change.
    """
    template = spec.template.spec.dump()
    taken = {key: template[key] for key in ("output", "cleanupAfterSeconds") if key in template}
    content = _pinned(best.spec.dump() | taken, run) | {"continues": best.name}
    for field in CHANGEABLE:
        content.pop(field, None)
    content |= {field: stored[field] for field in CHANGEABLE if field in stored}
    resources = {field: value for field, value in content["resources"].items() if field != "memory"}
    memory = stored.get("resources", {}).get("memory")
    content["resources"] = resources | ({} if memory is None else {"memory": memory})
    try:
        return Cell(best_job_name(name), best.overrides, QLoRAJobSpec.model_validate(content))
    except ValidationError as error:
        raise ValueError(f"the spec of QLoRAJob {best.name}: {explain_first(error, QLoRAJobSpec)}") from error


def _pinned(content: dict[str, Any], run: FoundRun) -> dict[str, Any]:
    """Pin the spec to the model's commit and the earlier adapter of the run."""
    model, lora = content["model"], content["lora"]
    if run.model_revision and model["source"].startswith("hf://"):
        model = model | {"revision": run.model_revision}
    if run.initial_adapter and "from" in lora:
        lora = lora | {"from": lora["from"] | {"source": run.initial_adapter}}
    return content | {"model": model, "lora": lora}


def best_job_name(name: str) -> str:
    """The name of that job."""
    return f"{name}{BEST_SUFFIX}"


def repeated_cell(spec: QLoRASweepSpec, cells: Sequence[Cell]) -> str | None:
    """Return a message that names two equal cells of the sweep, or None if all differ."""
    known: dict[tuple[ApiModel, ...], int] = {}
    for number, cell in enumerate(cells):
        first = known.setdefault(what_is_trained(cell.spec), number)
        if first != number:
            later, earlier = (_place(spec, cells, each) for each in (number, first))
            return (
                f"{later} is the same as {earlier}: both would train the same adapter (a value that the template has, "
                "the order of targetModules, and the output change nothing): remove one of them"
            )
    return None


def what_is_trained(spec: QLoRAJobSpec) -> tuple[ApiModel, ...]:
    """Return all settings of a cell that decide its adapter and can differ from those of others.

    The names of layers are a set.
    """
    names = tuple(sorted(set(spec.lora.target_modules)))
    # Automatic, it follows from whether microBatchSize is set.
    training = spec.training.model_copy(update={"auto_micro_batch": None})
    return replace(spec.lora, target_modules=names), training, spec.dataset


def _place(spec: QLoRASweepSpec, cells: Sequence[Cell], number: int) -> str:
    cell = cells[number]
    place = f"spec.cells[{number}]" if spec.grid is None else f"cell {cell.name} of spec.grid"
    return f"{place} ({cell.overrides.text()})"
