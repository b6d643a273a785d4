"""Draws a run's curves: the loss for model cards and email, and report charts."""

from collections.abc import Callable, Mapping, Set
from functools import lru_cache
from io import BytesIO
from typing import ParamSpec, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator

from qlora_trainer.history.metrics_log import Curve, MetricsHistory

_BLUE, _ORANGE, _GREY, _LIGHT = "#2563eb", "#d9480f", "#6b7280", "#e5e7eb"
# The smoothed curve averages over about this share of the run.
_SMOOTHED_SHARE = 0.05
# The others have no room in a legend.
_LISTED_CURVES = 12
Parameters = ParamSpec("Parameters")


def _drawn_once(draw: Callable[Parameters, str]) -> Callable[Parameters, str]:
    """Keep the last drawings: most are on the workspace's page and the published one."""
    # `lru_cache` drops the types of the parameters.
    return cast("Callable[Parameters, str]", lru_cache(maxsize=16)(draw))


def loss_picture(history: MetricsHistory, title: str, subtitle: str, kept_step: int | None = None) -> bytes:
    """A PNG of 1440 × 810 pixels: training loss per step, the same smoothed, and held-out loss.

    `kept_step`: the step whose adapter is kept. Its evaluation has a number, as the first and the last have.
    """
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": _GREY}):
        figure, axes = _figure(9.6, 5.4)
        _plot_loss(axes, history, kept_step)
        axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=26, parse_math=False)
        axes.annotate(
            subtitle,
            (0, 1),
            (0, 8),
            xycoords="axes fraction",
            textcoords="offset points",
            color=_GREY,
            fontsize=9,
            parse_math=False,
        )
        image = BytesIO()
        # Without the version of the drawing library the same run gives the same bytes.
        figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


@_drawn_once
def loss_chart(history: MetricsHistory, kept_step: int | None = None) -> str:
    """The same as an SVG element."""
    return _svg("loss", 9.6, 4.2, lambda axes: _plot_loss(axes, history, kept_step))


@_drawn_once
def chart(
    name: str,
    label: str,
    curve: Curve,
    *,
    logarithmic: bool = False,
    unit: str = "",
    lines: tuple[tuple[str, float], ...] = (),
) -> str:
    """One quantity over optimizer steps as an SVG element, or nothing for an empty curve.

    `name` makes the identifiers in it differ from those of other charts on the same page. `lines`: labels and
    values to compare it with.
    """

    def plot(axes: Axes) -> None:
        marker = "o" if len(curve.steps) < 2 else None
        axes.plot(curve.steps, curve.values, color=_BLUE, linewidth=1.4, marker=marker)
        for (of_line, value), style in zip(lines, ("--", ":", "-."), strict=False):
            axes.axhline(value, color=_GREY, linewidth=1.0, linestyle=style, label=of_line)
        if lines:
            axes.legend(frameon=False, loc="best", fontsize=8)
        axes.set_ylabel(label)
        if logarithmic and min(curve.values) > 0:
            axes.set_yscale("log")
        elif unit:
            axes.yaxis.set_major_formatter(EngFormatter(unit))

    return _svg(name, 4.7, 2.8, plot) if curve.steps else ""


def curves_chart(name: str, label: str, curves: Mapping[str, Curve], runaway: Set[str] = frozenset()) -> str:
    """Curves of one quantity over each other, the first in front, as an SVG element, or nothing if all are empty.

    Those of `runaway` leave the chart at its top where they would press the others flat.
    """
    drawn = {key: curve for key, curve in curves.items() if curve.steps}
    others = [value for key, curve in drawn.items() if key not in runaway for value in curve.values]

    def plot(axes: Axes) -> None:
        colors = mpl.colormaps["viridis"].resampled(max(2, len(drawn)))
        for number, (key, curve) in enumerate(drawn.items()):
            front, listed = number == 0, number < _LISTED_CURVES
            axes.plot(
                curve.steps,
                curve.values,
                color=_ORANGE if front else colors(number),
                linewidth=2.4 if front else 1.2,
                marker="o" if len(curve.steps) < 2 else None,
                zorder=3 if front else 2,
                label=key if listed else None,
            )
        if others:
            height = max(others) - min(others) or 1.0
            axes.set_ylim(top=min(axes.get_ylim()[1], max(others) + height))
        axes.set_ylabel(label)
        axes.legend(frameon=False, loc="upper right", fontsize=8)

    return _svg(name, 9.6, 4.2, plot) if drawn else ""


@_drawn_once
def histogram(name: str, label: str, counts: tuple[tuple[str, int], ...]) -> str:
    """A bar for each label and count, with its number on top, as an SVG element."""
    labels, numbers = [label for label, _ in counts], [count for _, count in counts]

    def plot(axes: Axes) -> None:
        bars = axes.bar(range(len(counts)), numbers, width=0.9, color=_BLUE)
        axes.bar_label(bars, labels=[f"{count:,}" for count in numbers], color=_GREY, fontsize=8, padding=2)
        axes.set_xticks(range(len(counts)), labels)
        axes.set_ylabel("Rows")
        axes.margins(y=0.12)

    return _svg(name, 9.6, 2.8, plot, x_label=label)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    axes = figure.add_subplot()
    axes.grid(axis="y", color=_LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def _svg(
    name: str, width: float, height: float, plot: Callable[[Axes], None], *, x_label: str = "Optimizer step"
) -> str:
    # Identifiers are drawn from the salt, not at random: the same run gives the same page. Text stays text.
    style = {"font.family": "sans-serif", "font.size": 9, "axes.edgecolor": _GREY, "svg.fonttype": "none"}
    with mpl.rc_context({**style, "svg.hashsalt": name}):
        figure, axes = _figure(width, height)
        plot(axes)
        axes.set_xlabel(x_label)
        if (legend := axes.get_legend()) is not None:
            # A name between dollar signs is no formula.
            for label in legend.get_texts():
                label.set_parse_math(False)
        image = BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = image.getvalue().decode()
    return text[text.index("<svg") :]


def _plot_loss(axes: Axes, history: MetricsHistory, kept_step: int | None) -> None:
    _plot_training(axes, history.loss)
    _plot_evaluation(axes, history.evaluation, kept_step)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel(f"Loss per {'pair' if history.compares_answers else 'target token'} (nats)")
    axes.margins(x=0.03, y=0.12)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")


def _plot_training(axes: Axes, curve: Curve) -> None:
    if not curve.steps:
        return
    span = max(1.0, len(curve.steps) * _SMOOTHED_SHARE)
    plain = span < 2
    marker = "o" if len(curve.steps) < 2 else None
    label = "training" if plain else "training, each step"
    alpha, width = (1.0, 1.8) if plain else (0.3, 1.0)
    axes.plot(curve.steps, curve.values, color=_BLUE, alpha=alpha, linewidth=width, marker=marker, label=label)
    if not plain:
        label = f"training, smoothed over {span:.0f} steps"
        axes.plot(curve.steps, curve.moving_average(span), color=_BLUE, linewidth=2, label=label)


def _plot_evaluation(axes: Axes, curve: Curve, kept_step: int | None) -> None:
    if not curve.steps:
        return
    axes.plot(curve.steps, curve.values, color=_ORANGE, linewidth=2, marker="o", markersize=6, label="held-out rows")
    ends_and_kept = {curve.steps[0], kept_step, curve.steps[-1]}
    for step, loss in zip(curve.steps, curve.values, strict=True):
        if step not in ends_and_kept:
            continue
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            (0, 9),
            textcoords="offset points",
            ha="center",
            color=_ORANGE,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
