"""Shows a run's steps, time and cost before it is applied, as far as they are known."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TextIO

import click
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qlora_api.automatic import ASSUMED
from qlora_api.forecast import (
    UTILIZATIONS,
    cost_text,
    gpu_time_text,
    seconds_of_flops,
    sequences_for_steps,
    tokens_of_run,
    training_flops,
    wall_time_text,
)
from qlora_api.forecast import parse_price as parse_price_text
from qlora_api.gpus import find_gpu
from qlora_api.kubernetes_values import GPU_MEMORY, gibibytes
from qlora_api.profile import Profile
from qlora_api.profile_status import QLoRAProfileStatus
from qlora_api.spec.resolved import ResolvedSpec, ResolvedTraining
from qlora_api.steps import EVALUATIONS, FEW_STEPS, batch_text, optimizer_steps, remarks_on_steps
from qlora_cli.local.plan import MemoryPlan
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.model.families.family import Traits

_SECONDS = 3600
_DECIDE_LENGTH = frozenset({"epochs"})
_DECIDE_STEPS = _DECIDE_LENGTH | {"microBatchSize", "gradientAccumulationSteps", "maxSequenceLength"}


@dataclass(frozen=True)
class GpuOfPlan:
    """The GPU to plan for, as far as given."""

    gib: float | None = None
    """Its memory in GiB; None for that of the job."""
    tflops: float | None = None
    """Its speed in dense bfloat16, in 10^12 operations per second."""
    price: tuple[str, str] | None = None
    """Of one hour, and the currency."""
    label: str = "GPUs"
    host_memory: str | None = None
    """Of each train pod; None for that of the job."""


@dataclass(frozen=True)
class Epoch:
    """The amount of data of one epoch, as far as known."""

    tokens: int | None = None
    sequences: int | None = None


def gpu_of_plan(name: str | None, gib: float | None, tflops: float | None, price: tuple[str, str] | None) -> GpuOfPlan:
    """Return the GPU of that name, with what else is given. Raises StepFailure for one that cannot train."""
    if name is None:
        return GpuOfPlan(gib, tflops, price)
    try:
        gpu = find_gpu(name)
    except ValueError as error:
        raise bad_configuration(f"--{error}") from error
    return GpuOfPlan(gib or gpu.gib, tflops or gpu.tflops, price, gpu.label)


def parse_price(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, str] | None:
    """The price and the currency of --gpu-hour-price. Raises click.BadParameter."""
    if value is None:
        return None
    try:
        return parse_price_text(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_gpu_memory(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    """The GiB of --gpu-memory. Raises click.BadParameter."""
    if value is not None and not re.fullmatch(GPU_MEMORY, value, re.ASCII):
        raise click.BadParameter(f"found {value!r}, must be whole GiB up to 9999Gi, for example 24Gi")
    return None if value is None else gibibytes(value)


def gpu_of_profile(_context: click.Context, _parameter: click.Parameter, file: TextIO | None) -> GpuOfPlan:
    """Read memory, speed and price of a profile's GPU from its manifest. Raises click.BadParameter."""
    if file is None:
        return GpuOfPlan(None, None, None)
    try:
        content = YAML(typ="safe").load(file)
        # A newer release's profile may have fields that this one lacks.
        profile = Profile.model_validate(content["spec"], extra="ignore")
        status = QLoRAProfileStatus.model_validate(content.get("status") or {}, extra="ignore")
    except (YAMLError, ValidationError, LookupError, TypeError) as error:
        raise click.BadParameter(f"{file.name} is no QLoRAProfile: {error}") from None
    price = (profile.gpu_hour_price, profile.currency)
    memory = profile.gpu_memory or status.gpu_memory
    gib = None if memory is None or profile.device == "cpu" else gibibytes(memory)
    return GpuOfPlan(
        gib,
        profile.gpu_tflops,
        (price[0], price[1]) if price[0] and price[1] else None,
        host_memory=profile.resources.train.memory,
    )


def show_forecast(plan: MemoryPlan, epoch: Epoch, gpu: GpuOfPlan, console: Console) -> None:
    """Print the run's steps, learning rate and tokens, and its time if the GPU's speed is given."""
    assumed = {each.name for each in plan.settings if each.reason == ASSUMED}
    if assumed & _DECIDE_STEPS and plan.spec.training.max_steps is None:
        console.print("\n[bold]Steps[/]: the rows decide on the automatic settings: --data shows these and the steps.")
    else:
        show_steps(plan.spec, epoch, plan.traits, console)
    if gpu.tflops is not None and assumed & _DECIDE_LENGTH:
        _say(console, "unknown: the rows decide on the epochs; count them with --data, or set spec.training.epochs.")
    elif gpu.tflops is not None:
        _show_time(plan, plan.spec, epoch, gpu.tflops, gpu, console)


def show_steps(spec: ResolvedSpec, epoch: Epoch, traits: Traits, console: Console) -> None:
    """Print the run's steps, learning rate and tokens."""
    console.print()
    for line in _lines_of_steps(spec, epoch, packed=traits.packs(spec.training)):
        console.print(line, highlight=False, soft_wrap=True)


def _lines_of_steps(spec: ResolvedSpec, epoch: Epoch, *, packed: bool) -> Iterator[str]:
    training, least = spec.training, ""
    sequences = epoch.sequences
    if sequences is None and epoch.tokens is not None and packed:
        # As if each were full.
        sequences = ceil(epoch.tokens / training.max_sequence_length)
        least = "at least " if training.max_steps is None else ""
    if training.max_steps is None and sequences is None:
        yield f"[bold]Steps[/]: unknown; {_least_data(training, packed=packed)}. --data counts those of the job."
    else:
        sequences = sequences or 0
        steps = steps_of(training, sequences)
        yield f"[bold]Steps[/]: {least}{steps:,} = {_origin(training, sequences)}."
        for label, text in findings(spec, sequences, at_least=bool(least)):
            yield f"{label}: {escape(text)}."
    yield f"[bold]Learning rate[/]: {training.learning_rate:g}, {training.scheduler}."
    if epoch.tokens is not None:
        yield f"[bold]Tokens[/]: {epoch.tokens:,} in an epoch."


def steps_of(training: ResolvedTraining, sequences: int) -> int:
    """Count the optimizer steps of a run. `sequences`: of an epoch."""
    per_step = training.micro_batch_size * training.gradient_accumulation_steps
    return optimizer_steps(sequences, per_step, training.epochs, training.max_steps)


def findings(spec: ResolvedSpec, sequences: int, *, at_least: bool = False) -> Iterator[tuple[str, str]]:
    """Yield a label in color and a sentence for each problem of a run's steps.

    `sequences`: of an epoch, or `at_least` so many.
    """
    training, gpus = spec.training, spec.resources.gpu_count
    steps = steps_of(training, sequences)
    if not at_least and training.warmup_steps >= steps:
        warmup = f"spec.training.warmupSteps is {training.warmup_steps}"
        yield "[bold red]The job fails[/]", f"{warmup}, must be below the number of steps: lower it"
    for remark in remarks_on_steps(training, steps, sequences, gpus):
        # More steps have more evaluations.
        if not (at_least and remark.startswith(EVALUATIONS)):
            yield "[yellow]Remark[/]", remark


def _origin(training: ResolvedTraining, sequences: int) -> str:
    if training.max_steps is not None:
        return "spec.training.maxSteps"
    epochs = training.epochs or 1
    return f"{epochs} epoch{'s' * (epochs != 1)} × {sequences:,} sequences / {batch_text(training)}"


def _least_data(training: ResolvedTraining, *, packed: bool) -> str:
    """The data that is needed for enough steps."""
    sequences = sequences_for_steps(training, FEW_STEPS)
    if not packed:
        return f"{FEW_STEPS} take {sequences:,} rows or more"
    tokens = sequences * training.max_sequence_length
    return f"{FEW_STEPS} take some {tokens:,} tokens or more ({sequences:,} full sequences of an epoch)"


def _show_time(
    plan: MemoryPlan, spec: ResolvedSpec, epoch: Epoch, tflops: float, gpu: GpuOfPlan, console: Console
) -> None:
    tokens, at_most = tokens_of_run(spec.training, epoch.tokens, epoch.sequences)
    if plan.parameters is None:
        _say(console, "unknown: how many weights each token is multiplied by is not known for this model.")
        return
    if tokens is None:
        _say(console, "unknown: count the tokens of an epoch with --data, or give them with --tokens N.")
        return
    flops, gpus = training_flops(plan.parameters, tokens, plan.recomputed_share), spec.resources.gpu_count
    seconds = seconds_of_flops(flops, tflops)
    wall = wall_time_text(flops, tflops, gpus)
    cost = cost_text(seconds, *gpu.price) if gpu.price is not None else None
    low, high = UTILIZATIONS
    _say(
        console,
        f"{'at most ' if at_most else ''}{wall} on {gpus} {gpu.label}, {gpu_time_text(seconds)}"
        f"{f', {cost}' if cost else ''}: {tokens:,} tokens, if a GPU reaches {low:.0%} to {high:.0%} of {tflops:g} "
        "TFLOPS. Loading, evaluations and interruptions are not in it; after ten steps, status.forecast is of the "
        "run's own speed.",
    )
    budget = spec.budget.gpu_hours if spec.budget is not None else None
    if budget is not None and seconds > budget * _SECONDS:
        console.print(
            f"[yellow]Above the budget[/]: spec.budget.gpuHours is {budget:g}, at which the job stops at a checkpoint.",
            highlight=False,
            soft_wrap=True,
        )


def _say(console: Console, sentence: str) -> None:
    console.print(f"[bold]Forecast[/]: {sentence}", highlight=False, soft_wrap=True)
