"""Decides whether progress may stay unstored until a later reading replaces it."""

from datetime import datetime

from qlora_api.schema import replace
from qlora_api.status import ProgressStatus, QLoRAJobStatus
from qlora_api.usage import ForecastStatus, UsageStatus
from qlora_operator.decisions.observed.objects import parse_time

_FIGURES = (
    "step",
    "epoch",
    "loss",
    "reward_margin",
    "accuracy",
    "learning_rate",
    "tokens_per_second",
    "peak_memory_bytes",
    "goodput",
    "summary",
    "remaining",
    "remaining_seconds",
    "updated_at",
)
"""Of the progress: not the percentage, an evaluation, or a changed micro batch."""


def may_stay_unstored(stored: QLoRAJobStatus, status: QLoRAJobStatus, now: datetime, rest: float) -> bool:
    """Whether only running figures differ from the stored ones, which are younger than `rest` seconds.

    Each write of a status costs the API server five times as much as the reading of a log. News that
    a user waits for is stored with the reading: the first step, each percent, an evaluation, a checkpoint, a condition.
    """
    progress, step, before = status.progress, status.step, stored.step
    if progress is None or stored.progress is None or not stored.progress.step:
        return False
    if step is None or before is None or before.progressed_at is None:
        return False
    if (now - parse_time(before.progressed_at)).total_seconds() >= rest:
        return False
    rest_of_it = replace(
        status,
        progress=_without_figures(progress, stored.progress),
        history=stored.history,
        step=replace(step, progressed_at=before.progressed_at, reported_at=before.reported_at),
        usage=_without_running_seconds(status.usage, stored.usage),
        forecast=_without_amount(status.forecast, stored.forecast),
    )
    return rest_of_it == stored


def _without_figures(progress: ProgressStatus, stored: ProgressStatus) -> ProgressStatus:
    return replace(progress, **{name: getattr(stored, name) for name in _FIGURES})


def _without_running_seconds(usage: UsageStatus | None, stored: UsageStatus | None) -> UsageStatus | None:
    """Return the usage with the seconds of the stored one, if it has the same pods."""
    if usage is None or stored is None or len(usage.pods) != len(stored.pods):
        return usage
    pods = (replace(entry, seconds=old.seconds) for entry, old in zip(usage.pods, stored.pods, strict=True))
    sums = replace(usage, gpu_seconds=stored.gpu_seconds, cost=stored.cost)
    return replace(sums, pods=tuple(pods))


def _without_amount(forecast: ForecastStatus | None, stored: ForecastStatus | None) -> ForecastStatus | None:
    if forecast is None or stored is None:
        return forecast
    return replace(forecast, gpu_hours=stored.gpu_hours, cost=stored.cost)
