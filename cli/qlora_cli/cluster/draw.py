"""Draws jobs in a terminal: progress, losses, and the curves of several runs."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import plotille
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_api.figures import format_duration
from qlora_api.printable import one_line
from qlora_client.figure import draw_histories, smoothed
from qlora_client.history import LossHistory
from qlora_client.jobs.events import Event
from qlora_client.jobs.job import Job
from qlora_client.kube.errors import ClusterError

_LEAST_POINTS = 3
_HEIGHT = 10
_AXIS_WIDTH = 24
"""Columns that the library needs beside the curve."""
_LEAST_WIDTH, _MOST_WIDTH = 20, 100


def draw_losses(losses: Mapping[int, float], width: int) -> str:
    """The losses over the optimizer steps, in at most `width` columns; empty if there is too little to draw."""
    columns = min(width - _AXIS_WIDTH, _MOST_WIDTH)
    if len(losses) < _LEAST_POINTS or columns < _LEAST_WIDTH:
        return ""
    steps, values = list(losses), list(losses.values())
    figure = plotille.Figure()
    figure.width, figure.height = columns, _HEIGHT
    figure.with_colors = False
    figure.set_x_limits(min_=steps[0], max_=steps[-1])
    low, high = min(values), max(values)
    figure.set_y_limits(min_=low, max_=high if high > low else low + 1)
    figure.x_label, figure.y_label = "step", "loss"
    figure.x_ticks_fkt = lambda low, _high: f"{low:.0f}"
    figure.y_ticks_fkt = lambda low, _high: f"{low:.4g}"
    figure.plot(steps, values)
    return str(figure.show(legend=False))


KINDS = (".png", ".svg")
MOST_CURVES = 12
_COLORS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_HEIGHT, _LEAST_WIDTH, _MOST_WIDTH = 16, 20, 120
"""Columns that the library needs beside the curves."""
_LETTERS_ON_A_CURVE = 8
_MARGIN = 0.05


def draw_curves(histories: Mapping[str, LossHistory], width: int, *, colors: bool) -> str:
    """The smoothed training losses over the optimizer steps, in at most `width` columns, with their letters below.

    Each curve has a letter, so that it can be told from the others without colors, which only a terminal gets. Empty if
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


COLORS = {"Succeeded": "green", "Failed": "red", "Suspended": "yellow", "Training": "cyan"}
"""Of phases; the others have none."""
_EVENTS_SHOWN = 5
_BAR_WIDTH = 40


@dataclass(frozen=True)
class Moment:
    """What is known of the job at one moment."""

    job: Job
    losses: Mapping[int, float]
    """Training loss by optimizer step."""
    events: Sequence[Event]
    """Oldest first."""


def picture(moment: Moment, console: Console, now: datetime) -> RenderableType:
    """Phase, bar, figures, loss curve and the latest events."""
    job = moment.job
    age = format_duration(max(0.0, (now - job.created).total_seconds()))
    phase = (job.phase, COLORS.get(job.phase, "bold"))
    parts: list[RenderableType] = [Text.assemble((job.name, "bold"), "  ", phase, (f"  {age}", "dim"))]
    if job.progress.get("totalSteps"):
        # In a table, because a bar by itself does not end its line.
        bar = Table.grid()
        bar.add_row(ProgressBar(total=100, completed=job.progress.get("percent", 0), width=_BAR_WIDTH))
        parts.append(bar)
    if figures := figures_of(job):
        parts.append(Text(figures))
    if job.message and job.phase != "Training":
        parts.append(Text(one_line(job.message)))
    if curve := draw_losses(moment.losses, console.width):
        parts.append(Text(curve, style="cyan", no_wrap=True))
    parts += map(_event, moment.events[-_EVENTS_SHOWN:])
    return Group(*parts)


def _event(event: Event) -> Text:
    local = event.time.astimezone()
    text = one_line(f"{local:%H:%M:%S} {event.reason}: {event.message}")
    return Text(text, style="yellow" if event.kind == "Warning" else "dim", no_wrap=True, overflow="ellipsis")


def line_of(job: Job) -> str:
    """The phase, and what there is to say of it: `Training: 42% 420/1000, loss 1.234, 850 tokens/s, 1h12m left`."""
    figures = figures_of(job)
    text = figures if job.phase == "Training" and figures else one_line(job.message)
    return f"{job.phase}: {text}" if text else job.phase


def end_of(job: Job) -> str:
    """How the job has ended, and what to do now."""
    where = f"{job.name} --namespace {job.namespace}"
    if job.phase == "Failed":
        text = one_line(job.message)
        return (
            f"{job.name} has failed: {text}\nIts log: qlora logs {where}; once the cause is gone: qlora retry {where}"
        )
    adapter = job.status.get("adapter") or {}
    if not adapter:
        return f"{job.name} has succeeded"
    address = one_line(str(adapter["uri"]))
    return f"{job.name} has succeeded: {address} (SHA-256 {adapter['sha256']})\nDownload it: qlora adapter {where}"


def figures_of(job: Job) -> str:
    """Progress in one line: `42% 420/1000, loss 1.234, 850 tokens/s, 1h12m left`."""
    progress = job.progress
    parts = [str(progress.get("summary", ""))]
    if progress.get("loss") is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    if progress.get("evalLoss") is not None:
        parts.append(f"held-out {progress['evalLoss']:.3f}")
    if progress.get("evalAccuracy") is not None:
        parts.append(f"held-out accuracy {progress['evalAccuracy']:.0%}")
    if progress.get("tokensPerSecond"):
        parts.append(f"{progress['tokensPerSecond']:,.0f} tokens/s")
    if progress.get("remaining") and not job.ended:
        parts.append(f"{progress['remaining']} left")
    return one_line(", ".join(filter(None, parts)))
