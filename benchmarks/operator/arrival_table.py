"""The figures of a burst of new jobs, as the documentation shows them."""

from collections.abc import Callable, Iterable
from statistics import median_low
from typing import Any

from benchmarks.operator.table import Run, Target, head, row, targets

_KIB = 1024
_TARGETS = (
    (500, Target("500 jobs: {} first Jobs per second", 63, lambda run: run["firstJobsPerSecond"], at_least=True)),
    (500, Target("500 jobs: 99 % have their first Job in {} s", 4, lambda run: run["secondsToFirstJob"]["p99"])),
    (
        500,
        Target("500 jobs: 99 % have their status {} s later", 8, lambda run: run["secondsFromFirstJobToStatus"]["p99"]),
    ),
    (1000, Target("1,000 jobs: all have their first Job in {} s", 15, lambda run: run["secondsToAllFirstJobs"])),
    (1000, Target("1,000 jobs: memory of the operator {} MiB", 110, lambda run: run["residentMiB"]["peak"])),
)
_COLUMNS = {
    "operator": "This operator",
    "floor": "A script that creates the objects",
    "kubeflow-trainer": "Kubeflow Trainer",
    "kubeflow-trainer-unlimited": "Kubeflow Trainer, limit raised",
}
_ROWS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("First Jobs per second", lambda run: f"{run['firstJobsPerSecond']:.0f}"),
    ("Seconds until all have their first Job", lambda run: f"{run['secondsToAllFirstJobs']:.1f}"),
    ("Seconds until one has it, median / 99th percentile", lambda run: _spread(run["secondsToFirstJob"])),
    (
        "Seconds from there to its status, median / 99th percentile",
        lambda run: _spread(run.get("secondsFromFirstJobToStatus")),
    ),
    ("Requests for each job", lambda run: f"{run['allCallsPerJob']:.1f}"),
    ("Processor time for each job, controller / API server", lambda run: _processor(run)),
    ("Memory of the controller, before / at most", lambda run: _memory(run)),
    ("Load average of the machine before", lambda run: f"{run['loadAverage'][0]:.1f}"),
)


def tables(result: dict[str, Any]) -> str:
    """Tables in Markdown: the rate of new jobs, the targets, and the cost of one job."""
    lines: list[str] = []
    ours: dict[int, Run] = {}
    for jobs in sorted({run["jobs"] for run in result["runs"]}):
        chosen = {
            subject: _middle(runs)
            for subject in _COLUMNS
            if (runs := [run for run in result["runs"] if (run["subject"], run["jobs"]) == (subject, jobs)])
        }
        ours[jobs] = chosen["operator"]
        lines += head(f"{jobs:,} jobs in one burst", *(_COLUMNS[subject] for subject in chosen))
        lines += [row(name, *(cell(run) for run in chosen.values())) for name, cell in _ROWS]
        lines.append("")
    reached = targets([(target, ours[jobs]) for jobs, target in _TARGETS if jobs in ours])
    return "\n".join([*lines, *reached, "", *_sizes(ours[max(ours)]), ""])


def _middle(runs: Iterable[Run]) -> Run:
    """The run with the median rate: every figure is of one run, and of a real one."""
    by_rate = {run["firstJobsPerSecond"]: run for run in runs}
    return by_rate[median_low(by_rate)]


def _spread(values: dict[str, float] | None) -> str:
    return f"{values['p50']:.1f} / {values['p99']:.1f}" if values else "–"


def _processor(run: Run) -> str:
    used = run["processorMillisecondsPerJob"]
    return f"{used[run['subject']]['untilQuiet']:.1f} / {used['apiServer']['untilQuiet']:.1f} ms"


def _memory(run: Run) -> str:
    return f"{run['residentMiB']['idle']:.0f} / {run['residentMiB']['peak']:.0f} MiB"


def _sizes(run: Run) -> list[str]:
    growth = (run["residentMiB"]["peak"] - run["residentMiB"]["idle"]) * _KIB / run["jobs"]
    sizes = run["storedBytes"]
    return [
        *head("A job whose first pod waits", "KiB"),
        *(row(f"{kind} in etcd", f"{size / _KIB:.1f}") for kind, size in sizes.items()),
        row("all of them", f"{sum(sizes.values()) / _KIB:.1f}"),
        row("memory of the operator", f"{growth:.1f}"),
    ]
