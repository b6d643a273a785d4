"""`qlora watch` shows a job until it has ended, drawn on a terminal or in lines; `qlora logs` prints its logs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import get_args

import click
from rich.console import Console, RenderableType
from rich.live import Live

from qlora_api.contract import ProgressRecord, decode_any_record
from qlora_api.printable import printable
from qlora_api.status import StepName
from qlora_cli.cluster.connection import job_name, note, with_cluster
from qlora_cli.cluster.draw import Moment, end_of, line_of, picture
from qlora_cli.local.display import describe
from qlora_client.history import of_status
from qlora_client.jobs.follow import Say, follow_job
from qlora_client.jobs.job import Job
from qlora_client.jobs.logs import read_logs
from qlora_client.jobs.pods import Event, events_of
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError, UnreachableError

_INTERRUPTED = 130


@click.command()
@job_name
@with_cluster
def watch(cluster: Cluster, name: str) -> None:
    """Show a job's progress, its loss curve and its events until it has ended.

    Exits with 0 if it has succeeded, else with the exit code of the step that failed. Ctrl-C ends the watching only.
    """
    sys.exit(watch_job(cluster, name, Console(emoji=False, highlight=False)))


def watch_job(cluster: Cluster, name: str, console: Console) -> int:
    """Show the job until it has ended. Returns its exit code, or 130 if the user has ended the watching.

    Raises ClusterError.
    """
    show = _draw if console.is_terminal and not console.is_dumb_terminal else _print
    try:
        last = show(cluster, name, console)
    except KeyboardInterrupt:
        note(f"{name} goes on; watch it again with: qlora watch {name} --namespace {cluster.namespace}")
        return _INTERRUPTED
    console.print(end_of(last), markup=False, soft_wrap=True)
    return last.exit_code


class _Observer:
    """Collects Events, and passes `say` a message for each failure."""

    def __init__(self, cluster: Cluster, say: Say) -> None:
        self._cluster = cluster
        self._say = say
        self._denied: set[str] = set()

    def look(self, job: Job) -> Moment:
        """The job's current state, with the losses and Events so far."""
        events: list[Event] = []
        with self._told():
            events = events_of(self._cluster, job.uid)
        return Moment(job, of_status(job).training, events)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Continue without Events that cannot be read: only the job matters."""
        try:
            yield
        except UnreachableError:
            # The next read may find it; an unreachable cluster is reported by `follow`.
            return
        except ClusterError as error:
            if str(error) not in self._denied:
                self._denied.add(str(error))
                self._say(str(error))


def _draw(cluster: Cluster, name: str, console: Console) -> Job:
    moments: list[Moment] = []

    def current() -> RenderableType:
        return picture(moments[-1], console, datetime.now(UTC)) if moments else ""

    with Live(get_renderable=current, console=console, refresh_per_second=2) as live:

        def say(text: str) -> None:
            live.console.print(text, style="yellow", markup=False, soft_wrap=True)

        for moment in _moments(cluster, name, say):
            moments[:] = [moment]
    return moments[-1].job


def _print(cluster: Cluster, name: str, console: Console) -> Job:
    told = ""
    for moment in _moments(cluster, name, note):
        if (line := line_of(moment.job)) != told:
            told = line
            console.print(f"{datetime.now(UTC):%H:%M:%S} {line}", markup=False, soft_wrap=True)
    return moment.job


def _moments(cluster: Cluster, name: str, say: Say) -> Iterator[Moment]:
    observer = _Observer(cluster, say)
    for job in follow_job(cluster, name, say=say):
        yield observer.look(job)


_STEPS: tuple[StepName, ...] = get_args(StepName)
_TAB = 8


@click.command()
@job_name
@click.option("-f", "--follow", is_flag=True, help="Wait for further lines, until the job has ended.")
@click.option("--step", "steps", type=click.Choice(_STEPS), multiple=True, help="Only of this step; may be repeated.")
@click.option("--raw", is_flag=True, help="Print the lines as they are.")
@with_cluster
def logs(cluster: Cluster, name: str, follow: bool, steps: tuple[StepName, ...], raw: bool) -> None:
    """Print the logs of a job's pods, one after the other, with records as sentences.

    With --follow it also waits for pods that have not started, and continues when a job is resumed.
    """
    try:
        for line in read_logs(cluster, name, steps or _STEPS, follow=follow, say=note):
            text = line.text if raw else sentence(line.text, line.job_uid)
            if text is not None:
                click.echo(text)
    except KeyboardInterrupt:
        sys.exit(130)


def sentence(text: str, job_uid: str) -> str | None:
    """Return the job's record as a sentence, None for another's, else plain text."""
    record = decode_any_record(text)
    if record is None:
        # Control characters, which a terminal would obey: the pod reads data that any user can publish.
        return printable(text.expandtabs(_TAB))
    if record.job_uid != job_uid:
        return None
    time = record.time[11:19]
    if isinstance(record, ProgressRecord):
        return printable(f"{time} {record.step}: {describe(record)}")
    ended = record.message if record.outcome == "succeeded" else f"{record.reason}: {record.message}"
    return printable(f"{time} {record.step} {record.outcome}: {ended}")
