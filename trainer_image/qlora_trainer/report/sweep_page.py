"""Writes the report of a sweep: one HTML page with the curves of its cells over each other.

Only its cells can read their volume. Each of them leaves its curves in the folder that they share, when it is
published or does not pass its gate, when it diverges, or when its sweep may have stopped it, and rewrites the page
from those of all, so that the last to end has written the whole one.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field, ValidationError, model_validator

from qlora_api.contract import SWEEP_REPORT
from qlora_api.kubernetes_values import DNS_LABEL
from qlora_api.schema import ObservedModel, replace
from qlora_api.spec.resolved import ResolvedSpec
from qlora_api.status import Share
from qlora_trainer.core.file_names import HISTORY_FILE
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.core.folder_lock import exclusive
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.history.metrics_log import Curve, MetricsHistory, read_history
from qlora_trainer.report.charts import curves_chart

logger = logging.getLogger(__name__)

CELLS = "cells"
"""Folder with a file for each cell."""
_LOCK_FILE = ".lock"
_LONGEST_WAIT_SECONDS = 30.0
"""For another cell that writes the page, which takes a moment: the step is not to wait for one that hangs. Well below
`nccl.SECONDS_TO_NOTICE`, after which a process is ended whose other ranks have ended, as they have when a run diverges.
"""
_MOST_CELLS, _MOST_POINTS, _MOST_BYTES = 64, 400, 262_144

_LARGEST = 3.5e38
"""Above all 32-bit numbers. An axis must be longer than its values, and a number."""

_Figure = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
_Steps = Annotated[tuple[Annotated[int, Field(ge=0, le=2**53)], ...], Field(max_length=_MOST_POINTS)]
_Values = Annotated[tuple[_Figure, ...], Field(max_length=_MOST_POINTS)]


class _Points(ObservedModel):
    """A curve, with as many points as a chart needs."""

    steps: _Steps
    values: _Values

    @model_validator(mode="after")
    def _validate_lengths(self) -> Self:
        if len(self.steps) != len(self.values):
            raise ValueError(f"{len(self.steps)} steps and {len(self.values)} values: must be as many")
        return self

    @classmethod
    def from_curve(cls, curve: Curve) -> "_Points":
        stride = max(1, -(-len(curve.steps) // (_MOST_POINTS - 1)))
        # The last point, which is compared, is always among them.
        kept = sorted({*range(0, len(curve.steps), stride), *range(len(curve.steps))[-1:]})
        return cls(
            steps=tuple(curve.steps[point] for point in kept), values=tuple(curve.values[point] for point in kept)
        )

    def curve(self) -> Curve:
        return Curve(self.steps, self.values)


class _CellCurves(ObservedModel):
    name: str = Field(max_length=63, pattern=DNS_LABEL)
    settings: JsonObject
    """`lora` and `training` of its spec, by field, and the addresses of its data."""
    loss: _Points
    """Smoothed."""
    evaluation: _Points
    eval_loss: _Figure | None = None
    """On the held-out rows, at the end."""
    score: Share | None = None
    """Of its answers, if its gate has one."""
    stopped_at: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """The optimizer step of the last evaluation of a stopped or diverged cell."""
    failed: Literal["gate", "diverged"] | None = None
    """Why it has no published adapter: it failed its gate, or training diverged."""

    @property
    def compared(self) -> bool:
        """Whether it may be the best: trained to its end, and not failed."""
        return self.stopped_at is None and self.failed is None


def add_to_sweep_report(job: TrainedJob, report: Path, shared: Path) -> None:
    """Leave the curves of this cell in the folder `shared`, and rewrite the page there.

    It is trained to its end. `job` has the result of its gate.
    `report`: the cell's report. Raises OSError if a file cannot be written, also if another cell does not let this
    one do it within half a minute (TimeoutError); ValueError for broken metrics, or if the page cannot be drawn.
    """
    curves = _curves(job.name, job.spec, read_history(report / HISTORY_FILE))
    score = job.gate.score if job.gate is not None else None
    curves = replace(curves, eval_loss=job.trained.eval_loss, score=score)
    if job.gate is not None and not job.gate.passed:
        curves = replace(curves, failed="gate")
    _add(curves, shared)


def add_unfinished_to_sweep_report(
    name: str, spec: ResolvedSpec, report: Path, shared: Path, *, diverged: bool
) -> None:
    """The same for a cell of that name that has `diverged`, or is stopped before its end and may be resumed.

    A stopped one without an evaluation of what it has trained is left out. Raises as `add_to_sweep_report` does.
    """
    history = read_history(report / HISTORY_FILE)
    steps, losses = history.evaluation.steps, history.evaluation.values
    evaluated = bool(steps) and steps[-1] > 0
    if not evaluated and not diverged:
        return
    curves = replace(_curves(name, spec, history), failed="diverged" if diverged else None)
    if evaluated:
        curves = replace(curves, stopped_at=steps[-1], eval_loss=losses[-1])
    _add(curves, shared)


def _curves(name: str, spec: ResolvedSpec, history: MetricsHistory) -> _CellCurves:
    span = max(1.0, len(history.loss.steps) / 20)
    return _CellCurves(
        name=name,
        settings=spec.lora.dump() | spec.training.dump() | {"dataset": [*spec.dataset.addresses.values()]},
        loss=_Points.from_curve(Curve(history.loss.steps, history.loss.moving_average(span))),
        evaluation=_Points.from_curve(history.evaluation),
    )


def _add(own: _CellCurves, shared: Path) -> None:
    folder = shared / CELLS
    if shared.is_symlink() or folder.is_symlink():
        raise OSError(f"{folder} leads through a symbolic link")
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / _LOCK_FILE, _LONGEST_WAIT_SECONDS):
        write_atomically(folder / f"{own.name}.json", json.dumps(own.dump(), allow_nan=False).encode())
        write_atomically(shared / SWEEP_REPORT, _page(_read_all(folder)))


def _read_all(folder: Path) -> list[_CellCurves]:
    """The readable cells: lowest loss first, then those stopped, then those failed."""
    found = [cell for path in sorted(folder.glob("*.json"))[:_MOST_CELLS] if (cell := _read(path)) is not None]

    def key(cell: _CellCurves) -> tuple[object, ...]:
        return cell.failed is not None, not cell.compared, cell.eval_loss is None, cell.eval_loss, cell.name

    return sorted(found, key=key)


def _read(path: Path) -> _CellCurves | None:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
        logger.warning("%s is left out of the sweep's report: it is no plain file, or too large", path)
        return None
    try:
        cell = _CellCurves.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        logger.warning("%s is left out of the sweep's report: %s", path, error)
        return None
    if path.stem != cell.name:
        logger.warning("%s is left out of the sweep's report: it is of a cell named %s", path, cell.name)
        return None
    return cell


def _page(cells: Sequence[_CellCurves]) -> bytes:
    """Draw the page. Raises ValueError for any error: other cells wrote its content."""
    # Names and settings come from files that other pods have written: everything is escaped except this module's
    # charts.
    environment = Environment(
        loader=PackageLoader("qlora_trainer.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    compared = [cell for cell in cells if cell.compared]
    diverged = {cell.name for cell in cells if cell.failed == "diverged"}
    held_out = {cell.name: cell.evaluation.curve() for cell in cells}
    losses = {cell.name: cell.loss.curve() for cell in cells}
    differing = _differing([cell.settings for cell in cells])
    # Neither losses nor scores on different rows can be compared.
    data = {json.dumps(cell.settings["dataset"]) for cell in compared if "dataset" in cell.settings}
    comparable = compared if len(data) <= 1 else []
    scored = [cell for cell in comparable if cell.score is not None]
    try:
        page = environment.get_template("sweep.html.jinja").render(
            cells=cells,
            differing=differing,
            compared=len(compared),
            lowest=next((cell.name for cell in comparable if cell.eval_loss is not None), None),
            # The sweep's best cell, by loss or by score, is unknown here.
            highest=max(scored, key=lambda cell: cell.score or 0).name if scored else None,
            scored=any(cell.score is not None for cell in cells),
            evaluation=curves_chart("evaluation", "Held-out loss", held_out, diverged),
            loss=curves_chart("loss", "Training loss, smoothed", losses, diverged),
        )
        return page.encode()
    except Exception as error:
        raise ValueError(f"the page cannot be drawn: {error!r}") from error


def _differing(settings: Sequence[Mapping[str, object]]) -> list[str]:
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]
