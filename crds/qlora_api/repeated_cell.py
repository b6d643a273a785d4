"""Finds cells of a sweep that would train the same adapter, of which the second tells nothing new."""

from collections.abc import Sequence

from qlora_api.schema import ApiModel
from qlora_api.sweep import Cell, QLoRASweepSpec
from qlora_api.v1alpha1 import QLoRAJobSpec


def repeated_cell(spec: QLoRASweepSpec, cells: Sequence[Cell]) -> str | None:
    """That two of the sweep's cells are the same, and which; None if all differ."""
    known: dict[tuple[ApiModel, ApiModel], int] = {}
    for number, cell in enumerate(cells):
        first = known.setdefault(_what_is_trained(cell.spec), number)
        if first != number:
            later, earlier = (_place(spec, cells, each) for each in (number, first))
            return (
                f"{later} is the same as {earlier}: both would train the same adapter (a value that the template has, "
                "and the order of targetModules, change nothing): remove one of them"
            )
    return None


def _what_is_trained(spec: QLoRAJobSpec) -> tuple[ApiModel, ApiModel]:
    """All that cells can differ in besides their places: the names of layers are a set."""
    names = tuple(sorted(set(spec.lora.target_modules)))
    return spec.lora.model_copy(update={"target_modules": names}), spec.training


def _place(spec: QLoRASweepSpec, cells: Sequence[Cell], number: int) -> str:
    cell = cells[number]
    place = f"spec.cells[{number}]" if spec.grid is None else f"cell {cell.name} of spec.grid"
    return f"{place} ({cell.overrides.text()})"
