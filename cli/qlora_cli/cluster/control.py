"""The commands that change a job: suspend, resume, retry and cancel it."""

from datetime import UTC, datetime

import click

from qlora_cli.cluster.connection import job_name, job_names, with_cluster
from qlora_cli.output import fail
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.resources import JOBS


@click.command()
@job_names
@with_cluster
def suspend(cluster: Cluster, names: tuple[str, ...]) -> None:
    """Stop jobs at a checkpoint and free their GPUs; `resume` continues them."""
    _change_suspension(cluster, names, suspended=True)


@click.command()
@job_names
@with_cluster
def resume(cluster: Cluster, names: tuple[str, ...]) -> None:
    """Resume suspended jobs, from their checkpoints."""
    _change_suspension(cluster, names, suspended=False)


@click.command()
@job_names
@with_cluster
def retry(cluster: Cluster, names: tuple[str, ...]) -> None:
    """Retry failed jobs at the step that failed, from their last checkpoints."""
    for name in names:
        job = Job(cluster.get(JOBS, name))
        if job.phase != "Failed":
            fail(f"{name} is {job.phase}, and only a failed job can be retried")
        if job.spec.get("cancel"):
            fail(f"{name} is canceled: create a job with another name")
        cluster.merge(JOBS, name, {"spec": {"retry": {"request": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"}}})
        click.echo(f"{name} is retried")


@click.command()
@job_name
@click.option("-y", "--yes", is_flag=True, help="Skip the question.")
@with_cluster
def cancel(cluster: Cluster, name: str, yes: bool) -> None:
    """End a job for good. Its checkpoints and prepared data are deleted."""
    job = Job(cluster.get(JOBS, name))
    if job.ended:
        fail(f"{name} has ended ({job.phase}), so there is nothing to cancel")
    if not yes:
        _ask(f"Cancel {name}, which is {job.phase}? (its checkpoints and prepared data are deleted)", name)
    cluster.merge(JOBS, name, {"metadata": {"uid": job.uid}, "spec": {"cancel": True}})
    click.echo(f"{name} is canceled: it cannot be resumed or retried")


def _ask(question: str, name: str) -> None:
    """Exit unless the user says yes."""
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        fail(f"{name} is not canceled, because there was no answer: pass --yes to skip the question")
    if not agreed:
        fail(f"{name} is not canceled")


def _change_suspension(cluster: Cluster, names: tuple[str, ...], *, suspended: bool) -> None:
    for name in names:
        job = Job(cluster.get(JOBS, name))
        if job.ended:
            fail(f"{name} has ended ({job.phase}), so there is nothing to {'suspend' if suspended else 'resume'}")
        if bool(job.spec.get("suspend")) == suspended:
            click.echo(f"{name} is {'suspended' if suspended else 'not suspended'} already")
            continue
        cluster.merge(JOBS, name, {"spec": {"suspend": suspended}})
        click.echo(f"{name} is {'suspended: it saves a checkpoint first' if suspended else 'resumed'}")
