"""`qlora compare`: the different settings of jobs, their results, and their losses in one picture."""

import string
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import click
import plotille
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_cli.cluster.connection import job_names, note, with_cluster
from qlora_cli.output import as_json, as_yaml, ended_by_signals
from qlora_client.comparison import Compared, Row, differing_settings, draw_histories, results, smoothed
from qlora_client.history import LossHistory, read_histories
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError
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


KINDS = (".png", ".svg")
MOST_CURVES = 12
_COLORS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_HEIGHT, _LEAST_WIDTH, _MOST_WIDTH = 16, 20, 120
_AXIS_WIDTH = 24
"""Columns that the library needs next to the curves."""
_LETTERS_ON_A_CURVE = 8
_MARGIN = 0.05


def draw_curves(histories: Mapping[str, LossHistory], width: int, *, colors: bool) -> str:
    """The smoothed training losses over the optimizer steps, in at most `width` columns, with their letters below.

    Each curve has a letter, which identifies it without colors, as only a terminal gets them. Empty if
    there is nothing to draw.
    """
    drawn = [(name, smoothed(history.training)) for name, history in histories.items() if len(history.training) > 1]
    columns = min(width - _AXIS_WIDTH, _MOST_WIDTH)
    if not drawn or columns < _LEAST_WIDTH:
        return ""
    figure = plotille.Figure()
    figure.width, figure.height, figure.with_colors = columns, _HEIGHT, colors
    # A line at step 0 would look like one of the curves.
    figure.origin = False
    figure.x_label, figure.y_label = "step", "loss"
    figure.x_ticks_fkt = lambda low, _high: f"{low:.0f}"
    figure.y_ticks_fkt = lambda low, _high: f"{low:.3f}"
    values = [value for _, points in drawn for value in points.values()]
    figure.set_x_limits(min_=0, max_=max(max(points) for _, points in drawn))
    low, high = min(values), max(values)
    margin = _MARGIN * (high - low) or 1.0
    figure.set_y_limits(min_=low - margin, max_=high + margin)
    for (_, points), letter, color in zip(drawn, _letters(), _endless(len(drawn)), strict=False):
        steps, losses = list(points), list(points.values())
        figure.plot(steps, losses, lc=color if colors else None)
        every = max(1, len(steps) // _LETTERS_ON_A_CURVE)
        figure.scatter(steps[::every], losses[::every], lc=color if colors else None, marker=letter)
    names = "\n".join(f"  {letter}  {name}" for letter, (name, _) in zip(_letters(), drawn, strict=False))
    return f"{figure.show(legend=False)}\n\n{names}"


def _letters() -> str:
    return string.ascii_uppercase


def _endless(count: int) -> list[str]:
    return [_COLORS[number % len(_COLORS)] for number in range(count)]


def require_picture(target: Path) -> None:
    """Raise ClusterError unless a picture can be written to that file here."""
    if target.suffix.lower() not in KINDS:
        raise ClusterError(f"found the picture {target}, must end in {' or '.join(KINDS)}")
    if find_spec("matplotlib") is None:
        raise ClusterError("a picture takes the library matplotlib, which is missing: pip install matplotlib")


def save_picture(histories: Mapping[str, LossHistory], target: Path) -> None:
    """Write the curves as PNG or SVG. Raises ClusterError."""
    # It takes a second to import, and is not needed for a picture in the terminal.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    draw_histories(histories, figure.add_subplot())
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise ClusterError(f"{target} cannot be written: {error.strerror or error}") from None
