"""Runs one cell: prepares its rows, trains its arm, and scores the answers."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT, describe_checkout
from benchmarks.quality.answers import answers
from benchmarks.quality.arms import Subject, load_16_bit, load_subject, store_in_16_bit
from benchmarks.quality.data import prepare
from benchmarks.quality.plan import BASE
from benchmarks.quality.results import Cell, Run
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.task import Task, rows_of, sets_of
from benchmarks.quality.training import mean_loss, train
from qlora_api.spec.training import LoraSpec, TrainingSpec
from qlora_trainer.training.distributed.device import processor

EPOCHS = 2
SEQUENCE_TOKENS = 128
"""Of a packed sequence; a step is one sequence."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Place:
    """The folders of the study."""

    model: Path
    """The base model's folder, without chat template."""
    bases: Path
    """Keeps bases in 4-bit from run to run."""


def training_of(cell: Cell) -> TrainingSpec:
    """The settings of the loop: those of the product but for length, rate and the storage of activations."""
    return TrainingSpec(
        epochs=EPOCHS,
        gradient_accumulation_steps=1,
        learning_rate=cell.learning_rate or 1e-4,
        scheduler="linear",
        warmup_steps=2,
        max_sequence_length=SEQUENCE_TOKENS,
        gradient_checkpointing=False,
        optimizer="adamw",
        seed=cell.seed,
    )


def lora_of(cell: Cell) -> LoraSpec:
    """The cell's adapter; alpha is the product's default, 16, at every rank."""
    return LoraSpec(
        rank=max(1, cell.rank), target_modules=_ATTENTION if cell.targets == "attention" else ("all-linear",)
    )


def run_cell(cell: Cell, place: Place) -> Run:
    """Train and score. The result depends on the cell, the code and the kind of processor only."""
    began, began_processor = time.monotonic(), time.process_time()
    task, training = TASKS[cell.task], training_of(cell)
    scored = rows_of(task, cell.scored_on)
    with tempfile.TemporaryDirectory(prefix="qlora-quality-") as scratch:
        folder = Path(scratch)
        if cell.arm == BASE:
            network = load_16_bit(place.model).eval()
            subject, losses, tokens = Subject(network, network, ()), list[float](), 0
        else:
            subject = load_subject(cell.arm, place.model, place.bases, lora_of(cell), cell.seed)
            rows = sets_of(task).train(cell.rows, cell.seed)
            data = prepare(rows, place.model, training, folder / "train.safetensors")
            losses, tokens = train(subject, data, training), EPOCHS * data.tokens
        loss = mean_loss(subject, prepare(scored, place.model, training, folder / "scored.safetensors"))
        right = _right(subject, task, cell, place)
    commit, changed = describe_checkout(ROOT)
    return Run(
        cell=cell,
        right=right,
        loss=round(loss, 5),
        train_losses=tuple(round(each, 4) for each in losses),
        tokens=tokens,
        seconds=round(time.monotonic() - began, 1),
        processor_seconds=round(time.process_time() - began_processor, 1),
        commit=commit,
        changed=changed,
        processor=processor("cpu"),
    )


def _right(subject: Subject, task: Task, cell: Cell, place: Place) -> str:
    rows = rows_of(task, cell.scored_on)
    store_in_16_bit(subject.model)
    given = answers(subject.model, place.model, [row.prompt for row in rows], task.max_answer_tokens)
    return "".join("1" if task.is_right(answer, row.answer) else "0" for answer, row in zip(given, rows, strict=True))
