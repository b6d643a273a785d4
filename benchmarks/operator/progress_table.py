"""The figures of jobs that report progress, as the documentation shows them."""

from typing import Any

from benchmarks.operator.table import Target, calls, head, row, targets

_TARGETS = (
    Target(
        "status writes of a job in 10 s, that of the busiest: {}", 1, lambda run: run["statusWrites"]["ofTheBusiestJob"]
    ),
)


def tables(result: dict[str, Any]) -> str:
    """Tables in Markdown: the requests of running jobs to the API server, and the targets."""
    used = result["processorMillisecondsPerJobAndMinute"]
    lines = [
        *head(f"{result['jobs']:,} jobs that train, for {result['seconds']} s", "For each job and minute"),
        *(row(f"`{call}`", f"{rate:.2f}") for call, rate in calls(result["callsPerJobAndMinute"])),
        row("processor time of the operator", f"{used['operator']:.0f} ms"),
        row("processor time of the API server", f"{used['apiServer']:.0f} ms"),
        "",
        *head("Of all together", ""),
        row("requests per second", f"{result['allCallsPerSecond']:.1f}"),
        row(
            "shortest pause between two status writes of a job",
            f"{result['statusWrites']['shortestPauseSeconds']:.1f} s",
        ),
        row("memory of the operator", f"{result['residentMiB']['peak']:.0f} MiB"),
        row("load average of the machine before", f"{result['loadAverage'][0]:.1f}"),
        "",
        *targets([(target, result) for target in _TARGETS]),
    ]
    return "\n".join([*lines, ""])
