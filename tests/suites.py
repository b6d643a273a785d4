"""Holds what the suites of `make test` have cost and skipped against suites.toml.

    python -m tests.suites [--no-limits] FOLDER

FOLDER has a file of each suite, as pytest's option `--spent` writes it. Ends with 1 if a suite has cost too much, is
missing, or has skipped a test for a reason that is not listed.
"""

import argparse
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The highest cost of a suite, as a multiple of its figure; suites.toml has the reason.
FACTOR = {"processor": 2, "seconds": 4}
FILE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Spent:
    """One session of pytest."""

    tests: int
    processor: float
    """Seconds of processors, of pytest and all of its children."""
    seconds: float
    """The sum of the tests' durations."""
    skipped: Mapping[str, str]
    """The reason of each skipped test."""


def findings(spent: Mapping[str, Spent], expected: Mapping[str, Any], *, limits: bool) -> list[str]:
    """Return a sentence for each suite that costs too much or is missing, and each skip that is not listed."""
    found = []
    for suite, cost in expected["cost"].items() if limits else ():
        [(kind, figure)] = cost.items()
        if suite not in spent:
            found.append(f"{suite}: has not run")
        elif (now := getattr(spent[suite], kind)) > (most := FACTOR[kind] * figure):
            found.append(
                f"{suite}: {now:.0f} s ({kind}), may be {most:.0f} s: make it faster, or raise {figure} in {FILE.name}"
            )
    for each in spent.values():
        found += [
            f"{test}: skipped ({reason}), which {FILE.name} does not list"
            for test, reason in each.skipped.items()
            if not any(re.search(pattern, reason) for pattern in expected["skips"])
        ]
    return found


def table(spent: Mapping[str, Spent], expected: Mapping[str, Any]) -> str:
    """Show the cost of each suite and its figure."""
    lines = [f"{'suite':<10} {'tests':>6} {'skipped':>8} {'durations':>10} {'processor':>10}  figure"]
    for suite, each in spent.items():
        figures = (f"{figure} s ({kind})" for kind, figure in expected["cost"].get(suite, {}).items())
        numbers = f"{each.tests:6} {len(each.skipped):8} {each.seconds:8.0f} s {each.processor:8.0f} s"
        lines.append(f"{suite:<10} {numbers}  {', '.join(figures)}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the findings. Return 1 if there is any."""
    parser = argparse.ArgumentParser(prog="python -m tests.suites", description="Hold suites against suites.toml.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the files that pytest --spent has written")
    parser.add_argument("--no-limits", action="store_true", help="of the cost, which slow tests exceed")
    options = parser.parse_args(arguments)
    expected = tomllib.loads(FILE.read_text())
    files = sorted(options.folder.glob("*.json"))
    spent = {file.stem: Spent(**json.loads(file.read_text())) for file in files}
    found = findings(spent, expected, limits=not options.no_limits)
    print(table(spent, expected), *found, sep="\n")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
