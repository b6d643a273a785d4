"""`qlora list`: the jobs of a namespace, or of all, as a table."""

from collections.abc import Sequence
from datetime import UTC, datetime

import click
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_api.duration import format_duration
from qlora_api.printable import one_line
from qlora_cli.cluster.connection import note, with_cluster
from qlora_cli.cluster.draw import COLORS
from qlora_cli.output import as_json, as_yaml
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.resources import JOBS

_BAR_WIDTH = 12
_WIDTH_WITH_BARS = 100
_WIDE_WITH_BARS = 150
_LEAST_NAME = 12
_ANY_WIDTH = 10_000
"""For a file or a pipe, where nothing may be cut, and for -o wide, as of kubectl."""
_NONE = "-"
_WIDE = ("Cost", "Forecast", "Budget")


@click.command("list")
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="The jobs of all namespaces.")
@click.option("-l", "--selector", default="", metavar="LABELS", help="Only jobs with these labels, as for kubectl.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["wide", "name", "json", "yaml"]),
    help="Output format; `wide` adds costs, forecasts and budgets to the table.",
)
@with_cluster
def list_jobs(cluster: Cluster, everywhere: bool, selector: str, output: str | None) -> None:
    """Show jobs: phase, progress, loss, time left, recoveries and GPU hours.

    Recoveries are attempts that ended in a failure or a disruption and were followed by another. With -o wide also
    what the GPU hours cost, how many the whole job is expected to take, with their cost, and how many it may use.
    """
    bodies = cluster.find(JOBS, everywhere=everywhere, selector=selector)
    jobs = sorted(map(Job, bodies), key=lambda job: (job.namespace, job.created, job.name))
    if output == "name":
        click.echo("".join(f"qlorajob.qlora.dev/{job.name}\n" for job in jobs), nl=False)
    elif output in ("json", "yaml"):
        listed = {"apiVersion": "v1", "kind": "List", "items": [job.body for job in jobs]}
        click.echo(as_json(listed) if output == "json" else as_yaml(listed), nl=False)
    elif not jobs:
        note(f"No QLoRAJobs found in {'any namespace' if everywhere else f'the namespace {cluster.namespace}'}.")
    else:
        console = Console(emoji=False, highlight=False)
        wide = output == "wide"
        bars = console.is_terminal and console.width >= (_WIDE_WITH_BARS if wide else _WIDTH_WITH_BARS)
        if wide or not console.is_terminal:
            console.width = _ANY_WIDTH
        console.print(job_table(jobs, datetime.now(UTC), namespaces=everywhere, bars=bars, wide=wide))


def job_table(jobs: Sequence[Job], now: datetime, *, namespaces: bool, bars: bool, wide: bool = False) -> Table:
    """A row for each job. `namespaces`: with a column for them. `bars`: progress is drawn too. `wide`: with costs.

    Names are cut first if the row is too wide.
    """
    summaries = [one_line(str(_remark(job) or job.progress.get("summary") or _NONE)) for job in jobs]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in (["Namespace"] if namespaces else []) + ["Name"]:
        table.add_column(title, overflow="ellipsis", min_width=_LEAST_NAME)
    table.add_column("Phase", no_wrap=True)
    drawn = [bars and bool(job.progress.get("totalSteps")) and _remark(job) is None for job in jobs]
    widths = [len(summary) + bar * (_BAR_WIDTH + 1) for summary, bar in zip(summaries, drawn, strict=True)]
    table.add_column("Progress", no_wrap=True, min_width=max(widths))
    for title in ("Loss", "Left", "Recoveries", "GPU hours", *(_WIDE if wide else ()), "Age"):
        table.add_column(title, no_wrap=True)
    for job, summary, bar in zip(jobs, summaries, drawn, strict=True):
        loss = job.progress.get("loss")
        table.add_row(
            *([job.namespace] if namespaces else []),
            job.name,
            Text(job.phase, style=COLORS.get(job.phase, "")),
            _bar(job, summary) if bar else summary,
            _NONE if loss is None else f"{loss:.3f}",
            _NONE if job.ended else one_line(str(job.progress.get("remaining") or _NONE)),
            str(job.recoveries or _NONE),
            _hours(job.gpu_hours),
            *(_costs(job) if wide else ()),
            format_duration(max(0.0, (now - job.created).total_seconds())),
        )
    return table


def _remark(job: Job) -> str | None:
    """Return the remark on the adapter: it replaces the progress of a job that has ended."""
    return (job.status.get("adapter") or {}).get("remark")


def _hours(hours: float | None) -> str:
    return _NONE if hours is None else f"{hours:.2f}"


def _costs(job: Job) -> tuple[str, str, str]:
    """The columns of _WIDE."""
    hours, cost = job.forecast.get("gpuHours", _NONE), job.forecast.get("cost")
    forecast = f"{hours} ({cost})" if cost else hours
    return one_line(job.cost or _NONE), one_line(forecast), _hours(job.budget_hours)


def _bar(job: Job, summary: str) -> Table:
    drawn = Table.grid(padding=(0, 1))
    drawn.add_row(ProgressBar(total=100, completed=job.progress.get("percent", 0), width=_BAR_WIDTH), summary)
    return drawn
