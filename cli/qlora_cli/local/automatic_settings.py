"""Shows the automatic settings of a job, or of the cells of a sweep, with their steps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console

from qlora_api.choice import Choice
from qlora_api.schema import replace
from qlora_api.sweep.cells import what_is_trained
from qlora_api.sweep.spec import Cell
from qlora_cli.local.forecast import findings, steps_of
from qlora_cli.local.plan import MemoryPlan, show_remark
from qlora_cli.local.plan_sweep import SweepPlan, show_findings
from qlora_cli.local.rows import RowCounts, show_lengths


def show_settings(settings: Iterable[Choice], console: Console, of: str = "") -> None:
    """Print the chosen settings with their reasons. `of`: whose they are."""
    chosen = tuple(settings)
    if not chosen:
        return
    name, value = (max(len(getattr(each, field)) for each in chosen) for field in ("setting", "value"))
    console.print(f"\n[bold]Automatic settings[/]{of}: set one in the spec, and the others follow it.")
    for each in chosen:
        line = f"  {each.setting:{name}}  {each.value:{value}}  {each.reason}".rstrip()
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _CountedCell:
    """A cell whose rows are counted."""

    cell: Cell
    made: MemoryPlan
    sequences: int
    """Of an epoch."""

    @property
    def steps(self) -> int:
        return steps_of(self.made.spec.training, self.sequences)


def show_cells(plan: SweepPlan, counts: RowCounts, console: Console) -> None:
    """Print the rows of a sweep's cells, and the settings and steps that follow from them. Raises StepFailure."""
    by_data: dict[str, list[tuple[Cell, MemoryPlan]]] = {}
    for pod in plan.pods:
        for cell, made in zip(pod.cells, pod.alone, strict=True):
            by_data.setdefault(cell.spec.dataset.model_dump_json(), []).append((cell, made))
    counted: list[_CountedCell] = []
    for cells in by_data.values():
        if len(by_data) > 1:
            names = ", ".join(cell.name for cell, _ in cells)
            console.print(f"\n[bold]Rows of {names}[/]", highlight=False, soft_wrap=True)
        first, made = cells[0]
        show_lengths(first.spec, counts.of(first.spec, made.traits), console)
        counted += _counted(cells, counts)
    if counted:
        _show_settings_and_steps(sorted(counted, key=lambda each: each.cell.name), console)


def _counted(cells: Sequence[tuple[Cell, MemoryPlan]], counts: RowCounts) -> Iterable[_CountedCell]:
    """Return those that do not fail for their rows."""
    for cell, made in cells:
        rows, training = counts.of(cell.spec, made.traits), made.spec.training
        if not rows.examined.rejection:
            epoch = rows.epoch(training, packed=made.traits.packs(training))
            yield _CountedCell(cell, made, epoch.sequences or 0)


def _show_settings_and_steps(cells: Sequence[_CountedCell], console: Console) -> None:
    """Print once what all cells have in common, and by cell what differs."""
    shared = _shared([each.made.settings for each in cells])
    show_settings(shared, console, " of all cells")
    console.print()
    steps = {each.steps for each in cells}
    if len(steps) == 1:
        console.print(f"[bold]Steps[/]: {min(steps):,} in each cell.", highlight=False)
    in_common = {each.setting for each in shared}
    for each in cells:
        differing = [f"{one.name} {one.value}" for one in each.made.settings if one.setting not in in_common]
        if len(steps) > 1:
            differing.insert(0, f"{each.steps:,} step{'s' * (each.steps != 1)}")
        if differing:
            line = f"  {each.cell.name}  {', '.join(differing)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    found = [one for each in cells for one in findings(each.made.spec, each.sequences)]
    show_findings(found, len(cells), console)
    same: dict[object, list[str]] = {}
    for each in cells:
        same.setdefault(what_is_trained(each.made.spec), []).append(each.cell.name)
    for names in same.values():
        if len(names) > 1:
            show_remark(f"{' and '.join(names)} train the same adapter: keep one of them", console)


def _shared(settings: Sequence[Sequence[Choice]]) -> list[Choice]:
    """Return the choices that all cells have, without reasons that differ."""
    by_setting = [{each.setting: each for each in chosen} for chosen in settings]
    shared = []
    for each in settings[0]:
        found = [chosen.get(each.setting) for chosen in by_setting]
        if all(other is not None and other.value == each.value for other in found):
            shared.append(each if all(other == each for other in found) else replace(each, reason=""))
    return shared
