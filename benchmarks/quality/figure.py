"""Draws the scores of all arms and tasks for the documentation."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.quality.analysis import Interval, compared
from benchmarks.quality.plan import ARMS
from benchmarks.quality.results import Run

_COLORS = ("#6b7280", "#0f766e", "#2563eb", "#93c5fd", "#d9480f")


def scores_figure(runs: Sequence[Run]) -> bytes:
    """An SVG: for each task a bar for each arm, with its 95 % interval. The same runs give the same bytes."""
    by_task = compared(runs)
    style = {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "quality"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for place, (arm, label) in enumerate(ARMS.items()):
            found = [Interval.of_seeds([float(seed.mean()) for seed in rights[arm]]) for rights in by_task.values()]
            axes.bar(
                [task + (place - 2) * 0.16 for task in range(len(found))],
                [100 * each.value for each in found],
                width=0.15,
                yerr=[100 * ((each.high or each.value) - each.value) for each in found],
                error_kw={"elinewidth": 0.9, "capsize": 2},
                color=_COLORS[place],
                label=label,
            )
        axes.set_xticks(range(len(by_task)), list(by_task))
        axes.set_ylabel("Right answers on held-out rows, %")
        axes.set_ylim(0, 105)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.22))
        image = BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    return image.getvalue()


def write_figure(runs: Sequence[Run], path: Path) -> None:
    """Write the figure, unless no task has been compared yet."""
    if compared(runs):
        path.write_bytes(scores_figure(runs))
