"""Reads back the metrics that training left, one line an optimizer step and one an evaluation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

_Quantity = Literal["loss", "evalLoss", "learningRate", "gradNorm", "tokensPerSecond", "memoryBytes"]


@dataclass(frozen=True)
class Curve:
    """One measured quantity over optimizer steps."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def smoothed(self, span: float) -> tuple[float, ...]:
        """The exponential moving average over about `span` points, without the bias towards its start.

        Source: the bias correction of Adam, arXiv 1412.6980, section 3.
        """
        weight = 2 / (span + 1)
        mean, total, result = 0.0, 0.0, []
        for value in self.values:
            mean += weight * (value - mean)
            total += weight * (1 - total)
            result.append(mean / total)
        return tuple(result)

    @property
    def median(self) -> float | None:
        """The middle value; None of nothing."""
        return sorted(self.values)[len(self.values) // 2] if self.values else None


@dataclass(frozen=True)
class History:
    """What `metrics.jsonl` says. A quantity that a run did not measure is an empty curve."""

    loss: Curve
    """Nats a target token, of each step."""
    evaluation: Curve
    """The same on the held-out rows, of each evaluation."""
    learning_rate: Curve
    grad_norm: Curve
    """Before it is clipped."""
    tokens_per_second: Curve
    memory: Curve
    """Bytes: the peak of the step on a GPU; on a CPU what the process held then."""


def _entry(line: Any) -> tuple[int, dict[str, float]]:
    """Step and quantities of a parsed line."""
    return int(line["step"]), {key: float(line[key]) for key in get_args(_Quantity) if key in line}


def read_history(metrics: Path) -> History:
    """Read the metrics. Raises ValueError, naming file and line, for a line that is no metric."""
    entries: list[tuple[int, dict[str, float]]] = []
    for number, line in enumerate(metrics.read_bytes().splitlines(), start=1):
        try:
            entries.append(_entry(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{metrics}:{number}: {error!r}") from error

    def curve(key: _Quantity) -> Curve:
        points = [(step, entry[key]) for step, entry in entries if key in entry]
        return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))

    return History(
        loss=curve("loss"),
        evaluation=curve("evalLoss"),
        learning_rate=curve("learningRate"),
        grad_norm=curve("gradNorm"),
        tokens_per_second=curve("tokensPerSecond"),
        memory=curve("memoryBytes"),
    )
