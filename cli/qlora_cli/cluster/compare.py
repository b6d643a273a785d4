"""`qlora compare`: the different settings of jobs, their results, and their losses in one picture."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_cli.cluster.connection import job_names, note, with_cluster
from qlora_cli.cluster.curves import MOST_CURVES, draw_curves, require_picture, save_picture
from qlora_cli.endings import ended_by_signals
from qlora_cli.output import as_json, as_yaml
from qlora_client.comparison import Compared, Row, differing_settings, results
from qlora_client.history import LossHistory, read_histories
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.resources import JOBS

_ANY_WIDTH = 10_000
"""For a file or a pipe, where nothing may be cut."""


@click.command()
@job_names
@click.option("--curves/--no-curves", default=True, help="Also read per-step losses; may start a pod.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the curves to a .png or .svg file too.",
)
@click.option(
    "-o", "--output", type=click.Choice(["json", "yaml"]), help="Output format, instead of tables and a picture."
)
@with_cluster
def compare(cluster: Cluster, names: tuple[str, ...], curves: bool, picture: Path | None, output: str | None) -> None:
    """Compare jobs: settings that differ, losses, time and GPU hours, and the training losses in one picture.

    The losses of each step are read from the logs of the pods or, once these are gone, from the workspaces, through a
    short-lived pod for each claim.
    """
    if not 2 <= len(set(names)) <= MOST_CURVES:
        raise click.UsageError(f"found {len(set(names))} different jobs, must be 2 to {MOST_CURVES}")
    if picture is not None and not curves:
        raise click.UsageError("--picture shows the curves: remove --no-curves")
    if picture is not None:
        require_picture(picture)
    jobs = [Job(cluster.get(JOBS, name)) for name in dict.fromkeys(names)]
    with ended_by_signals():
        histories = read_histories(cluster, jobs, note) if curves else {}
    compared = [Compared(job, histories.get(job.name, LossHistory())) for job in jobs]
    settings, found = differing_settings(jobs), results(compared, datetime.now(UTC))
    if picture is not None:
        save_picture(histories, picture)
    if output is None:
        _show(jobs, settings, found, histories)
        return
    listed = {
        "jobs": [job.name for job in jobs],
        "settings": {row.label: dict(zip(map(_name, jobs), row.values, strict=True)) for row in settings},
        "results": {row.label: dict(zip(map(_name, jobs), row.values, strict=True)) for row in found},
        "losses": {name: _points(history) for name, history in histories.items()},
    }
    click.echo(as_json(listed) if output == "json" else as_yaml(listed), nl=False)


def _name(job: Job) -> str:
    return job.name


def _points(history: LossHistory) -> dict[str, dict[str, float]]:
    return {
        "training": {str(step): loss for step, loss in history.training.items()},
        "heldOut": {str(step): loss for step, loss in history.held_out.items()},
    }


def _show(
    jobs: Sequence[Job], settings: Sequence[Row], found: Sequence[Row], histories: dict[str, LossHistory]
) -> None:
    console = Console(emoji=False, highlight=False)
    width = console.width
    if not console.is_terminal:
        console.width = _ANY_WIDTH
    if settings:
        console.print(_table("Setting", jobs, settings))
    else:
        console.print("The jobs have the same settings.")
    console.print()
    console.print(_table("Result", jobs, found))
    colors = console.is_terminal and not console.no_color
    drawn = draw_curves(histories, width, colors=colors)
    if drawn:
        console.print()
        console.print(Text.from_ansi(drawn))


def _table(title: str, jobs: Sequence[Job], rows: Sequence[Row]) -> Table:
    table = Table(title, *map(_name, jobs), box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for row in rows:
        table.add_row(Text(row.label), *map(Text, row.values))
    return table
