"""Shows the GPU hours that a job is expected to take, and what they cost, before it is applied."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import click
from pydantic import ValidationError
from rich.console import Console
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qlora_api.forecast import (
    ASSUMED_UTILIZATION,
    cost_text,
    hours_of_flops,
    hours_text,
    tokens_of_run,
    training_flops,
)
from qlora_api.forecast import parse_price as parse_price_text
from qlora_api.kubernetes_values import GPU_MEMORY, gibibytes
from qlora_api.memory.model_shape import mixes_experts
from qlora_api.profile import Profile
from qlora_api.spec.job import QLoRAJobSpec
from qlora_cli.local.plan import MemoryPlan

_SECONDS = 3600


@dataclass(frozen=True)
class GpuOfPlan:
    """The GPU of the job's profile, and the amount of data, as far as given."""

    tflops: float | None = None
    """Its speed in dense bfloat16, in 10^12 operations per second."""
    price: tuple[str, str] | None = None
    """Of one hour, and the currency."""
    tokens: int | None = None
    """Of one epoch."""


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


def gpu_of_profile(
    _context: click.Context, _parameter: click.Parameter, file: TextIO | None
) -> tuple[float | None, tuple[str, str] | None]:
    """Read the speed and the price of a profile's GPU from its manifest. Raises click.BadParameter."""
    if file is None:
        return None, None
    try:
        content = YAML(typ="safe").load(file)
        # A newer release's profile may have fields that this one lacks.
        profile = Profile.model_validate(content["spec"], extra="ignore")
    except (YAMLError, ValidationError, LookupError, TypeError) as error:
        raise click.BadParameter(f"{file.name} is no QLoRAProfile: {error}") from None
    price = (profile.gpu_hour_price, profile.currency)
    return profile.gpu_tflops, (price[0], price[1]) if price[0] and price[1] else None


def show_forecast(plan: MemoryPlan, spec: QLoRAJobSpec, config: Path, gpu: GpuOfPlan, console: Console) -> None:
    """Print the run's GPU hours if the GPU's speed is given, or why they are unknown."""
    if gpu.tflops is None:
        return
    tokens, at_most = tokens_of_run(spec.training, gpu.tokens)
    if plan.parameters is None or mixes_experts(json.loads(config.read_bytes())):
        _say(console, "unknown: how many weights each token is multiplied by is not known for this model.")
        return
    if tokens is None:
        _say(console, "unknown: give the tokens of an epoch with --tokens N (status.dataset.tokens of an earlier job).")
        return
    seconds = hours_of_flops(training_flops(plan.parameters, tokens, spec.training), gpu.tflops) * _SECONDS
    cost = cost_text(seconds, *gpu.price) if gpu.price is not None else None
    _say(
        console,
        f"{'at most' if at_most else 'about'} {hours_text(seconds)} GPU hours{f', {cost}' if cost else ''}: {tokens:,} "
        f"tokens, if the GPU reaches {ASSUMED_UTILIZATION:.0%} of {gpu.tflops:g} TFLOPS. Loading, evaluations and "
        "interruptions are not in it; after ten steps, status.forecast is of the run's own speed.",
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
