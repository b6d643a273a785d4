"""The figures of a day, as the documentation shows them."""

from typing import Any

from benchmarks.operator.table import Target, head, row, targets

_TARGETS = (
    Target("memory grows over the day by {} MiB", 5, lambda run: run["day"]["residentMiB"]["growth"]),
    Target("when quiet, {} requests per second besides log reads", 5, lambda run: run["quiet"]["otherCallsPerSecond"]),
    Target("a restart writes {} times", 0, lambda run: run["restart"]["writes"]),
    Target(
        "every new job, during a resync or not, has its first Job in {} s",
        1,
        lambda run: run["day"]["secondsToFirstJob"]["max"],
    ),
)


def tables(result: dict[str, Any]) -> str:
    """Tables in Markdown: the operator when quiet, at a restart and over a day; and the targets."""
    quiet, restart, day, finished = result["quiet"], result["restart"], result["day"], result["finished"]
    memory, wait = day["residentMiB"], day["secondsToFirstJob"]
    jobs = (
        f"{sum(finished.values()):,} finished jobs, {finished['cleanedUp']:,} of them cleaned up, "
        f"and {result['running']:,} that train"
    )
    lines = [
        *head(jobs, ""),
        row("When quiet: log reads per second", f"{quiet['logReadsPerSecond']:.1f}"),
        row("other requests per second", f"{quiet['otherCallsPerSecond']:.2f}"),
        row("share of one core", f"{100 * quiet['processorShare']:.1f} %"),
        row("memory", f"{quiet['residentMiB']:.0f} MiB"),
        row("Restart: seconds until every running job was read", f"{restart['secondsUntilAllWereLookedAt']:.1f}"),
        row("lists", f"{restart['lists']}"),
        row("writes", f"{restart['writes']}"),
        row(
            f"Day, compressed into {day['seconds']} s: resyncs",
            f"{day['resyncs']}, as in {day['resyncs'] / 12:.1f} hours",
        ),
        row("new jobs / of them while a resync ran", f"{day['newJobs']} / {day['newJobsDuringResyncs']}"),
        row(
            "memory in the first quarter / in the last",
            f"{memory['firstQuarter']:.0f} / {memory['lastQuarter']:.0f} MiB",
        ),
        row("seconds until a new job has its first Job, median / at most", f"{wait['p50']:.2f} / {wait['max']:.2f}"),
        row("Load average of the machine before", f"{result['loadAverage'][0]:.1f}"),
        "",
        *targets([(target, result) for target in _TARGETS]),
    ]
    return "\n".join([*lines, ""])
