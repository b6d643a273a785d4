"""Shows the GPU memory that a job needs: by component, compared with the GPU, and what to change if it does not fit."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_api.automatic import NO_LIMITS, Limits
from qlora_api.choice import Choice
from qlora_api.contract import TIGHT_EXIT_CODE, ExitCode
from qlora_api.gpus import GPUS
from qlora_api.memory.advice import (
    RUN_FIELDS,
    Advice,
    Verdict,
    advice,
    budget,
    first_change,
    is_thin,
    larger_micro_batch,
    more_gpus,
    room,
    verdict,
)
from qlora_api.memory.estimate import GIB, MemoryEstimate, without_activations
from qlora_api.memory.training_shape import RECOMPUTE_ALL, Recomputation, TrainingShape
from qlora_api.memory.weights import WeightCounts
from qlora_api.schema import replace
from qlora_api.sources import HubSource, VolumeSource, parse_source
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_api.spec.resolved import ResolvedSpec, resolve
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import bad_configuration, model_unavailable
from qlora_trainer.core.sandbox import DryRunFailed
from qlora_trainer.model.families.family import Traits
from qlora_trainer.model.memory.fit import memory_to_offload, training_shape, weights_of
from qlora_trainer.model.memory.fitted import first_limits, limits_that_fit
from qlora_trainer.model.memory.job_memory import Measure, MeasuredJob, measure_further
from qlora_trainer.model.source.hub_config import FoundConfig, find_hub_config
from qlora_trainer.steps.planned import assume_settings, find_traits, measure_with, require_settings

FindTraits: TypeAlias = Callable[[LoraSpec], Traits]
ChooseSettings: TypeAlias = Callable[[QLoRAJobSpec, Traits, Limits], tuple[Choice, ...]]
COLORS = {"fits": "green", "tight": "yellow", "exceeds": "red"}
MEANING = {
    "fits": "the run fits",
    "tight": "the run may fit, or may run out of memory,",
    "exceeds": "the run cannot fit",
}


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a job and of its GPU in GiB, None if the latter is not given."""

    title: str
    job: MeasuredJob | None
    """None if the dry run failed."""
    training: TrainingShape
    gpu_gib: float | None
    traits: Traits
    spec: ResolvedSpec
    settings: tuple[Choice, ...] = ()
    """The chosen values of open settings."""
    nodes: int = 1
    unknown: str = ""
    """Why the dry run failed."""
    weights: WeightCounts | None = None
    """Counted from config.json if the dry run failed; None for a family whose layers are not listed."""
    remarks: tuple[str, ...] = ()
    """What is done otherwise than the job asks."""

    @property
    def memory(self) -> MemoryEstimate | None:
        """The estimate; without activations if the dry run failed."""
        if self.job is not None:
            return self.job.estimate(self.training)
        return None if self.weights is None else without_activations(self.weights, self.training)

    @property
    def parameters(self) -> int | None:
        """Weights that each token is multiplied by; None if that is unknown."""
        counted = self.weights if self.job is None else self.job
        return self.traits.parameters_of_token(None if counted is None else counted.parameters)

    @property
    def recomputed_share(self) -> float:
        """The share of the blocks whose activations are recomputed."""
        return self.training.recomputed_share(None if self.job is None else self.job.measured.blocks)

    @property
    def verdict(self) -> Verdict | None:
        """Whether the job fits the GPU, or None if that is unknown.

        Weights that are too large exceed it with any activations.
        """
        memory, gpu_gib = self.memory, self.gpu_gib
        judged = None if memory is None or gpu_gib is None else verdict(memory, gpu_gib)
        return judged if self.job is not None or judged == "exceeds" else None

    @property
    def exit_code(self) -> int:
        """The exit code for the verdict."""
        return exit_code_of([self.verdict])


def exit_code_of(verdicts: Collection[Verdict | None]) -> int:
    """Return DOES_NOT_FIT if `prepare` would reject a job, that of a tight one, or DONE."""
    if "exceeds" in verdicts:
        return ExitCode.DOES_NOT_FIT
    return TIGHT_EXIT_CODE if "tight" in verdicts else ExitCode.DONE


def make_plan(
    name: str,
    spec: QLoRAJobSpec,
    config: Path,
    gpu_gib: float | None,
    measure: Measure | None = None,
    find: FindTraits | None = None,
    choose: ChooseSettings = assume_settings,
    limits: Limits = NO_LIMITS,
) -> MemoryPlan:
    """The plan of a job whose model has this config.json, from a dry run.

    Without one, as without the trainer, the plan has the weights only. `choose` decides on open settings.
    Raises StepFailure as prepare does, unless the job does not fit its GPU.
    """
    traits = find_traits(config, spec.lora) if find is None else find(spec.lora)
    require_settings(traits, config, spec)
    measure = measure or measure_with(traits, gpu_gib)
    gpu_gib = gpu_gib if gpu_gib is not None else spec.resources.gpu_gib
    choose_within, limits = partial(choose, spec, traits), first_limits(spec, limits, gpu_gib)
    resolved = resolve(spec, settings := choose_within(limits))
    require_settings(traits, config, resolved)
    job: MeasuredJob | None = None
    weights, unknown = None, ""
    try:
        while True:
            shape = _shape(resolved, limits.recomputation)
            job = MeasuredJob.from_config(config, resolved, shape, None if job is None else job.measured, measure)
            blocks = job.measured.blocks
            fitting = limits_that_fit(spec, choose_within, limits, gpu_gib, blocks, partial(_estimate, job))
            if fitting == limits:
                break
            limits = fitting
            resolved = resolve(spec, settings := choose_within(limits))
    except DryRunFailed as failure:
        limits = dataclasses.replace(limits, recomputation=RECOMPUTE_ALL)
        resolved = resolve(spec, settings := choose_within(limits))
        weights, unknown = weights_of(config, _shape(resolved, limits.recomputation)), str(failure)
    return MemoryPlan(
        title=f"{name}: {spec.model.source}, rank {resolved.lora.rank}, "
        f"{resolved.training.micro_batch_size} × {resolved.training.max_sequence_length} tokens",
        job=job,
        training=_shape(resolved, limits.recomputation),
        gpu_gib=gpu_gib,
        spec=resolved,
        settings=settings,
        nodes=spec.resources.node_count,
        unknown=unknown,
        weights=weights,
        traits=traits,
        remarks=tuple(
            traits.remarks(replace(spec.training, max_sequence_length=resolved.training.max_sequence_length))
        ),
    )


def _estimate(job: MeasuredJob, spec: ResolvedSpec, recomputation: Recomputation) -> MemoryEstimate:
    return job.estimate(_shape(spec, recomputation))


def _shape(spec: ResolvedSpec, recomputation: Recomputation) -> TrainingShape:
    return training_shape(spec, spec.lora.target_modules, recomputation)


def find_config(model: BaseModelSpec, mounts: Mounts) -> FoundConfig:
    """Return the model's config.json: local, fetched or packaged. Raises StepFailure."""
    source = parse_source(model.source)
    if isinstance(source, VolumeSource):
        if source.claim not in mounts.claims:
            raise bad_configuration(
                f"spec.model.source is {model.source}: give a folder for the claim with --volume {source.claim}=DIR, "
                "or the model's config.json with --config FILE"
            )
        config = mounts.folder(source) / "config.json"
        if not config.is_file():
            raise model_unavailable(f"{config} does not exist: {model.source} holds no transformers model")
        return FoundConfig(config)
    if not isinstance(source, HubSource):
        raise bad_configuration(
            f"spec.model.source is {model.source}, which this command does not download: "
            "give the model's config.json with --config FILE"
        )
    return find_hub_config(source, model, "or give the model's config.json with --config FILE")


def show_plan(plan: MemoryPlan, console: Console) -> None:
    """Print the estimate by component, its range, the verdict, and settings to change."""
    if plan.job is None:
        _show_without_activations(plan, console)
        return
    memory = plan.job.estimate(plan.training)
    show_components(plan.title, memory, console)
    _show_remarks(plan, console)
    if plan.training.gpus > 1:
        _show_gpus(plan, console)
    if plan.gpu_gib is None:
        _show_gpu_sizes(memory, console)
    else:
        rows_apart = plan.traits.keeps_rows_apart(plan.training.sequence_length)
        _show_verdict(plan.job, plan.gpu_gib, console, rows_apart=rows_apart)


def _show_without_activations(plan: MemoryPlan, console: Console) -> None:
    """Print weights, gradients and optimizer, and the reason without a dry run."""
    memory = plan.memory
    if memory is None:
        console.print(f"[bold]{escape(plan.title)}[/]")
    else:
        console.print(_components(plan.title, memory, "Without activations"))
    _show_remarks(plan, console)
    if memory is not None and plan.training.gpus > 1:
        _show_gpus(plan, console)
    console.print(f"[bold yellow]unknown[/]: activations take a dry run; {escape(plan.unknown)}.")
    if plan.verdict == "exceeds" and memory is not None and plan.gpu_gib is not None:
        console.print(
            f"\n[bold {COLORS['exceeds']}]exceeds[/]: {MEANING['exceeds']} on a GPU of {gib_of_gpu(plan.gpu_gib)} with "
            f"any activations: without them it needs at least {gib(memory.low)} of {gib(budget(plan.gpu_gib))} usable."
        )


def _show_remarks(plan: MemoryPlan, console: Console) -> None:
    for remark in plan.remarks:
        show_remark(remark, console)


def show_remark(remark: str, console: Console) -> None:
    """Print what a user must know about the plan, if there is anything."""
    if remark:
        console.print(f"[yellow]Remark[/]: {escape(remark)}.", soft_wrap=True)


def show_components(title: str, memory: MemoryEstimate, console: Console) -> None:
    """Print the estimate by component, and its range."""
    console.print(_components(title, memory, "Expected peak"))
    console.print(
        f"Low {gib(memory.low)}, expected {gib(memory.expected)}, high {gib(memory.high)} GiB. "
        "Low assumes that the optimizer's pages are in host memory."
    )


def _components(title: str, memory: MemoryEstimate, total: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_footer=True)
    table.add_column("GPU memory", footer=total)
    table.add_column("GiB", justify="right", footer=gib(memory.expected))
    table.add_column("", style="dim")
    for component in memory.components():
        if not component.size:
            continue
        note = "" if component.at_peak else "not at the peak"
        table.add_row(component.label, gib(component.size), note, style=None if component.at_peak else "dim")
    return table


def _show_gpus(plan: MemoryPlan, console: Console) -> None:
    held = "a part of the base" if plan.training.sharding == "full" else "the whole base"
    where = f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
    console.print(f"Each of the {plan.training.gpus} GPUs{where} holds {held} and needs this much.")
    if (micro_batches := plan.training.gradient_accumulation_steps) % plan.training.gpus:
        batch_size = plan.spec.training.batch_size
        found = f"gradientAccumulationSteps is {micro_batches}" if batch_size is None else f"batchSize is {batch_size}"
        console.print(
            f"training.{found}, which {plan.training.gpus} GPUs cannot share evenly: a multiple of them leaves none "
            "idle."
        )


def _show_gpu_sizes(memory: MemoryEstimate, console: Console) -> None:
    console.print(
        "\nVerdict by GPU (to choose one, --gpu; to give its memory, --gpu-memory or spec.resources.gpuMemory):"
    )
    for gpu in GPUS.values():
        if gpu.has_bfloat16:
            judged = verdict(memory, gpu.gib)
            console.print(f"  {gpu.name:<8} {gib_of_gpu(gpu.gib):>9}  [{COLORS[judged]}]{judged}[/]", highlight=False)
    console.print("A CPU computes in bfloat16, but an x86 processor without instructions for it in float32.")
    console.print("A CPU whose pod has room may keep activations, which this plan leaves out.")


def _show_verdict(job: MeasuredJob, gpu_gib: float, console: Console, *, rows_apart: bool) -> None:
    memory = job.estimate(job.training)
    judged = verdict(memory, gpu_gib)
    spare = room(memory, gpu_gib)
    left = f"{gib(spare)} GiB are left" if spare >= 0 else f"{gib(-spare)} GiB are missing"
    console.print(
        f"\n[bold {COLORS[judged]}]{judged}[/]: {MEANING[judged]} on a GPU of {gib_of_gpu(gpu_gib)}: of "
        f"{gib(budget(gpu_gib))} usable, {left}."
    )
    if judged == "fits" and not is_thin(memory, gpu_gib):
        if rows_apart:
            _show_larger(measure_further(job, job.with_larger), gpu_gib, console)
        return
    job = measure_further(job, job.with_smaller)
    if judged == "fits":
        _show_first_change(job, gpu_gib, memory.expected, console)
        return
    if (host_gib := memory_to_offload(job, gpu_gib)) is not None:
        given = job.spec.resources.memory
        pod = f"The pod has {given};" if given else "Pod memory unknown, as no --profile sets it; if less,"
        console.print(f"It fits if host memory holds the inputs of the blocks. {pod} set:")
        console.print(f"  spec.resources.memory: [bold]{host_gib}Gi[/]")
        return
    steps = advice(job.estimate, job.training, gpu_gib)
    if steps:
        _show_advice(steps, memory.expected, console)
    if steps and steps[-1].verdict == "fits":
        return
    more = more_gpus(job.estimate, job.training, gpu_gib)
    if more is not None:
        _show_more_gpus(more, console)
    elif job.training.fixed >= RUN_FIELDS:
        console.print("Only a larger GPU is sure to fit: a job with spec.continues cannot change these settings.")
    else:
        console.print("Even with all of this, only a larger GPU or a smaller model is sure to fit.")


def _show_more_gpus(step: Advice, console: Console) -> None:
    console.print("\n[bold]Or share the base among GPUs of this size:[/]")
    _show_changes(step, console)
    console.print(f"  {gib(step.expected)} GiB on each, [{COLORS[step.verdict]}]{step.verdict}[/]. {step.effect}")


def _show_larger(job: MeasuredJob, gpu_gib: float, console: Console) -> None:
    """Micro batches that make use of the memory that is left."""
    step = larger_micro_batch(job.estimate, job.training, gpu_gib)
    if step is None:
        return
    console.print("To train faster, with the same result:")
    _show_changes(step, console)
    console.print(f"  {gib(step.expected)} GiB, [{COLORS[step.verdict]}]{step.verdict}[/].")


def _show_first_change(job: MeasuredJob, gpu_gib: float, expected: int, console: Console) -> None:
    """The setting to change if the memory that is left turns out to be too little."""
    step = first_change(job.estimate, job.training, gpu_gib)
    if step is None:
        console.print("That is little, and no setting frees more: use a larger GPU.")
        return
    gain = gib(expected - step.expected)
    console.print(f"That is little. To free {gain} GiB more, first change:")
    _show_changes(step, console)
    console.print(f"  {step.effect}")


def _show_changes(step: Advice, console: Console) -> None:
    for change in step.changes:
        console.print(f"  spec.{change.setting}: {change.current} → [bold]{change.proposed}[/]")


def _show_advice(steps: tuple[Advice, ...], expected: int, console: Console) -> None:
    console.print("\n[bold]What to change, in this order:[/]")
    for number, step in enumerate(steps, start=1):
        for change in step.changes:
            console.print(f"  {number}. spec.{change.setting}: {change.current} → [bold]{change.proposed}[/]")
        console.print(
            f"     frees {gib(expected - step.expected)} GiB: {gib(step.expected)} GiB, "
            f"[{COLORS[step.verdict]}]{step.verdict}[/]. {step.effect}"
        )
        expected = step.expected


def gib(size: int) -> str:
    """The size in GiB, with two decimals."""
    return f"{size / GIB:.2f}"


def gib_of_gpu(size: float) -> str:
    """The memory of a GPU, rounded to a decimal."""
    return f"{round(size, 1):g} GiB"
