"""The losses of a run over its optimizer steps, from what its trainer has written."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from qlora_api.contract import ProgressRecord

METRICS = "metrics.jsonl"
_FEW_POINTS = 20
_LATE_START = 20


@dataclass(frozen=True)
class LossHistory:
    """Losses by optimizer step, in their order."""

    training: Mapping[int, float] = field(default_factory=dict)
    """Nats per target token, or per pair if the objective compares answers."""
    held_out: Mapping[int, float] = field(default_factory=dict)
    """The same on the held-out rows, for each evaluation."""

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best evaluation, the earliest of equals; None without held-out rows."""
        return min(self.held_out.items(), key=lambda point: point[1], default=None)

    def suffices(self, total_steps: int) -> bool:
        """Whether a curve of it shows the run: it has its start, and as many points as a picture needs."""
        if not self.training:
            return False
        complete = len(self.training) >= min(_FEW_POINTS, total_steps)
        return complete and min(self.training) <= max(1, total_steps // _LATE_START)


def of_metrics(content: bytes) -> LossHistory:
    """What `metrics.jsonl` of a workspace holds: every step. Raises ValueError for a line that is none of it."""
    history = _Growing()
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            entry = json.loads(line)
            history.add(int(entry["step"]), _number(entry.get("loss")), _number(entry.get("evalLoss")))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{METRICS}:{number}: {error!r}") from None
    return history.finished()


def of_records(records: Iterable[ProgressRecord]) -> LossHistory:
    """What the trainer has reported in its logs: a point every few seconds.

    A record repeats the latest evaluation, so that one is taken for a new one if its loss differs from the one before.
    """
    history, latest = _Growing(), None
    for record in records:
        fresh = record.eval_loss if record.eval_loss != latest else None
        history.add(record.training_step, record.loss, fresh)
        latest = record.eval_loss
    return history.finished()


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is None or isfinite(number) else None


class _Growing:
    """Collects points. A step that comes again is one that a resumed run repeats, with all after it."""

    def __init__(self) -> None:
        self._training: dict[int, float] = {}
        self._held_out: dict[int, float] = {}

    def add(self, step: int, loss: float | None, eval_loss: float | None) -> None:
        if step < max(self._training, default=0):
            self._forget(step)
        if loss is not None and step > 0:
            self._training[step] = loss
        if eval_loss is not None:
            self._held_out[step] = eval_loss

    def _forget(self, step: int) -> None:
        for points in (self._training, self._held_out):
            for later in [each for each in points if each >= step]:
                del points[later]

    def finished(self) -> LossHistory:
        return LossHistory(dict(sorted(self._training.items())), dict(sorted(self._held_out.items())))
