"""The results of the study: one line of JSON for each run, appended when it has ended."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.machine import RESULTS
from benchmarks.tuning import Arm

FILE = RESULTS / "quality.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run of the study: the inputs of its result, besides code and processor."""

    purpose: Literal["tuning", "main"]
    """A run that tunes the rate is scored on the validation set, and another on the held-out set."""
    task: str
    arm: Arm
    seed: int
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Run:
    """The result of a cell."""

    cell: Cell
    right: str
    """For each prompt of the scored set 1 if each token of the answer is the likeliest, else 0."""
    generated: str
    """The same for answers that were generated, to the first prompts of the held-out set."""
    loss: float
    """Mean over the tokens of the expected answers of the scored set, nats."""
    earlier_loss: float | None
    """That of a tuning run after three quarters of the steps."""
    earlier_score: float | None
    """The share of right answers then."""
    train_losses: tuple[float, ...]
    """Means of ten optimizer steps each, nats per target."""
    epochs: float
    seconds: float
    processor_seconds: float
    commit: str | None
    changed: bool | None
    """Whether a tracked file differed from the commit."""
    processor: str

    @property
    def score(self) -> float:
        """The share of right answers, 0 to 1."""
        return self.right.count("1") / len(self.right)

    def dump(self) -> dict[str, Any]:
        """Return the run as its line, with the score for readers."""
        rest = {name: value for name, value in asdict(self).items() if name != "cell"}
        return {**asdict(self.cell), "score": round(self.score, 4), **rest}

    @classmethod
    def load(cls, line: str) -> "Run":
        """The run of a line. Raises ValueError or KeyError if it is none."""
        found = json.loads(line)
        cell = Cell(**{name: found[name] for name in Cell.__dataclass_fields__})
        own = {name: found[name] for name in cls.__dataclass_fields__ if name != "cell"}
        return cls(cell, **{**own, "train_losses": tuple(own["train_losses"])})


def read_runs(path: Path = FILE) -> list[Run]:
    """The runs of a file, in order; none without a file."""
    return [Run.load(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_run(run: Run, path: Path = FILE) -> None:
    """Add a run as a single write, so that lines of several processes do not mix."""
    line = json.dumps(run.dump()) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)
