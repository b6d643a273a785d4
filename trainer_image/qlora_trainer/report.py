"""Draws the report of a run from the metrics that training left: a loss curve and a summary."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.files import CURVE_FILE, HISTORY_FILE, SUMMARY_FILE
from qlora_trainer.records import PrepareRecord, TrainRecord, write_atomically
from qlora_trainer.step import StepContext

_BLUE, _ORANGE, _GREY = "#2563eb", "#d9480f", "#6b7280"
# The smoothed curve weighs about this share of the run at a time.
_SMOOTHED_SHARE = 0.05


@dataclass(frozen=True)
class Curve:
    """A loss over optimizer steps."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def smoothed(self, span: float) -> tuple[float, ...]:
        """The exponential moving average over about `span` points, without the bias towards its start.

        Source: the bias correction of Adam, arXiv 1412.6980, section 3.
        """
        weight = 2 / (span + 1)
        mean, total, result = 0.0, 0.0, []
        for loss in self.losses:
            mean += weight * (loss - mean)
            total += weight * (1 - total)
            result.append(mean / total)
        return tuple(result)


@dataclass(frozen=True)
class LossHistory:
    """What `metrics.jsonl` says about the loss."""

    training: Curve
    evaluation: Curve


def read_history(metrics: Path) -> LossHistory:
    """Read the metrics. Raises ValueError, naming file and line, for a line that is no metric."""
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(metrics.read_text().splitlines(), start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{metrics}:{number}: {error}") from error
    return LossHistory(_curve(entries, "loss"), _curve(entries, "evalLoss"))


def _curve(entries: Sequence[dict[str, Any]], key: str) -> Curve:
    points = [(int(entry["step"]), float(entry[key])) for entry in entries if key in entry]
    return Curve(tuple(step for step, _ in points), tuple(loss for _, loss in points))


def loss_curve(history: LossHistory, title: str, subtitle: str) -> bytes:
    """A PNG of 1440 × 810 pixels: training loss of each step, its smoothed course, and the held-out rows' loss."""
    style = {"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": _GREY}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.6, 5.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
        axes = figure.add_subplot()
        _plot_training(axes, history.training)
        _plot_evaluation(axes, history.evaluation)
        axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=26)
        axes.annotate(
            subtitle, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color=_GREY, fontsize=9
        )
        axes.set_xlabel("Optimizer step")
        axes.set_ylabel("Loss per target token (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.03, y=0.12)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="upper right")
        image = BytesIO()
        # Without the version of the drawing library the same run gives the same bytes.
        figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _plot_training(axes: Any, curve: Curve) -> None:
    if not curve.steps:
        return
    span = max(1.0, len(curve.steps) * _SMOOTHED_SHARE)
    plain = span < 2
    marker = "o" if len(curve.steps) < 2 else None
    label = "training" if plain else "training, each step"
    alpha, width = (1.0, 1.8) if plain else (0.3, 1.0)
    axes.plot(curve.steps, curve.losses, color=_BLUE, alpha=alpha, linewidth=width, marker=marker, label=label)
    if not plain:
        label = f"training, smoothed over {span:.0f} steps"
        axes.plot(curve.steps, curve.smoothed(span), color=_BLUE, linewidth=2, label=label)


def _plot_evaluation(axes: Any, curve: Curve) -> None:
    if not curve.steps:
        return
    axes.plot(curve.steps, curve.losses, color=_ORANGE, linewidth=2, marker="o", markersize=6, label="held-out rows")
    ends = {curve.steps[0]: curve.losses[0], curve.steps[-1]: curve.losses[-1]}
    for step, loss in ends.items():
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


def write_report(context: StepContext, prepared: PrepareRecord, trained: TrainRecord) -> bytes:
    """Write `report/loss.png` and `report/summary.json`; returns the picture.

    Raises OSError if the metrics are missing or the report cannot be written, ValueError for broken metrics.
    """
    folder = WorkspaceLayout(context.workspace.root).report
    history = read_history(folder / HISTORY_FILE)
    subtitle = (
        f"{context.spec.model.source}, {prepared.dataset.used_rows} rows, rank {context.spec.lora.rank}, "
        f"learning rate {context.spec.training.learning_rate:g}"
    )
    picture = loss_curve(history, context.document.metadata.name, subtitle)
    write_atomically(folder / CURVE_FILE, picture)
    text = json.dumps(_summary(context, prepared, trained), indent=2, sort_keys=True, allow_nan=False)
    write_atomically(folder / SUMMARY_FILE, text.encode() + b"\n")
    return picture


def _summary(context: StepContext, prepared: PrepareRecord, trained: TrainRecord) -> dict[str, Any]:
    """What a person or a program compares between runs. Sizes in bytes, losses in nats per target token."""
    return {
        "job": {"name": context.document.metadata.name, "uid": context.job_uid},
        "model": {"source": context.spec.model.source, "revision": prepared.model_revision},
        "settings": {
            "quantization": context.spec.quantization.dump(),
            "lora": context.spec.lora.dump(),
            "training": context.spec.training.dump(),
        },
        "dataset": {"source": context.spec.dataset.source, "packed": prepared.packed, **prepared.dataset.dump()},
        "optimizerSteps": trained.training_step,
        "loss": {
            "training": trained.loss,
            "heldOutBefore": trained.initial_eval_loss,
            "heldOutAfter": trained.eval_loss,
        },
        "memory": {
            **prepared.memory.dump(),
            "peakBytes": trained.peak_memory_bytes,
            "measuredOn": context.device,
        },
    }
