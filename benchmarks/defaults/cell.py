"""Runs one cell: prepares a task's rows, trains by an arm's settings, and measures on rows that no arm has seen."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from benchmarks.defaults.arms import Facts, Settings
from benchmarks.defaults.tasks import Task, sets_of
from benchmarks.defaults.training import train_and_keep
from benchmarks.machine import ROOT, describe_checkout
from benchmarks.tuning.data import tokenize, write
from benchmarks.tuning.subjects import load_subject
from benchmarks.tuning.training import measure
from qlora_api.automatic import ModelFacts, RowFacts
from qlora_api.spec.resolved import ResolvedLora
from qlora_trainer.data.packing import pack

_SEED = 0
_BASE = ResolvedLora(rank=1, alpha=1)
"""An adapter that has not been trained changes nothing."""


@dataclass(frozen=True)
class Place:
    """The folders of a run."""

    chat: Path
    """The model with its chat template."""
    plain: Path
    """The model without, for shorter rows."""
    bases: Path
    """Keeps the base in 4-bit from run to run."""

    def model(self, task: Task) -> Path:
        """The model's folder for the task."""
        return self.chat if task.format == "chat" else self.plain


def facts(task: Task, model: Path, sizes: ModelFacts) -> Facts:
    """Count the training rows for the rules."""
    rows = tokenize(task.format, sets_of(task).train, model)

    def count(length: int, held_out: int) -> RowFacts:
        used = numpy.arange(held_out, len(rows))
        sequences = len(pack(used, rows.lengths[used], length, _SEED))
        return RowFacts(len(used), sequences, int(rows.target_counts[used].sum()), held_out > 0)

    return Facts(rows.lengths.tolist(), count, sizes)


def run_cell(task: Task, settings: Settings | None, place: Place) -> dict[str, Any]:
    """Train by the settings and measure; without settings measure the base."""
    began = time.process_time()
    sets, model = sets_of(task), place.model(task)
    with tempfile.TemporaryDirectory(prefix="qlora-defaults-") as scratch:
        folder = Path(scratch)
        lora = _BASE if settings is None else settings.lora()
        subject = load_subject("nf4-dq", model, place.bases, lora, _SEED)
        course: dict[str, Any] = {}
        if settings is not None:
            rows, held_out = tokenize(task.format, sets.train, model), settings.held_out_rows
            length = settings.length if settings.packed else None
            data = write(folder / "train", rows, numpy.arange(held_out, len(rows)), length)
            kept = write(folder / "kept", rows, numpy.arange(held_out)) if settings.eval_every_steps else None
            trained = train_and_keep(subject, data, settings.training(task), kept, settings.eval_every_steps)
            course = {
                "sequences": len(data),
                "tokens": data.tokens * settings.epochs,
                "steps": len(trained.losses),
                "keptStep": trained.kept_step,
                "trainLosses": [round(loss, 4) for loss in trained.losses],
            }
        for name, contents in (("validation", sets.validation), ("heldOut", sets.held_out)):
            rows = tokenize(task.format, contents, model)
            measured = measure(subject, write(folder / name, rows, numpy.arange(len(rows))))
            course[name] = {"loss": round(measured.loss, 5), "score": measured.score, "right": measured.right}
    commit, changed = describe_checkout(ROOT)
    return course | {"processorSeconds": round(time.process_time() - began, 1), "commit": commit, "changed": changed}
