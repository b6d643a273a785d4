"""The figures of a neighbor of a flood, as the documentation shows them."""

from typing import Any

from benchmarks.operator.table import Target, head, row, targets

_WAITS = {
    "until the operator's first request for the job": "secondsToFirstRequest",
    "from there to its first Job": "secondsFromThereToJob",
    "together": "secondsToFirstJob",
    "the same two requests of a client that does nothing else": "secondsOfTheFloor",
}
_TARGETS = (
    Target(
        "a neighbor's first Job during the flood, against a quiet cluster: {} times",
        1.1,
        lambda run: (
            run["neighbor"]["flooded"]["secondsToFirstJob"]["p50"]
            / run["neighbor"]["quiet"]["secondsToFirstJob"]["p50"]
        ),
    ),
)


def tables(result: dict[str, Any]) -> str:
    """Tables in Markdown: the waits of a neighbor's jobs, and the targets."""
    quiet, flooded = result["neighbor"]["quiet"], result["neighbor"]["flooded"]
    lines = [
        *head("Seconds, median / 99th percentile", "Quiet", f"While {result['jobs']:,} jobs of another one arrive"),
        *(row(name, _spread(quiet[key]), _spread(flooded[key])) for name, key in _WAITS.items()),
        row("jobs of the neighbor", str(quiet["jobs"]), str(flooded["jobs"])),
        row("load average of the machine before", f"{result['loadAverage'][0]:.1f}", ""),
        "",
        *targets([(target, result) for target in _TARGETS]),
    ]
    return "\n".join([*lines, ""])


def _spread(figure: dict[str, float]) -> str:
    return f"{figure['p50']:.3f} / {figure['p99']:.3f}"
