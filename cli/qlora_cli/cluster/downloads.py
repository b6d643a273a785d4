"""`qlora adapter` downloads and verifies an adapter; `qlora report` saves a report."""

import sys
import webbrowser
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qlora_api.printable import one_line
from qlora_cli.cluster.connection import job_name, note, with_cluster
from qlora_cli.output import ended_by_signals
from qlora_client.files.adapter import download_adapter, published_adapter
from qlora_client.files.report import fetch_report, save
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.resources import JOBS


@click.command()
@job_name
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder to create; NAME in the current one if not set.",
)
@with_cluster
def adapter(cluster: Cluster, name: str, output: Path | None) -> None:
    """Download a job's adapter and check it: it appears complete, with the SHA-256 of the status, or not at all.

    A bucket, hub or registry is read with your credentials: those of the clouds' environment variables, HF_TOKEN or
    `hf auth login`, and `docker login`. A claim is read through a short-lived pod in the job's namespace.
    """
    target = output or Path(name)
    job = Job(cluster.get(JOBS, name))
    console = Console(stderr=True, emoji=False, highlight=False)
    with ended_by_signals(), _bar(console) as bar:
        task = bar.add_task("download", total=None)
        fresh = download_adapter(
            cluster,
            job,
            target,
            say=lambda text: console.print(one_line(text), markup=False, soft_wrap=True),
            on_bytes=lambda done, total: bar.update(task, completed=done, total=total),
        )
    sha256 = published_adapter(job)["sha256"]
    click.echo(f"{target}: {'downloaded' if fresh else 'is there already'}, SHA-256 {sha256} as in the status")


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


@click.command()
@job_name
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="File to write; NAME-report.html in the current folder if not set.",
)
@click.option("--open/--no-open", "opens", default=None, help="Open it in the browser; only on a terminal if not set.")
@with_cluster
def report(cluster: Cluster, name: str, output: Path | None, opens: bool | None) -> None:
    """Save a job's report: settings, curves, samples and how to serve the adapter, on one page.

    A claim is read through a short-lived pod in the job's namespace.
    """
    target = output or Path(f"{name}-report.html")
    with ended_by_signals():
        content = fetch_report(cluster, Job(cluster.get(JOBS, name)), note)
    save(content, target)
    click.echo(target)
    wanted = sys.stdout.isatty() if opens is None else opens
    if wanted and not webbrowser.open(target.absolute().as_uri()):
        click.echo("no browser could be opened: open the file yourself", err=True)
