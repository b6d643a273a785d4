"""The results of the study: one line of JSON for each run, appended when it has ended."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.machine import RESULTS

FILE = RESULTS / "quality.jsonl"
Targets = Literal["all-linear", "attention"]
Purpose = Literal["tuning", "main", "rank", "targets", "rows"]


@dataclass(frozen=True)
class Cell:
    """One run of the study: the inputs of its result, besides code and processor."""

    purpose: Purpose
    task: str
    arm: str
    seed: int
    learning_rate: float
    rank: int
    """Of the adapter; 0 without one."""
    targets: Targets
    rows: int
    """Rows that are trained on; 0 for the base that is not tuned."""

    @property
    def scored_on(self) -> Literal["validation", "held-out"]:
        """The set of the tuned model's prompts. Held-out rows take no part in its rate."""
        return "validation" if self.purpose == "tuning" else "held-out"


@dataclass(frozen=True)
class Run:
    """The result of a cell."""

    cell: Cell
    right: str
    """For each prompt of the scored set 1 if the answer is right, else 0."""
    loss: float
    """Mean over the tokens of the expected answers of the scored set, nats."""
    train_losses: tuple[float, ...]
    """Of each optimizer step, nats per target."""
    tokens: int
    """Trained on, over all epochs, prompts included."""
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
        """Return the run as its line: the score under the name of its measured set."""
        cell = asdict(self.cell)
        scores = {"validation": None, "held-out": None} | {self.cell.scored_on: round(self.score, 4)}
        rest = {name: value for name, value in asdict(self).items() if name not in ("cell", "right")}
        return {
            **cell,
            "validation_score": scores["validation"],
            "held_out_score": scores["held-out"],
            "right": self.right,
            **rest,
        }

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


def of_purpose(runs: Iterable[Run], *purposes: Purpose) -> list[Run]:
    """Those with one of these purposes."""
    return [run for run in runs if run.cell.purpose in purposes]
