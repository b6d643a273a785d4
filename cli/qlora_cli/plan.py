"""Shows the GPU memory that a job needs: by component, compared with the GPU, and what to change if it does not fit."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qlora_api.contract import ExitCode
from qlora_api.memory.advice import Advice, advice, budget, first_change, is_thin, room, verdict
from qlora_api.memory.estimate import GIB, TrainingShape, estimate
from qlora_api.memory.model_shape import ModelShape
from qlora_api.model_and_output import BaseModelSpec
from qlora_api.sources import HubSource, VolumeSource, parse_source
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import bad_configuration, model_unavailable, unreachable
from qlora_trainer.model.memory_fit import read_shape, training_shape

_GPU_SIZES_GIB = (16, 24, 32, 40, 48, 80, 96, 141)
_COLORS = {"fits": "green", "tight": "yellow", "exceeds": "red"}
_MEANING = {
    "fits": "the run fits",
    "tight": "the run may fit, or may run out of memory,",
    "exceeds": "the run cannot fit",
}


@dataclass(frozen=True)
class MemoryPlan:
    """What decides the memory of a job, and the memory of the GPU that it runs on, in GiB; None if it is not given."""

    title: str
    model: ModelShape
    training: TrainingShape
    gpu_gib: int | None
    nodes: int = 1

    @property
    def exit_code(self) -> ExitCode:
        """DOES_NOT_FIT if `prepare` would reject the job, else DONE."""
        if self.gpu_gib is None or verdict(estimate(self.model, self.training), self.gpu_gib) != "exceeds":
            return ExitCode.DONE
        return ExitCode.DOES_NOT_FIT


def make_plan(name: str, spec: QLoRAJobSpec, config: Path, gpu_gib: int | None) -> MemoryPlan:
    """The plan of a job whose model has this config.json. Raises StepFailure if the model is not supported."""
    return MemoryPlan(
        title=f"{name}: {spec.model.source}, rank {spec.lora.rank}, "
        f"{spec.training.micro_batch_size} × {spec.training.max_sequence_length} tokens",
        model=read_shape(config),
        training=training_shape(spec, spec.lora.target_modules),
        gpu_gib=gpu_gib if gpu_gib is not None else spec.resources.gpu_memory,
        nodes=spec.resources.node_count,
    )


def find_config(model: BaseModelSpec, mounts: Mounts) -> Path:
    """The model's config.json, on a volume or fetched from the hub. Raises StepFailure if it cannot be read."""
    source = parse_source(model.source)
    if isinstance(source, VolumeSource):
        if source.claim not in mounts.claims:
            raise bad_configuration(
                f"spec.model.source is {model.source}: give a folder for the claim with --volume {source.claim}=DIR, "
                "or the model's config.json with --config FILE"
            )
        config = mounts.volume(source) / "config.json"
        if not config.is_file():
            raise model_unavailable(f"{config} does not exist: {model.source} holds no transformers model")
        return config
    if not isinstance(source, HubSource):
        raise bad_configuration(
            f"spec.model.source is {model.source}, which this command does not download: "
            "give the model's config.json with --config FILE"
        )
    return _fetch_config(source, model)


def _fetch_config(source: HubSource, model: BaseModelSpec) -> Path:
    offline = "or give the model's config.json with --config FILE"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
    except ImportError as missing:
        raise bad_configuration(
            f"the Hugging Face client is not installed: install qlora-operator[cli,trainer], {offline}"
        ) from missing
    try:
        return Path(hf_hub_download(source.repository, "config.json", revision=model.revision))
    except HFValidationError as error:
        raise bad_configuration(f"spec.model.source is {model.source}: {error}") from error
    except HfHubHTTPError as error:
        raise model_unavailable(
            f"{model.source} cannot be read: {str(error).splitlines()[0]} Check the name, log in with `hf auth login`, "
            f"{offline}"
        ) from error
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise unreachable(f"the hub cannot be reached for {model.source}: try again, {offline}") from error


def show_plan(plan: MemoryPlan, console: Console) -> None:
    """Print the estimate by component, its range, and the verdict with the settings to change."""
    memory = estimate(plan.model, plan.training)
    table = Table(title=plan.title, title_justify="left", title_style="bold", show_footer=True)
    table.add_column("GPU memory", footer="Expected peak")
    table.add_column("GiB", justify="right", footer=_gib(memory.expected))
    table.add_column("", style="dim")
    for component in memory.components():
        if not component.size:
            continue
        note = "" if component.at_peak else "not at the peak"
        table.add_row(component.label, _gib(component.size), note, style=None if component.at_peak else "dim")
    console.print(table)
    console.print(
        f"Low {_gib(memory.low)}, expected {_gib(memory.expected)}, high {_gib(memory.high)} GiB. "
        "Low assumes that the optimizer's pages are in host memory."
    )
    if plan.training.gpus > 1:
        held = "a part of the base" if plan.training.sharding == "full" else "the whole base"
        where = f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
        console.print(f"Each of the {plan.training.gpus} GPUs{where} holds {held} and needs this much.")
        if (micro_batches := plan.training.gradient_accumulation_steps) % plan.training.gpus:
            console.print(
                f"training.gradientAccumulationSteps is {micro_batches}, which {plan.training.gpus} GPUs cannot share "
                "evenly: a multiple of them leaves none idle."
            )
    if plan.gpu_gib is None:
        _show_gpu_sizes(plan, console)
    else:
        _show_verdict(plan, plan.gpu_gib, console)


def _show_gpu_sizes(plan: MemoryPlan, console: Console) -> None:
    memory = estimate(plan.model, plan.training)
    console.print("\nVerdict by GPU memory in GiB (to choose one, set spec.resources.gpuMemory or --gpu-memory):")
    for size in _GPU_SIZES_GIB:
        judged = verdict(memory, size)
        console.print(f"  {size:>4}  [{_COLORS[judged]}]{judged}[/]")


def _show_verdict(plan: MemoryPlan, gpu_gib: int, console: Console) -> None:
    memory = estimate(plan.model, plan.training)
    judged = verdict(memory, gpu_gib)
    spare = room(memory, gpu_gib)
    left = f"{_gib(spare)} GiB are left" if spare >= 0 else f"{_gib(-spare)} GiB are missing"
    console.print(
        f"\n[bold {_COLORS[judged]}]{judged}[/]: {_MEANING[judged]} on a GPU of {gpu_gib} GiB: of "
        f"{_gib(budget(gpu_gib))} usable, {left}."
    )
    if judged == "fits":
        if is_thin(memory, gpu_gib):
            _show_first_change(plan, gpu_gib, memory.expected, console)
        return
    steps = advice(plan.model, plan.training, gpu_gib)
    if steps:
        _show_advice(steps, memory.expected, console)
    if not steps or steps[-1].verdict != "fits":
        console.print("Even with all of this, only a larger GPU or a smaller model is sure to fit.")


def _show_first_change(plan: MemoryPlan, gpu_gib: int, expected: int, console: Console) -> None:
    """The setting to change if the memory that is left turns out to be too little."""
    step = first_change(plan.model, plan.training, gpu_gib)
    if step is None:
        console.print("That is little, and no setting frees more: use a larger GPU.")
        return
    gain = _gib(expected - step.expected)
    console.print(f"That is little. To free {gain} GiB more, first change:")
    for change in step.changes:
        console.print(f"  spec.{change.setting}: {change.current} → [bold]{change.proposed}[/]")
    console.print(f"  {step.effect}")


def _show_advice(steps: tuple[Advice, ...], expected: int, console: Console) -> None:
    console.print("\n[bold]What to change, in this order:[/]")
    for number, step in enumerate(steps, start=1):
        for change in step.changes:
            console.print(f"  {number}. spec.{change.setting}: {change.current} → [bold]{change.proposed}[/]")
        console.print(
            f"     frees {_gib(expected - step.expected)} GiB: {_gib(step.expected)} GiB, "
            f"[{_COLORS[step.verdict]}]{step.verdict}[/]. {step.effect}"
        )
        expected = step.expected


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
