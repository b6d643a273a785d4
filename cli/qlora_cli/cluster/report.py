"""`qlora report`: saves the report of a job, and opens it in the browser."""

import sys
import webbrowser
from pathlib import Path

import click

from qlora_cli.cluster.connection import job_name, note, with_cluster
from qlora_cli.endings import ended_by_signals
from qlora_client.files.report import fetch_report, save
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.resources import JOBS


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
