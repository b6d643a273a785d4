"""The figures as the documentation shows them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "scale.md"
_BEGIN, _END = "<!-- figures: written by `python -m benchmarks.operator` -->\n\n", "\n<!-- end of the figures -->"

Run = dict[str, Any]
_KIB = 1024


@dataclass(frozen=True)
class _Target:
    """What was to be reached with so many jobs at once. The name has a place for the value."""

    jobs: int
    name: str
    value: float
    figure: Callable[[Run], float]
    at_least: bool = False


_TARGETS = (
    _Target(500, "{} first Jobs per second", 63, lambda run: run["firstJobsPerSecond"], at_least=True),
    _Target(500, "99 % have their first Job in {} s", 4, lambda run: run["secondsToFirstJob"]["p99"]),
    _Target(500, "99 % have their status {} s later", 8, lambda run: run["secondsFromFirstJobToStatus"]["p99"]),
    _Target(1000, "all have their first Job in {} s", 15, lambda run: run["secondsToAllFirstJobs"]),
    _Target(1000, "memory of the operator {} MiB", 110, lambda run: run["residentMiB"]["peak"]),
)


def figures(result: dict[str, Any]) -> str:
    """Tables in Markdown: how fast new jobs start, what was to be reached, and what one of them takes."""
    chosen = {
        (subject, jobs): _middle(run for run in result["runs"] if (run["subject"], run["jobs"]) == (subject, jobs))
        for subject in ("operator", "floor")
        for jobs in sorted({run["jobs"] for run in result["runs"]})
        if any((run["subject"], run["jobs"]) == (subject, jobs) for run in result["runs"])
    }
    ours = [run for (subject, _), run in chosen.items() if subject == "operator"]
    floors = [run for (subject, _), run in chosen.items() if subject == "floor"]
    lines = [
        _row("Created at once", ours, lambda run: f"{run['jobs']:,} jobs"),
        f"| --- |{' --- |' * len(ours)}",
        _row("First Jobs per second", ours, _rate),
        *([_row("of a script that does nothing else", floors, _rate)] if floors else []),
        _row("Seconds until all have their first Job", ours, lambda run: f"{run['secondsToAllFirstJobs']:.1f}"),
        _row("Seconds until one has it, median / 99th percentile", ours, lambda run: _spread(run["secondsToFirstJob"])),
        _row(
            "Seconds from there to its status, median / 99th percentile",
            ours,
            lambda run: _spread(run["secondsFromFirstJobToStatus"]),
        ),
        _row("Requests of the operator for each job", ours, lambda run: f"{run['allCallsPerJob']:.1f}"),
        _row("Processor time for each job, operator / API server", ours, _processor),
        _row("Memory of the operator, before / at most", ours, _memory),
        _row("Load average of the machine before", ours, lambda run: f"{run['loadAverage'][0]:.1f}"),
    ]
    return "\n".join([*lines, "", *_targets(ours), "", *_sizes(ours[-1]), ""])


def write(result: dict[str, Any], page: Path = PAGE) -> None:
    """Put the tables into the page."""
    before, rest = page.read_text().split(_BEGIN)
    page.write_text(before + _BEGIN + figures(result) + _END + rest.split(_END)[1])


def _middle(runs: Iterable[Run]) -> Run:
    """The run with the median rate: every figure is of one run, and of a real one."""
    by_rate = {run["firstJobsPerSecond"]: run for run in runs}
    return by_rate[median_low(by_rate)]


def _row(name: str, runs: list[Run], cell: Callable[[Run], str]) -> str:
    return f"| {name} | {' | '.join(cell(run) for run in runs)} |"


def _rate(run: Run) -> str:
    return f"{run['firstJobsPerSecond']:.0f}"


def _spread(values: dict[str, float]) -> str:
    return f"{values['p50']:.1f} / {values['p99']:.1f}"


def _processor(run: Run) -> str:
    used = run["processorMillisecondsPerJob"]
    return f"{used['operator']['untilQuiet']:.1f} / {used['apiServer']['untilQuiet']:.1f} ms"


def _memory(run: Run) -> str:
    return f"{run['residentMiB']['idle']:.0f} / {run['residentMiB']['peak']:.0f} MiB"


def _targets(runs: list[Run]) -> list[str]:
    lines = ["| Target | Measured | |", "| --- | --- | --- |"]
    for target in _TARGETS:
        for run in runs:
            if run["jobs"] == target.jobs:
                value = target.figure(run)
                met = value >= target.value if target.at_least else value <= target.value
                sign = "≥" if target.at_least else "≤"
                name = target.name.format(f"{sign} {target.value:g}")
                lines.append(f"| {target.jobs:,} jobs: {name} | {value:.1f} | {'met' if met else 'missed'} |")
    return lines


def _sizes(run: Run) -> list[str]:
    growth = (run["residentMiB"]["peak"] - run["residentMiB"]["idle"]) * _KIB / run["jobs"]
    sizes = run["storedBytes"]
    return [
        "| A job whose first pod waits | KiB |",
        "| --- | --- |",
        *(f"| {kind} in etcd | {size / _KIB:.1f} |" for kind, size in sizes.items()),
        f"| all of them | {sum(sizes.values()) / _KIB:.1f} |",
        f"| memory of the operator | {growth:.1f} |",
    ]
