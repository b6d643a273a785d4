"""The run's metrics on disk: a JSON line per optimizer step and evaluation, and a table of them for people."""

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from qlora_trainer.core.file_names import HISTORY_FILE
from qlora_trainer.history.trackers import EventFiles


class MetricsLog:
    """Writes `report/metrics.jsonl`: a line per optimizer step and evaluation."""

    def __init__(self, folder: Path, length: int, event_files: EventFiles | None = None) -> None:
        """Open the file, cut to `length` bytes: steps after a checkpoint are repeated."""
        self._event_files = event_files
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = (folder / HISTORY_FILE).open("ab")
        self._file.truncate(min(length, self._file.tell()))

    def append(self, entry: Mapping[str, float]) -> None:
        """Add a line. Raises ValueError for a number that JSON cannot express."""
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._event_files is not None:
            self._event_files.log(int(entry["step"]), entry)

    def sync(self) -> int:
        """Make the lines durable, and return the file's bytes for the checkpoint."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        try:
            self._file.close()
        finally:
            if self._event_files is not None:
                self._event_files.close()


_KEYS = {
    "loss": "loss",
    "evaluation": "evalLoss",
    "learning_rate": "learningRate",
    "grad_norm": "gradNorm",
    "tokens_per_second": "tokensPerSecond",
    "memory": "memoryBytes",
    "reward_margin": "rewardMargin",
    "chosen_reward": "chosenReward",
    "accuracy": "accuracy",
    "eval_accuracy": "evalAccuracy",
}
"""The key in the file of each curve of MetricsHistory."""


@dataclass(frozen=True)
class Curve:
    """One measured quantity over optimizer steps."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def moving_average(self, span: float) -> tuple[float, ...]:
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
        """The middle value, or None for an empty curve."""
        return sorted(self.values)[len(self.values) // 2] if self.values else None


@dataclass(frozen=True)
class MetricsHistory:
    """The content of `metrics.jsonl`. An unmeasured quantity is an empty curve."""

    loss: Curve
    """Nats per target token, or per pair of answers, for each step."""
    evaluation: Curve
    """The same on the held-out rows, for each evaluation."""
    learning_rate: Curve
    grad_norm: Curve
    """Before it is clipped."""
    tokens_per_second: Curve
    memory: Curve
    """Bytes: the step's peak on a GPU, resident memory at its end on a CPU."""
    reward_margin: Curve = Curve()
    """With pairs: implicit reward of the chosen less that of the rejected, in nats."""
    chosen_reward: Curve = Curve()
    accuracy: Curve = Curve()
    """Share of the pairs with a positive margin, for each step."""
    eval_accuracy: Curve = Curve()
    """The same of the held-out pairs, for each evaluation."""

    def held_out_accuracy(self, step: int) -> float | None:
        """`eval_accuracy` at this optimizer step, or None if it was not measured."""
        return dict(zip(self.eval_accuracy.steps, self.eval_accuracy.values, strict=True)).get(step)

    @property
    def compares_answers(self) -> bool:
        """Whether the objective was one for pairs of answers."""
        return bool(self.reward_margin.steps)


def _entry(line: Mapping[str, float]) -> tuple[int, dict[str, float]]:
    """Step and quantities of a parsed line."""
    return int(line["step"]), {key: float(line[key]) for key in _KEYS.values() if key in line}


def read_history(metrics: Path) -> MetricsHistory:
    """Read the metrics. Raises ValueError, naming file and line, for other lines."""
    entries: list[tuple[int, dict[str, float]]] = []
    for number, line in enumerate(metrics.read_bytes().splitlines(), start=1):
        try:
            entries.append(_entry(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{metrics}:{number}: {error!r}") from error

    def curve(key: str) -> Curve:
        points = [(step, entry[key]) for step, entry in entries if key in entry]
        return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))

    return MetricsHistory(**{name: curve(key) for name, key in _KEYS.items()})


_COLUMNS = {
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "valid_loss": "evaluation",
    "valid_accuracy": "eval_accuracy",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}
"""The curve of each column of the table but the first, `step`."""


def metrics_table(history: MetricsHistory) -> bytes:
    """Return the metrics as CSV, a line per optimizer step; a quantity that was not measured is empty."""
    curves: list[Curve] = [getattr(history, name) for name in _COLUMNS.values()]
    columns = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["step", *_COLUMNS])
    for step in sorted({step for curve in curves for step in curve.steps}):
        lines.writerow([step, *(column.get(step) for column in columns)])
    return text.getvalue().encode()
