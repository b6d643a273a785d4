"""Draws a job in a terminal: its progress, its events and its loss curve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import plotille
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_api.duration import format_duration
from qlora_api.printable import one_line
from qlora_client.jobs.job import Job
from qlora_client.jobs.pods import Event

_LEAST_POINTS = 3
_HEIGHT = 10
_AXIS_WIDTH = 24
"""Columns that the library needs next to the curve."""
_LEAST_WIDTH, _MOST_WIDTH = 20, 100


def draw_losses(losses: Mapping[int, float], width: int) -> str:
    """Draw the losses over the steps in at most `width` columns, empty if too few."""
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


COLORS = {"Succeeded": "green", "Failed": "red", "Suspended": "yellow", "Training": "cyan"}
"""Of phases; others have no color."""
_EVENTS_SHOWN = 5
_BAR_WIDTH = 40


@dataclass(frozen=True)
class Moment:
    """The state of a job at one moment."""

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
    """Return the phase with its details, such as `Training: 42% 420/1000, loss 1.234`."""
    figures = figures_of(job)
    text = figures if job.phase == "Training" and figures else one_line(job.message)
    return f"{job.phase}: {text}" if text else job.phase


def end_of(job: Job) -> str:
    """The job's end, and the next commands."""
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
