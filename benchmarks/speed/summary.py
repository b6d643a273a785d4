"""Turns measurements into the figures of the comparison, next to the targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.speed.settings import SystemName

Measured = Mapping[str, Any]
"""A worker's result, with `evalLosses`: the evaluation loss after each step that has a snapshot."""

WARM_UP_STEPS = 1
"""The first step has one-time costs; it does not count in the speed."""
MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """A system's figures: medians over its repetitions."""

    tokens_per_second: float
    """Useful tokens, in the steady state."""
    peak_bytes: int
    """Peak, loading included."""
    loaded_bytes: int
    """Resident before the first forward pass."""
    above_loaded_bytes: int
    """Peak of training beyond that."""
    seconds_to_target: float | None
    """Training time, without loading and evaluation, until the evaluation loss was reached."""


def figures(repetitions: Sequence[Measured], base_loss: float, target_loss: float) -> Figures:
    """Return one system's figures. All start at `base_loss`, without an adapter."""
    times = [seconds_to(target_loss, base_loss, measured) for measured in repetitions]
    reached = [seconds for seconds in times if seconds is not None]
    return Figures(
        tokens_per_second=median(map(tokens_per_second, repetitions)),
        peak_bytes=int(median(measured["peakBytes"] for measured in repetitions)),
        loaded_bytes=int(median(measured["loaded"]["residentBytes"] for measured in repetitions)),
        above_loaded_bytes=int(
            median(measured["steps"][-1]["peakBytes"] - measured["loaded"]["residentBytes"] for measured in repetitions)
        ),
        seconds_to_target=median(reached) if len(reached) == len(times) else None,
    )


def tokens_per_second(measured: Measured) -> float:
    """Useful tokens per second of wall time, after the warm-up."""
    warm_up, *_, last = measured["steps"][WARM_UP_STEPS - 1 :]
    tokens = sum(step["tokens"] for step in measured["steps"][WARM_UP_STEPS:])
    return float(tokens / (last["seconds"] - warm_up["seconds"]))


def seconds_to(target_loss: float, base_loss: float, measured: Measured) -> float | None:
    """Training time until the evaluation loss was `target_loss`; None if it was not reached.

    Between two snapshots the loss is taken to fall along a line; before the first one, from `base_loss`.
    """
    if base_loss <= target_loss:
        return 0.0
    before, loss_before = 0.0, base_loss
    for step, loss in measured["evalLosses"].items():
        seconds = float(measured["steps"][int(step) - 1]["seconds"])
        if loss <= target_loss:
            return float(before + (seconds - before) * (loss_before - target_loss) / (loss_before - loss))
        before, loss_before = seconds, loss
    return None


@dataclass(frozen=True)
class Comparison:
    """A figure of this trainer over another system's, and its target."""

    what: str
    value: float
    target: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value >= self.target if self.at_least else self.value <= self.target


def compare(all_figures: Mapping[SystemName, Figures]) -> list[Comparison]:
    """The targets for the measured systems."""
    if not {"ours", "trl", "trl-packing"} <= all_figures.keys():
        return []
    ours, default, packing = all_figures["ours"], all_figures["trl"], all_figures["trl-packing"]
    return [
        Comparison("useful tokens/s over TRL default", ours.tokens_per_second / default.tokens_per_second, 3.0, True),
        Comparison(
            "useful tokens/s over TRL with packing", ours.tokens_per_second / packing.tokens_per_second, 2.0, True
        ),
        Comparison("peak memory over TRL default", ours.peak_bytes / default.peak_bytes, 0.4, False),
        Comparison(
            "memory above loading over TRL with packing",
            ours.above_loaded_bytes / packing.above_loaded_bytes,
            0.4,
            False,
        ),
    ]


def table(all_figures: Mapping[SystemName, Figures], comparisons: Sequence[Comparison]) -> str:
    """Both as Markdown."""
    lines = [
        "| system | useful tokens/s | peak MiB | MiB after loading | MiB above that | seconds to the loss |",
        "|---|---|---|---|---|---|",
        *(_row(name, system) for name, system in all_figures.items()),
    ]
    if comparisons:
        lines += ["", "| this trainer's | measured | target | |", "|---|---|---|---|"]
        lines += [
            f"| {one.what} | {one.value:.2f} | {'≥' if one.at_least else '≤'} {one.target} | "
            f"{'met' if one.met else 'missed'} |"
            for one in comparisons
        ]
    return "\n".join(lines)


def _row(name: str, system: Figures) -> str:
    seconds = "not reached" if system.seconds_to_target is None else f"{system.seconds_to_target:.0f}"
    cells = [
        name,
        f"{system.tokens_per_second:.0f}",
        *(f"{size / MIB:.0f}" for size in (system.peak_bytes, system.loaded_bytes, system.above_loaded_bytes)),
        seconds,
    ]
    return f"| {' | '.join(cells)} |"
