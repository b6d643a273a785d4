"""Compares automatic settings with hand-tuned ones and the rules of others, on tasks of different nature and size.

A cell is a task with settings, and an entry of `results/defaults.json`. A cell with an entry is not repeated, so the
benchmark can be stopped at any time and continued by the same command; a changed rule repeats what it changes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.defaults.arms import AUTOMATIC, FIXED, HAND, Facts, Settings, automatic, by_hand
from benchmarks.defaults.summary import BASE, COMMAND, NAME, tables
from benchmarks.defaults.tasks import TASKS, Task, sets_of
from benchmarks.machine import RESULTS, ROOT, describe_machine, write_result
from benchmarks.operator import table
from examples.demo.__main__ import model_folder
from qlora_api.choice import Choice
from qlora_trainer.core.cpu import library_settings

PAGE = ROOT / "docs" / "trainer" / "automatic-settings.md"
ARMS = (BASE, AUTOMATIC, HAND, *FIXED)


@dataclass(frozen=True)
class Cell:
    """A task with the settings of an arm; the base has none."""

    task: Task
    arm: str
    settings: Settings | None
    choices: tuple[Choice, ...] = ()

    @property
    def key(self) -> str:
        """A name by content: the rows and the settings."""
        sets, settings = sets_of(self.task), self.settings
        content = [sets.train, sets.validation, sets.held_out, None if settings is None else asdict(settings)]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """The results on disk: an entry for each task, arm and content."""

    def __init__(self, folder: Path) -> None:
        """Read the results so far."""
        self._file = folder / f"{NAME}.json"
        self.cells: list[dict[str, Any]] = self.load()["cells"] if self._file.exists() else []

    def load(self) -> dict[str, Any]:
        """Return the content of the file."""
        return dict(json.loads(self._file.read_text()))

    def has(self, cell: Cell) -> bool:
        """Whether the cell with this content has been run."""
        wanted = (cell.task.name, cell.arm, cell.key)
        return any((each["task"], each["arm"], each["key"]) == wanted for each in self.cells)

    def tried(self, task: Task) -> dict[Settings, float]:
        """The settings that the tuner by hand has tried, with the loss on the validation rows."""
        return {
            Settings(**each["settings"]): each["validation"]["loss"]
            for each in self.cells
            if (each["task"], each["arm"]) == (task.name, HAND)
        }

    def add(self, cell: Cell, figures: dict[str, Any]) -> None:
        """Write an entry. It replaces an earlier one of its task and arm, unless the arm tries several."""
        of_arm = (cell.task.name, cell.arm)
        if cell.arm != HAND:
            self.cells = [each for each in self.cells if (each["task"], each["arm"]) != of_arm]
        entry: dict[str, Any] = {"task": cell.task.name, "arm": cell.arm, "key": cell.key}
        entry |= {} if cell.settings is None else {"settings": asdict(cell.settings)}
        entry |= {"choices": [choice.dump() for choice in cell.choices]} if cell.choices else {}
        self.cells.append(entry | figures)
        write_result(NAME, {"machine": describe_machine(), "cells": self.cells}, self._file.parent)


def main() -> int:
    """Run the remaining cells; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    parser.add_argument("--task", action="append", choices=TASKS, help="only this task; may be repeated")
    parser.add_argument("--arm", action="append", choices=ARMS, help="only this arm; may be repeated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    results = Results(options.output)
    if options.minutes > 0:
        _run(results, options.task or list(TASKS), options.arm or ARMS, options.minutes)
    if options.output == RESULTS:
        table.write(NAME, tables(results.load()), PAGE, COMMAND)
    print(tables(results.load()))
    return 0


def _run(results: Results, tasks: list[str], arms: tuple[str, ...], minutes: float) -> None:
    """Run one cell after the other, and write each result immediately."""
    os.environ |= library_settings(os.environ)
    import torch

    from benchmarks.defaults.cell import Place, facts, run_cell
    from benchmarks.tuning.attention import use_short_rows
    from benchmarks.tuning.data import without_chat_template
    from qlora_api.spec.training import LoraSpec
    from qlora_trainer.model.families.inspection import inspect_family

    # Rounding depends on the number of threads.
    torch.set_num_threads(1)
    use_short_rows()
    began, chat = time.monotonic(), model_folder()
    with tempfile.TemporaryDirectory(prefix="qlora-defaults-") as scratch:
        plain = without_chat_template(chat, Path(scratch) / "model")
        place = Place(chat, plain, Path(scratch) / "bases")
        sizes = inspect_family(chat, LoraSpec()).sizes
        if sizes is None:
            raise AssertionError("the sizes of a model whose weights are here are known")
        for task in map(TASKS.__getitem__, tasks):
            counted = facts(task, place.model(task), sizes)
            for arm in arms:
                while (cell := _next(results, task, arm, counted)) is not None:
                    if time.monotonic() - began > 60 * minutes:
                        return
                    figures = run_cell(task, cell.settings, place)
                    results.add(cell, figures)
                    print(f"{task.name} {arm} {cell.settings}: {_shown(figures)}", flush=True)


def _next(results: Results, task: Task, arm: str, counted: Facts) -> Cell | None:
    """Return the next cell of a task and an arm that has no result."""
    if arm == HAND:
        tuned = by_hand(task, counted.steps, results.tried(task))
        return None if tuned is None else Cell(task, arm, tuned)
    if arm == AUTOMATIC:
        cell = Cell(task, arm, *automatic(task, counted))
    else:
        cell = Cell(task, arm, FIXED[arm](task) if arm in FIXED else None)
    return None if results.has(cell) else cell


def _shown(figures: dict[str, Any]) -> str:
    found, steps = figures["heldOut"], figures.get("steps", 0)
    return f"{steps} steps, {found['loss']} and {found['score']:.2f} held out, {figures['processorSeconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
