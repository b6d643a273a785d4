"""`qlora logs`: prints the logs of a job's pods, with its records as sentences."""

import sys
from typing import get_args

import click

from qlora_api.contract import ProgressRecord, decode_any_record
from qlora_api.printable import printable
from qlora_api.status import StepName
from qlora_cli.cluster.connection import job_name, note, with_cluster
from qlora_cli.local.display import describe
from qlora_client.jobs.logs import read_logs
from qlora_client.kube.cluster import Cluster

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
    """A record of the job as a sentence, None for one of another job, and any other line without control characters."""
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
