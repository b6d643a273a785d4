"""Makes the tables of the documentation from the results: each arm's share of what the tuner by hand reaches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.defaults.arms import AUTOMATIC, FIXED, HAND
from benchmarks.defaults.tasks import TASKS
from benchmarks.operator.table import head, row

NAME, COMMAND = "defaults", "benchmarks.defaults"
BASE = "base"
AVERAGE, WORST = 0.95, 0.85
"""The least shares that automatic settings should reach."""
TITLES = {
    AUTOMATIC: "Automatic",
    "openai": "OpenAI's rule",
    "unsloth": "Unsloth's notebooks",
    "trl": "TRL's defaults",
    "former": "Fixed settings of the QLoRA paper",
}
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Share:
    """An arm's part of what the tuner by hand reaches on the held-out rows of a task."""

    drop: float
    """Of the fall of the loss below the base's."""
    score: float


def tuned(cells: Sequence[Cell], task: str) -> Cell | None:
    """The cell that the tuner by hand chooses by the validation rows, None before the first."""
    of_task = [cell for cell in cells if (cell["task"], cell["arm"]) == (task, HAND)]
    return min(of_task, key=lambda cell: float(cell["validation"]["loss"]), default=None)


def share(cells: Sequence[Cell], task: str, arm: str) -> Share | None:
    """Return an arm's share on a task, or None if a cell is missing."""
    base, found, best = _only(cells, task, BASE), _only(cells, task, arm), tuned(cells, task)
    if base is None or found is None or best is None:
        return None
    before, after, reached = (cell["heldOut"]["loss"] for cell in (base, found, best))
    return Share((before - after) / (before - reached), found["heldOut"]["score"] / max(1e-9, best["heldOut"]["score"]))


def _only(cells: Sequence[Cell], task: str, arm: str) -> Cell | None:
    return next((cell for cell in cells if (cell["task"], cell["arm"]) == (task, arm)), None)


def tables(result: Mapping[str, Any]) -> str:
    """Return the tables of losses and scores, of shares, and of the targets, in Markdown."""
    cells = result["cells"]
    parts = (_figures(cells), _shares(cells), _targets(cells), [_spent(result)])
    text = "\n".join("\n".join(lines) + "\n" for lines in parts)
    return f"{text}\n– is not measured yet.\n" if "–" in text else text


def _spent(result: Mapping[str, Any]) -> str:
    """Return the runs, their time and the machine in a sentence."""
    cells, machine = result["cells"], result["machine"]
    hours = sum(cell["processorSeconds"] for cell in cells) / 3600
    return (
        f"{len(cells)} runs, {hours:.1f} hours of processor time of one thread; {machine['processor']}, "
        f"{' '.join(machine['instructions'])}."
    )


def _figures(cells: Sequence[Cell]) -> list[str]:
    """Loss and score of the base, the tuner by hand and the rule."""
    lines = head("Task", "Rows", "Chosen", "Base", "Hand-tuned", "Automatic", "Steps, by hand and automatic")
    for task in TASKS.values():
        base, best, found = _only(cells, task.name, BASE), tuned(cells, task.name), _only(cells, task.name, AUTOMATIC)
        steps = ", ".join("–" if cell is None else str(cell["steps"]) for cell in (best, found))
        before = "–" if base is None else f"{base['heldOut']['loss']:.3f}"
        after = (_held_out(cell) for cell in (best, found))
        lines.append(row(f"`{task.name}`: {task.says}", f"{task.train_rows:,}", task.chosen, before, *after, steps))
    return lines


def _held_out(cell: Cell | None) -> str:
    return "–" if cell is None else f"{cell['heldOut']['loss']:.3f}, {_percent(cell['heldOut']['score'])}"


def _shares(cells: Sequence[Cell]) -> list[str]:
    """The shares of all arms, task by task, and over the tasks."""
    arms = (AUTOMATIC, *FIXED)
    lines = head("Share of the drop of the loss, and of the score", *(TITLES[arm] for arm in arms))
    of_arm = {arm: [share(cells, task, arm) for task in TASKS] for arm in arms}
    for number, task in enumerate(TASKS):
        lines.append(row(f"`{task}`", *(_pair(of_arm[arm][number]) for arm in arms)))
    for name, over in (("Average", _average), ("Worst", _worst)):
        lines.append(row(f"**{name}**, each share at most 100 %", *(_pair(over(of_arm[arm])) for arm in arms)))
    return lines


def _pair(found: Share | None) -> str:
    return "–" if found is None else f"{_percent(found.drop)}, {_percent(found.score)}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _average(shares: Sequence[Share | None]) -> Share | None:
    """The average of those known; none counts for more than all."""
    known = [found for found in shares if found is not None]
    if not known:
        return None
    return Share(*(mean(min(1.0, value) for value in values) for values in _both(known)))


def _worst(shares: Sequence[Share | None]) -> Share | None:
    known = [found for found in shares if found is not None]
    return Share(*map(min, _both(known))) if known else None


def _both(known: Sequence[Share]) -> tuple[list[float], list[float]]:
    return [each.drop for each in known], [each.score for each in known]


def _targets(cells: Sequence[Cell]) -> list[str]:
    shares = [share(cells, task, AUTOMATIC) for task in TASKS]
    lines = head("Target for automatic settings", "Drop of the loss", "Score")
    for name, least, found in (("average", AVERAGE, _average(shares)), ("worst task", WORST, _worst(shares))):
        values = () if found is None else (found.drop, found.score)
        shown = (f"{_percent(value)}: {'met' if value >= least else '**missed**'}" for value in values)
        lines.append(row(f"{name} ≥ {_percent(least)}", *(shown if found is not None else ("–", "–"))))
    return lines
