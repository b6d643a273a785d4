"""Shows the GPU memory of jobs that are trained together on one base, beside that of each alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_api.contract import ExitCode
from qlora_api.joinable import not_joinable, rows_not_apart, unjoinable
from qlora_api.memory.advice import Verdict, verdict
from qlora_api.memory.estimate import MemoryEstimate
from qlora_api.memory.one_row import ONE_ROW_MODEL_TYPES
from qlora_api.spec.job import QLoRAJobDocument, QLoRAJobSpec
from qlora_cli.local.plan import (
    COLORS,
    GPU_SIZES_GIB,
    MEANING,
    MemoryPlan,
    gib,
    make_plan,
    show_components,
)
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.core.sandbox import DryRunFailed
from qlora_trainer.model.memory.dry_run import StepSize, measure_together_within_limits, measure_within_limits
from qlora_trainer.model.memory.fit import type_of_model
from qlora_trainer.model.memory.job_memory import Measure
from qlora_trainer.model.memory.joint_memory import MeasurePasses, memory_together


@dataclass(frozen=True)
class JointPlan:
    """The memory of jobs that are trained together, and of the GPU that they share, in GiB; None if not known."""

    names: tuple[str, ...]
    source: str
    alone: tuple[MemoryPlan, ...]
    memory: MemoryEstimate | None
    gpu_gib: int | None
    unknown: str = ""
    """Why the memory is not known."""
    group_size: int | None = None
    """How many jobs their group has."""

    @property
    def exit_code(self) -> ExitCode:
        """DOES_NOT_FIT if the jobs cannot fit the GPU together, else DONE."""
        if self.memory is None or self.gpu_gib is None or verdict(self.memory, self.gpu_gib) != "exceeds":
            return ExitCode.DONE
        return ExitCode.DOES_NOT_FIT


def require_joinable(documents: Sequence[QLoRAJobDocument]) -> None:
    """Raise StepFailure (BAD_CONFIGURATION) if the manifests keep the jobs from being trained together."""
    problem = unjoinable(documents)
    if problem is not None:
        raise bad_configuration(problem)


def make_joint_plan(
    documents: Sequence[QLoRAJobDocument],
    config: Path,
    gpu_gib: int | None,
    measure: Measure = measure_within_limits,
    measure_passes: MeasurePasses = measure_together_within_limits,
) -> JointPlan:
    """The plan of jobs that `require_joinable` accepts, whose model has this config.json.

    The GPU is the smallest that a job names, unless `gpu_gib` is given. Raises StepFailure if the model is not
    supported, or cannot keep the rows of several jobs apart.
    """
    specs = [document.spec for document in documents]
    model_type = type_of_model(config)
    if model_type in ONE_ROW_MODEL_TYPES:
        raise bad_configuration(not_joinable(documents[0].metadata.name, rows_not_apart(model_type)))
    measured = once(measure)
    alone = tuple(make_plan(document.metadata.name, document.spec, config, None, measured) for document in documents)
    known = [plan.job for plan in alone if plan.job is not None]
    memory, unknown = None, next((plan.unknown for plan in alone if plan.job is None), "")
    if len(known) == len(alone):
        try:
            memory = memory_together(config, specs, known, measure_passes)
        except DryRunFailed as failure:
            unknown = str(failure)
    named = [spec.resources.gpu_memory for spec in specs if spec.resources.gpu_memory is not None]
    return JointPlan(
        names=tuple(document.metadata.name for document in documents),
        source=specs[0].model.source,
        alone=alone,
        memory=memory,
        gpu_gib=gpu_gib if gpu_gib is not None else min(named, default=None),
        unknown=unknown,
        group_size=next((spec.group.size for spec in specs if spec.group is not None), None),
    )


def once(measure: Measure) -> Measure:
    """The same, which measures what depends on the same things once only."""
    found: dict[tuple[str, tuple[StepSize, ...]], MeasuredMemory] = {}

    def measured(config: Path, spec: QLoRAJobSpec, sizes: Sequence[StepSize], digest: str) -> MeasuredMemory:
        key = (digest, tuple(sizes))
        if key not in found:
            found[key] = measure(config, spec, sizes, digest)
        return found[key]

    return measured


def show_joint_plan(plan: JointPlan, console: Console) -> None:
    """Print the estimate of all together by component, that of each alone, and the verdict."""
    title = f"{len(plan.names)} jobs trained together: {plan.source}"
    if plan.memory is None:
        console.print(f"[bold]{escape(title)}[/]")
        console.print(f"[bold yellow]unknown[/]: {escape(plan.unknown)}.")
        return
    show_components(title, plan.memory, console)
    console.print(_jobs(plan, plan.memory))
    if plan.group_size is not None and plan.group_size != len(plan.names):
        console.print(
            f"[yellow]spec.group.size is {plan.group_size}[/], and this is the memory of {len(plan.names)} jobs: give "
            "the files of all."
        )
    if plan.gpu_gib is None:
        console.print("\nVerdict by GPU memory in GiB (to choose one, set spec.resources.gpuMemory or --gpu-memory):")
        console.print(_gpu_sizes(plan, plan.memory))
        return
    judged = verdict(plan.memory, plan.gpu_gib)
    console.print(
        f"\n[bold {COLORS[judged]}]{judged}[/]: trained together, {MEANING[judged]} on a GPU of {plan.gpu_gib} GiB."
    )
    if judged != "fits":
        console.print("Train fewer of them together, or run `qlora plan FILE` for each job to see what to change.")


def _estimates(plan: JointPlan) -> list[MemoryEstimate]:
    """Of each job alone."""
    return [one.job.estimate(one.training) for one in plan.alone if one.job is not None]


def _jobs(plan: JointPlan, together: MemoryEstimate) -> Table:
    table = Table(title="Beside each alone", title_justify="left", title_style="bold", show_footer=True)
    table.add_column("Job", footer="All together")
    table.add_column("Rank", justify="right")
    table.add_column("Micro batch", justify="right")
    table.add_column("GiB", justify="right", footer=gib(together.expected))
    for name, one, memory in zip(plan.names, plan.alone, _estimates(plan), strict=True):
        shape = one.training
        batch = f"{shape.micro_batch_size} × {shape.sequence_length}"
        table.add_row(escape(name), str(shape.rank), batch, gib(memory.expected))
    return table


def _gpu_sizes(plan: JointPlan, together: MemoryEstimate) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("  GiB", *map(escape, plan.names), "together")
    for size in GPU_SIZES_GIB:
        judged = [verdict(memory, size) for memory in (*_estimates(plan), together)]
        table.add_row(f"{size:>5}", *map(colored, judged))
    return table


def colored(judged: Verdict) -> str:
    """The verdict in its color, as markup of rich."""
    return f"[{COLORS[judged]}]{judged}[/]"
