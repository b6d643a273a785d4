"""Shows the cells of a sweep, the GPU memory of each pod, and the pods at a time."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_api.automatic import Limits
from qlora_api.contract import ExitCode
from qlora_api.gpus import GPUS
from qlora_api.joinable import rows_not_apart
from qlora_api.memory.advice import Verdict, verdict
from qlora_api.memory.estimate import MemoryEstimate
from qlora_api.spec.resolved import ResolvedSpec
from qlora_api.spec.training import LoraSpec
from qlora_api.sweep.cells import repeated_cell
from qlora_api.sweep.halving import HalvingSpec
from qlora_api.sweep.spec import Cell, QLoRASweepDocument, cells, pods
from qlora_cli.local.plan import (
    COLORS,
    ChooseSettings,
    FindTraits,
    MemoryPlan,
    exit_code_of,
    gib,
    gib_of_gpu,
    make_plan,
)
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.core.sandbox import DryRunFailed
from qlora_trainer.model.families.family import Traits
from qlora_trainer.model.memory.dry_run import StepSize, measure_together_within_limits
from qlora_trainer.model.memory.job_memory import Measure, MeasurePasses, memory_together
from qlora_trainer.steps.planned import assume_settings, find_traits, measure_with, require_settings

# The operator creates the claim of a sweep that names none; no memory depends on its name.
_CLAIM = "workspace"


@dataclass(frozen=True)
class PodPlan:
    """The memory of the cells that one pod trains."""

    cells: tuple[Cell, ...]
    alone: tuple[MemoryPlan, ...]
    """Of each cell by itself."""
    memory: MemoryEstimate | None
    """Of all together; None if it is not known."""
    unknown: str = ""
    """Why it is not known."""

    def verdict(self, gpu_gib: float) -> Verdict | None:
        """Whether the cells fit a GPU of that size; None if that is not known."""
        return None if self.memory is None else verdict(self.memory, gpu_gib)


@dataclass(frozen=True)
class SweepPlan:
    """The memory of each pod of a sweep, and its GPU's in GiB, or None if not given."""

    document: QLoRASweepDocument
    pods: tuple[PodPlan, ...]
    gpu_gib: float | None

    @property
    def exceeding(self) -> tuple[PodPlan, ...]:
        """The pods that cannot fit the GPU."""
        if self.gpu_gib is None:
            return ()
        return tuple(pod for pod in self.pods if pod.verdict(self.gpu_gib) == "exceeds")

    @property
    def exit_code(self) -> int:
        """The exit code for the verdicts."""
        return ExitCode.DONE if self.gpu_gib is None else exit_code_of([pod.verdict(self.gpu_gib) for pod in self.pods])


def make_sweep_plan(
    document: QLoRASweepDocument,
    config: Path,
    gpu_gib: float | None,
    measure: Measure | None = None,
    measure_passes: MeasurePasses = measure_together_within_limits,
    choose: ChooseSettings = assume_settings,
) -> SweepPlan:
    """The plan of a sweep whose model has this config.json. Pods whose cells need the same memory are estimated once.

    Raises StepFailure if a cell does not fit the template or is the same as another, or the model is not supported.
    """
    template = document.spec.template.spec
    try:
        found = cells(document.metadata.name, document.spec, template.workspace.claim_name or _CLAIM)
    except ValueError as error:
        raise bad_configuration(str(error)) from error
    if (repeated := repeated_cell(document.spec, found)) is not None:
        raise bad_configuration(repeated)
    find = _found_once(config)
    _require_rows_apart(document, find(template.lora))
    for cell in found:
        require_settings(find(cell.spec.lora), config, cell.spec)
    measure = _once(measure, find, gpu_gib)
    known: dict[object, PodPlan] = {}
    planned = []
    for pod in pods(document.spec, found):
        limits = Limits(group_size=len(pod))
        alone = tuple(make_plan(cell.name, cell.spec, config, gpu_gib, measure, find, choose, limits) for cell in pod)
        key = tuple(_decides_memory(plan.spec) for plan in alone)
        if key not in known:
            known[key] = _pod_plan(pod, alone, config, measure_passes)
        planned.append(replace(known[key], cells=tuple(pod), alone=alone))
    return SweepPlan(document, tuple(planned), gpu_gib if gpu_gib is not None else template.resources.gpu_gib)


def _require_rows_apart(document: QLoRASweepDocument, traits: Traits) -> None:
    together = document.spec.cells_per_pod
    if together > 1 and traits.one_row:
        why = rows_not_apart(traits.model_type)
        raise bad_configuration(f"spec.cellsPerPod is {together}: {why}: remove cellsPerPod")


def _decides_memory(spec: ResolvedSpec) -> object:
    """The same for two cells of a sweep that need the same memory."""
    return _decides_dry_run(spec), spec.training.gradient_accumulation_steps


def _decides_dry_run(spec: ResolvedSpec) -> object:
    training = spec.training
    batch = training.micro_batch_size, training.max_sequence_length, training.auto_micro_batch
    return batch, training.gradient_checkpointing, spec.lora.model_copy(update={"alpha": None})


def _pod_plan(
    pod: Sequence[Cell], alone: tuple[MemoryPlan, ...], config: Path, measure_passes: MeasurePasses
) -> PodPlan:
    known = [(plan, plan.job) for plan in alone if plan.job is not None]
    if len(known) < len(alone):
        return PodPlan(tuple(pod), alone, None, next(plan.unknown for plan in alone if plan.job is None))
    if len(pod) == 1:
        [(plan, job)] = known
        return PodPlan(tuple(pod), alone, job.estimate(plan.training), plan.unknown)
    try:
        together = memory_together(config, [plan.spec for plan in alone], [job for _, job in known], measure_passes)
    except DryRunFailed as failure:
        return PodPlan(tuple(pod), alone, None, str(failure))
    return PodPlan(tuple(pod), alone, together)


def _found_once(config: Path) -> FindTraits:
    """The traits of the model, inspected once for equal adapters."""
    found: dict[str, Traits] = {}

    def find(lora: LoraSpec) -> Traits:
        key = lora.model_dump_json()
        if key not in found:
            found[key] = find_traits(config, lora)
        return found[key]

    return find


def _once(measure: Measure | None, find: FindTraits, gpu_gib: float | None) -> Measure:
    """The dry run, which measures, or fails for, what depends on the same things once only."""
    found: dict[object, MeasuredMemory | DryRunFailed] = {}

    def measured(config: Path, spec: ResolvedSpec, sizes: Sequence[StepSize], digest: str) -> MeasuredMemory:
        key = (_decides_dry_run(spec), tuple(sizes))
        if key not in found:
            run = measure or measure_with(find(spec.lora), gpu_gib)
            try:
                found[key] = run(config, spec, sizes, digest)
            except DryRunFailed as failure:
                found[key] = failure
        result = found[key]
        if isinstance(result, DryRunFailed):
            raise result
        return result

    return measured


def _colored(judged: Verdict) -> str:
    """The verdict in its color, as markup of rich."""
    return f"[{COLORS[judged]}]{judged}[/]"


def show_sweep_plan(plan: SweepPlan, console: Console) -> None:
    """Print a line for each cell, what runs at the same time, and what does not fit."""
    console.print(_table(plan))
    _show_remarks(plan, console)
    console.print(_totals(plan))
    if plan.gpu_gib is None:
        console.print("\nTo compare with one GPU, set spec.template.spec.resources.gpuMemory or --gpu-memory.")
    elif plan.exceeding:
        remedy = "lower spec.cellsPerPod, " if plan.document.spec.cells_per_pod > 1 else ""
        console.print(
            f"\n{_colored('exceeds')}: {len(plan.exceeding)} of {len(plan.pods)} pods cannot fit on a GPU of "
            f"{gib_of_gpu(plan.gpu_gib)}: {remedy}change or remove their cells, or use a larger GPU. `qlora plan` of a "
            "QLoRAJob with the settings of a cell lists what saves memory."
        )


def _table(plan: SweepPlan) -> Table:
    together = plan.document.spec.cells_per_pod > 1
    title = f"{plan.document.metadata.name}: {plan.document.spec.template.spec.model.source}"
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("Cell", no_wrap=True)
    table.add_column("Changes")
    table.add_column("GiB of the pod" if together else "GiB", justify="right")
    table.add_column("Smallest GPU" if plan.gpu_gib is None else f"On {gib_of_gpu(plan.gpu_gib)}", no_wrap=True)
    for pod in plan.pods:
        need = "–" if pod.memory is None else gib(pod.memory.expected)
        judged = _judged(pod, plan.gpu_gib)
        for cell in pod.cells:
            table.add_row(cell.name, escape(cell.overrides.text()), need, judged)
            need, judged = "", ""
        if together:
            table.add_section()
    return table


def _judged(pod: PodPlan, gpu_gib: float | None) -> str:
    if pod.memory is None:
        return "[bold yellow]unknown[/]"
    if gpu_gib is not None:
        return _colored(verdict(pod.memory, gpu_gib))
    gpus = [gpu for gpu in GPUS.values() if gpu.has_bfloat16]
    smallest = next((gpu for gpu in gpus if verdict(pod.memory, gpu.gib) == "fits"), None)
    if smallest is None:
        return f"more than {gib_of_gpu(gpus[-1].gib)}"
    return f"{smallest.label} ({gib_of_gpu(smallest.gib)})"


def _show_remarks(plan: SweepPlan, console: Console) -> None:
    """Print once what holds for all cells of a kind."""
    unknown = next((pod for pod in plan.pods if pod.memory is None), None)
    if unknown is not None:
        console.print(f"[bold yellow]unknown[/]: {escape(unknown.unknown)}.")
    alone = [each for pod in plan.pods for each in pod.alone]
    show_findings([("[yellow]Remark[/]", text) for each in alone for text in each.remarks], len(alone), console)


def show_findings(found: Iterable[tuple[str, str]], cells: int, console: Console) -> None:
    """Print once what was found of several of `cells` cells: a label in color and a sentence."""
    for (label, text), count in Counter(found).items():
        console.print(f"{label} on {count} of {cells} cells: {escape(text)}.", soft_wrap=True)


def _totals(plan: SweepPlan) -> Table:
    spec = plan.document.spec
    pods_at_a_time = min(spec.parallelism, len(plan.pods))
    gpus = spec.template.spec.resources.gpu_count
    table = Table.grid(padding=(0, 2))
    table.add_row("Cells", str(sum(len(pod.cells) for pod in plan.pods)))
    table.add_row("Cells per pod", f"{spec.cells_per_pod} (spec.cellsPerPod)")
    table.add_row("Pods at a time", f"{pods_at_a_time} of {len(plan.pods)} (spec.parallelism)")
    if spec.halving is not None:
        longest = (cell.spec.training.max_steps for pod in plan.pods for cell in pod.cells)
        table.add_row("Rungs", _rungs(spec.halving, list(longest)))
    each = f", {gpus} for each pod, of which each needs this much memory" if gpus > 1 else ""
    if spec.cells_per_pod > 1:
        each = "; when a pod has ended, each cell of it asks for one for a few seconds"
    table.add_row("GPUs at a time", f"{pods_at_a_time * gpus}{each}")
    return table


def _rungs(halving: HalvingSpec, longest: Sequence[int | None]) -> str:
    """List the steps that compare cells, by each cell's length in steps.

    `longest`: None where the data decides it.
    """
    known = [steps for steps in longest if steps is not None]
    rungs = halving.rungs(max(known) if len(known) == len(longest) else None)
    if not rungs:
        return f"none: no cell has more than spec.halving.minSteps ({halving.min_steps}) steps, so none is stopped"
    steps = ", ".join(str(rung) for rung in rungs)
    until = "" if len(known) == len(longest) else ", as far as a cell has as many"
    return f"{steps} steps{until}; the best 1/{halving.factor} go on (spec.halving)"
