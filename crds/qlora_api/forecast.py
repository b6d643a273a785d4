"""Forecasts the GPU hours of a run from its operations, and their cost.

Operator, trainer and command line share it.

Operations for each token and weight, after Kaplan et al. (arXiv 2001.08361, section 2.1): 2 in the forward pass, and in
the backward pass 2 for the gradients of the activations and 2 for those of the weights. The weights of the base are
frozen, and need none. Gradient checkpointing computes the forward pass a second time (Chen et al., arXiv 1604.06174).
Attention's scores and the adapter itself, a few percent of the whole, are left out.
"""

import re
from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Context, Decimal, localcontext
from math import ceil

from qlora_api.duration import format_duration
from qlora_api.profile import PRICE
from qlora_api.spec.resolved import ResolvedTraining
from qlora_api.usage import ForecastStatus

ASSUMED_UTILIZATION = 0.3
"""Share of a GPU's speed that a run is assumed to reach, in the operations above.

The profile that Qwen publishes of its own Q-LoRA (4-bit GPTQ, 7.7B weights, gradient checkpointing, one A100 of 312
TFLOPS; README of QwenLM/Qwen, "Profiling of Memory and Speed") comes to 0.20 with sequences of 512 tokens, 0.35 with
1,024 and 2,048, and 0.42 with 4,096. A forecast, no promise: it is replaced by the run's own speed once that is known.
"""
UTILIZATIONS = (0.2, 0.42)
"""The lowest and the highest share in that profile."""
_SECONDS = 3600
_MINUTE = 60
_FEW_SECONDS = 360
_CENT = Decimal("0.01")
_DIGITS = Context(prec=100)
"""With more digits than the largest forecast at the highest price has: rounding to cents needs all of them."""
_PRICE = re.compile(rf"({PRICE.removeprefix('^').removesuffix('$')}) ([A-Za-z]{{1,8}})")


def training_flops(parameters: int, tokens: int, recomputed_share: float) -> float:
    """Return the floating-point operations to train on so many tokens.

    `parameters`: weights that each token is multiplied by. `recomputed_share`: of the blocks.
    """
    passes = 2 + recomputed_share
    return 2.0 * passes * parameters * tokens


def forecast_of_flops(flops: float, gpu_tflops: float, price: str | None, currency: str | None) -> ForecastStatus:
    """Return the GPU hours for so many operations, on any number of GPUs of that speed, and their cost.

    They are at the assumed utilization. `price`: of an hour.
    """
    seconds = seconds_of_flops(flops, gpu_tflops)
    return ForecastStatus(
        gpu_hours=hours_text(seconds),
        basis="Flops",
        utilization=ASSUMED_UTILIZATION,
        cost=cost_text(seconds, price, currency),
    )


def seconds_of_flops(flops: float, gpu_tflops: float, utilization: float = ASSUMED_UTILIZATION) -> float:
    """Return the GPU seconds for so many operations."""
    return flops / (gpu_tflops * 1e12 * utilization)


def wall_seconds(flops: float, gpu_tflops: float, gpus: int) -> tuple[float, float]:
    """Return the shortest and the longest time that so many GPUs are expected to take."""
    longest, shortest = (seconds_of_flops(flops, gpu_tflops, share) / gpus for share in UTILIZATIONS)
    return shortest, longest


def wall_time_text(flops: float, gpu_tflops: float, gpus: int) -> str:
    """Format the range of `wall_seconds`."""
    shortest, longest = wall_seconds(flops, gpu_tflops, gpus)
    if longest < _MINUTE:
        return "less than a minute"
    return f"{format_duration(shortest)} to {format_duration(longest)}"


def tokens_of_run(
    training: ResolvedTraining, of_epoch: int | None, sequences: int | None = None
) -> tuple[int | None, bool]:
    """Return the tokens of a run, None if unknown, and whether they are a maximum.

    `of_epoch` and `sequences`: of one epoch, None if unknown. A number of steps is a bound by itself.
    """
    if training.max_steps is None:
        return None if of_epoch is None else of_epoch * (training.epochs or 1), False
    drawn = training.max_steps * training.micro_batch_size * training.gradient_accumulation_steps
    if of_epoch is None or not sequences:
        return drawn * training.max_sequence_length, True
    return round(of_epoch * drawn / sequences), False


def sequences_for_steps(training: ResolvedTraining, steps: int) -> int:
    """Return the least sequences of an epoch that make so many steps in the run."""
    per_step = training.micro_batch_size * training.gradient_accumulation_steps
    return (ceil(steps / (training.epochs or 1)) - 1) * per_step + 1


def parse_price(text: str) -> tuple[str, str]:
    """The price and the currency in a text such as `2.50 EUR`. Raises ValueError."""
    found = _PRICE.fullmatch(text)
    if found is None:
        raise ValueError(f"found {text!r}, must be a price and its currency, for example '2.50 EUR'")
    return found[1], found[3]


def hours_text(seconds: float) -> str:
    """GPU seconds as GPU hours with two decimals."""
    with localcontext(_DIGITS):
        return str((Decimal(seconds) / _SECONDS).quantize(_CENT, ROUND_HALF_UP))


def gpu_time_text(seconds: float) -> str:
    """GPU seconds in hours, or if they are few in minutes, as an estimate."""
    if seconds < _MINUTE:
        return "less than 1 GPU minute"
    if seconds < _FEW_SECONDS:
        return f"about {seconds / _MINUTE:.1f} GPU minutes"
    return f"about {hours_text(seconds)} GPU hours"


def cost_text(seconds: float, price: str | None, currency: str | None) -> str | None:
    """Format the cost of GPU seconds with two decimals and the currency.

    `price`: of an hour. Returns None without a price.
    """
    if price is None or currency is None:
        return None
    with localcontext(_DIGITS):
        return f"{(Decimal(seconds) * Decimal(price) / _SECONDS).quantize(_CENT, ROUND_HALF_UP)} {currency}"


def sum_of_costs(costs: Iterable[str | None]) -> str | None:
    """Sum costs formatted by `cost_text`.

    Returns None if there are none, or in several currencies.
    """
    amounts = [cost.split() for cost in costs if cost is not None]
    currencies = {currency for _, currency in amounts}
    if len(currencies) != 1:
        return None
    with localcontext(_DIGITS):
        return f"{sum((Decimal(amount) for amount, _ in amounts), Decimal())} {currencies.pop()}"
