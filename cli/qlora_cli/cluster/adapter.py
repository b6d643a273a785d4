"""`qlora adapter`: downloads the adapter of a job and verifies it."""

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qlora_api.printable import one_line
from qlora_cli.cluster.connection import job_name, with_cluster
from qlora_cli.endings import ended_by_signals
from qlora_client.files.adapter import download_adapter, published_adapter
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
