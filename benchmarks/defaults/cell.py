"""Runs one cell: prepares a task's rows, trains by an arm's settings, and measures on rows that no arm has seen."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from benchmarks.defaults.arms import Facts, Settings
from benchmarks.defaults.tasks import Content, Task, sets_of
from benchmarks.defaults.training import measure, train
from benchmarks.machine import ROOT, describe_checkout
from benchmarks.quality.arms import load_subject
from qlora_api.automatic import ModelFacts, RowFacts
from qlora_api.spec.dataset import Columns
from qlora_api.spec.resolved import ResolvedLora
from qlora_trainer.data.packing import one_row_each, pack
from qlora_trainer.data.prepared import PreparedDataset, write_split
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.sampling import RowIndices
from qlora_trainer.data.tokenize.chunk_maker import ChunkMaker, Recipe
from qlora_trainer.data.tokenize.chunks import TokenizedRows

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


def tokenize(task: Task, contents: Sequence[Content], model: Path) -> TokenizedRows:
    """Tokenize rows as prepare does."""
    recipe = Recipe(
        tokenizer=model,
        vocabulary=json.loads((model / "config.json").read_text())["vocab_size"],
        format=task.format,
        columns=Columns(),
        train_on="completion",
        longest_allowed=8192,
    )
    maker = ChunkMaker(recipe, Tokenizer(model))
    return TokenizedRows([maker.make([Row(f"row {number}", dict(row), 0) for number, row in enumerate(contents, 1)])])


def facts(task: Task, model: Path, sizes: ModelFacts) -> Facts:
    """Count the training rows for the rules."""
    rows = tokenize(task, sets_of(task).train, model)

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

        def write(name: str, rows: TokenizedRows, used: RowIndices, packed_to: int | None = None) -> PreparedDataset:
            chosen = one_row_each(used) if packed_to is None else pack(used, rows.lengths[used], packed_to, _SEED)
            write_split(folder / name, rows, chosen)
            return PreparedDataset(folder / name)

        lora = _BASE if settings is None else settings.lora()
        subject = load_subject("nf4-dq", model, place.bases, lora, _SEED)
        course: dict[str, Any] = {}
        if settings is not None:
            rows, held_out = tokenize(task, sets.train, model), settings.held_out_rows
            data = write("train", rows, numpy.arange(held_out, len(rows)), settings.length if settings.packed else None)
            kept = write("kept", rows, numpy.arange(held_out)) if settings.eval_every_steps else None
            trained = train(subject, data, settings.training(task), kept, settings.eval_every_steps)
            course = {
                "sequences": len(data),
                "tokens": data.tokens * settings.epochs,
                "steps": len(trained.losses),
                "keptStep": trained.kept_step,
                "trainLosses": [round(loss, 4) for loss in trained.losses],
            }
        for name, contents in (("validation", sets.validation), ("heldOut", sets.held_out)):
            measured = measure(subject, write(name, tokenize(task, contents, model), numpy.arange(len(contents))))
            course[name] = {"loss": round(measured.loss, 5), "score": measured.score, "right": measured.right}
    commit, changed = describe_checkout(ROOT)
    return course | {"processorSeconds": round(time.process_time() - began, 1), "commit": commit, "changed": changed}
