"""Draws the losses of several runs over each other with matplotlib."""

from collections.abc import Mapping
from typing import Any

from qlora_client.history import LossHistory

_SMOOTHED_SHARE = 0.05


def smoothed(points: Mapping[int, float]) -> dict[int, float]:
    """The exponential moving average over about a twentieth of the points, without the bias towards its start.

    Source: the bias correction of Adam, arXiv 1412.6980, section 3.
    """
    weight = 2 / (max(1.0, _SMOOTHED_SHARE * len(points)) + 1)
    mean, total, result = 0.0, 0.0, {}
    for step, value in points.items():
        mean += weight * (value - mean)
        total += weight * (1 - total)
        result[step] = mean / total
    return result


def draw_histories(histories: Mapping[str, LossHistory], axes: Any) -> Any:
    """Draw training losses, as they are and smoothed, and held-out losses with dots, on matplotlib's axes.

    Returns the axes.
    """
    # It takes a second to import, and is not needed for a picture in the terminal.
    from matplotlib.ticker import MaxNLocator

    for number, (name, history) in enumerate(histories.items()):
        color, curve = f"C{number}", smoothed(history.training)
        axes.plot(list(history.training), list(history.training.values()), color=color, alpha=0.2, linewidth=0.8)
        axes.plot(list(curve), list(curve.values()), color=color, label=name)
        axes.plot(list(history.held_out), list(history.held_out.values()), "o--", color=color, markersize=4)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel("Loss (dots: held-out rows)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes
