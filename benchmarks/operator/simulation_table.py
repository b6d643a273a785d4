"""The figures of thousands of jobs from their creation to their end, as the documentation shows them."""

from collections.abc import Callable
from typing import Any

from benchmarks.operator.simulation import STEPS
from benchmarks.operator.table import Run, Target, calls, head, row, targets

_KIB = 1024
_OPERATOR_ROWS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("namespaces", lambda run: f"{len(run['namespaces'])}"),
    ("jobs", lambda run: f"{run['jobs']:,}"),
    ("processor time for each job", lambda run: f"{run['processorMillisecondsPerJob']:.0f} ms"),
    (
        "memory before / at most",
        lambda run: f"{run['residentMiB']['idle']:.0f} / {run['residentMiB']['peak']:.0f} MiB",
    ),
    ("memory of a finished job", lambda run: f"{run['residentKiBPerFinishedJob']:.0f} KiB"),
    ("requests for each job", lambda run: f"{run['allCallsPerJob']:.1f}"),
)


def tables(result: dict[str, Any]) -> str:
    """Tables in Markdown: the ends of all jobs, the needs of each operator, and the remains of one job."""
    operators, sizes = result["operators"], result["storedBytesOfOne"]
    names = [f"Operator {number}" for number in range(1, len(operators) + 1)]
    asked = sorted({call for each in operators for call, _ in calls(each["callsPerJob"])})
    lines = [
        *head(f"{result['jobs']:,} jobs, at most {result['atOnce']:,} at a time", ""),
        row("minutes until the last has ended", f"{result['seconds'] / 60:.1f}"),
        *(row(f"seen as `{phase}`", f"{count:,}") for phase, count in result["seenInPhase"].items()),
        *(
            row(f"processor time for each job, `{name}`", f"{milliseconds:.0f} ms")
            for name, milliseconds in result["processorMillisecondsPerJob"].items()
            if name != "benchmark"
        ),
        row("load average of the machine before", f"{result['loadAverage'][0]:.1f}"),
        "",
        *head("", *names),
        *(row(name, *(cell(each) for each in operators)) for name, cell in _OPERATOR_ROWS),
        *(row(f"`{call}`", *(f"{each['callsPerJob'].get(call, 0):.2f}" for each in operators)) for call in asked),
        "",
        *head("Objects of a finished job in etcd", "KiB"),
        *(row(kind, f"{size / _KIB:.1f}") for kind, size in sizes.items()),
        row("all of them", f"{sum(sizes.values()) / _KIB:.1f}"),
        "",
        *targets([(target, result) for target in _targets(result["jobs"])]),
    ]
    return "\n".join([*lines, ""])


def _targets(jobs: int) -> tuple[Target, ...]:
    return (
        Target("jobs that have succeeded {}", jobs, lambda run: run["seenInPhase"]["Succeeded"], at_least=True),
        Target("steps with a second Job {}", 0, lambda run: run["batchJobs"]["stepsWithSeveral"]),
        Target("Jobs created {}", STEPS * jobs, lambda run: run["batchJobs"]["created"]),
    )
