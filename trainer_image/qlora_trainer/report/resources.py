"""The resources of a run for the report: GPU time by attempt, expected memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_api.duration import format_duration as duration
from qlora_api.forecast import cost_text, hours_text
from qlora_api.status import MemoryStatus
from qlora_trainer.core.completion import AttemptUsage, RunUsage
from qlora_trainer.core.context import Device

_ENDS = {"succeeded": "trained to its end", "interrupted": "asked to stop", "failed": "failed", None: "killed"}


@dataclass(frozen=True)
class Resources:
    """The section of the report."""

    summary: str
    rows: Sequence[Sequence[str]]
    """A row for each attempt, in the order of the table's head, such as its start."""


def resources_used(usage: RunUsage, device: Device, price: str = "") -> Resources:
    """The section for that usage. `price`: of a GPU hour, such as `2.50 EUR`."""
    what = "GPU" if device == "cuda" else "processor"
    each = f"{usage.gpus} {what}{'' if usage.gpus == 1 else 's'}"
    used = usage.seconds * usage.gpus
    cost, lost = (_cost(seconds, price) for seconds in (used, usage.lost_seconds * usage.gpus))
    attempts = "1 attempt" if usage.count == 1 else f"{usage.count} attempts"
    summary = (
        f"{hours_text(used)} {what} hours{cost}: {attempts} on {each}, {duration(usage.seconds)} in all. Of that, "
        f"{duration(usage.startup_seconds)} went into loading, and {duration(usage.lost_seconds)} into work that an "
        f"interruption has undone{lost}."
    )
    return Resources(summary, [_row(attempt) for attempt in usage.attempts])


def _cost(seconds: float, price: str) -> str:
    """In parentheses, after a blank, or empty without a price."""
    amount, _, currency = price.partition(" ")
    return f" ({cost_text(seconds, amount, currency)})" if currency else ""


def _row(attempt: AttemptUsage) -> Sequence[str]:
    return (
        attempt.started_at,
        duration(attempt.seconds),
        "–" if attempt.startup_seconds is None else duration(attempt.startup_seconds),
        f"{attempt.from_step:,}",
        _ENDS[attempt.ended],
        duration(attempt.lost_seconds),
    )


def estimated_peaks(memory: MemoryStatus) -> dict[str, float]:
    """The estimate's expected and most bytes, by label, or none if unknown."""
    values = {"estimate": memory.estimate_bytes, "estimate, high": memory.high_bytes, "usable": memory.budget_bytes}
    return {label: float(value) for label, value in values.items() if value is not None}
