"""Draws the losses of several runs over each other: in a terminal, or as a picture."""

import string
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import plotille

from qlora_client.figure import draw_histories, smoothed
from qlora_client.history import LossHistory
from qlora_client.kube.errors import ClusterError

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
