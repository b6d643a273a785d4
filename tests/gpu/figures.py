"""Keeps the measurements of the tests on a GPU, and writes them as one file with the card's name."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.cards import Card


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    test: str
    """File and name of the test that has measured it."""
    name: str
    value: float
    unit: str
    limit: float | None = None
    """The most that is promised; None if nothing is. A test that promises it asserts it too."""

    @property
    def text(self) -> str:
        """The value with its unit, for people: numbers of four digits."""
        return f"{self.value:,.4g} {self.unit}".strip()


@dataclass(frozen=True)
class Figures:
    """Measurements of one test. `add` may be called any number of times."""

    test: str
    kept: list[Figure] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, *, limit: float | None = None) -> None:
        """Keep a measurement. `limit`: the most that is promised."""
        self.kept.append(Figure(self.test, name, float(value), unit, limit))


def report(
    figures: Sequence[Figure],
    cards: Sequence[Card],
    versions: Mapping[str, str],
    outcomes: Mapping[str, str],
    *,
    date: str,
    seconds: float,
) -> dict[str, Any]:
    """Return the file's contents.

    `outcomes`: by test, `passed`, `failed`, or why it was skipped.
    """
    return {
        "card": cards[0].name if cards else None,
        "cards": [
            {"name": card.name, "capability": ".".join(map(str, card.capability)), "memoryGiB": round(card.gib, 2)}
            for card in cards
        ],
        "versions": dict(versions),
        "date": date,
        "seconds": round(seconds, 1),
        "passed": sum(outcome == "passed" for outcome in outcomes.values()),
        "failed": [test for test, outcome in outcomes.items() if outcome == "failed"],
        "skipped": {test: outcome for test, outcome in outcomes.items() if outcome not in ("passed", "failed")},
        "figures": [{key: value for key, value in asdict(figure).items() if value is not None} for figure in figures],
    }


def table(found: Mapping[str, Any]) -> str:
    """Return a file's figures as a Markdown table below its card, date and failures."""
    heading = f"{found['card']}, {found['date']}: {found['passed']} tests passed, {len(found['failed'])} failed"
    lines = [f"{heading}, {len(found['skipped'])} skipped, in {found['seconds']:.0f} s.", ""]
    lines += ["| Measured | Value | Limit | Test |", "| --- | --- | --- | --- |"]
    for each in found["figures"]:
        figure = Figure(**each)
        met = "none"
        if figure.limit is not None:
            met = f"{figure.limit:,.4g} {figure.unit}, " + ("met" if figure.value <= figure.limit else "**missed**")
        lines.append(f"| {figure.name} | {figure.text} | {met} | `{figure.test}` |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print the table of the file that is named."""
    (path,) = arguments
    sys.stdout.write(table(json.loads(Path(path).read_text())) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
