"""Draws the losses of a run in a terminal."""

from collections.abc import Mapping

import plotille

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
