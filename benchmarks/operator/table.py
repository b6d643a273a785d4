"""Writes tables in Markdown, and puts them into the page of the documentation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "operator.md"

Run = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A target. The name has a place for the value."""

    name: str
    value: float
    figure: Callable[[Run], float]
    at_least: bool = False

    def met(self, run: Run) -> bool:
        """Whether it was reached."""
        found = self.figure(run)
        return found >= self.value if self.at_least else found <= self.value


def begin(load: str, command: str = "") -> str:
    """Return the page's line before the tables of a load, by default of that name."""
    return f"<!-- {load}: written by `python -m {command or f'benchmarks.operator {load}'}` -->\n"


def end(load: str) -> str:
    """The line after them."""
    return f"<!-- end of {load} -->\n"


def write(load: str, tables: str, page: Path = PAGE, command: str = "") -> None:
    """Put the tables into the page, in place of the earlier ones."""
    first = begin(load, command)
    before, rest = page.read_text().split(first)
    page.write_text(f"{before}{first}\n{tables}\n{end(load)}{rest.split(end(load))[1]}")


def head(*cells: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*cells), f"|{' --- |' * len(cells)}"]


def row(*cells: str) -> str:
    """One line of it."""
    return f"| {' | '.join(cells)} |"


def targets(pairs: Sequence[tuple[Target, Run]]) -> list[str]:
    """A table of the targets, met or missed by this run."""
    lines = head("Target", "Measured", "")
    for target, run in pairs:
        sign = "≥" if target.at_least else "≤"
        name = target.name.format(f"{sign} {target.value:g}")
        lines.append(row(name, f"{target.figure(run):.1f}", "met" if target.met(run) else "missed"))
    return lines


def calls(by_call: dict[str, float]) -> list[tuple[str, float]]:
    """The requests, the most frequent first."""
    return sorted(by_call.items(), key=lambda entry: -entry[1])
