"""Runs one cell: prepares its rows, trains its arm, and scores the answers."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy
import torch
from transformers import AutoTokenizer

from benchmarks.machine import ROOT, describe_checkout
from benchmarks.quality.results import Cell, Run
from benchmarks.quality.tasks import TASKS, Row, sets_of
from benchmarks.tuning.data import tokenize, write
from benchmarks.tuning.subjects import Subject, load_subject
from benchmarks.tuning.training import Measured, measure, train
from qlora_api.spec.resolved import ResolvedLora, ResolvedTraining
from qlora_trainer.data.tokenize.chunks import TokenizedRows
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from qlora_trainer.training.distributed.device import processor

SEQUENCE_TOKENS = 128
"""Of a packed sequence; a step is one sequence."""
WARMUP = 0.06
"""Share of the steps."""
LORA = ResolvedLora(rank=64, alpha=32, target_modules=("all-linear",))
GENERATED = 50
"""Held-out prompts whose answers are generated too."""
_MEAN_OF_STEPS = 10


@dataclass(frozen=True)
class Place:
    """The folders of the study."""

    model: Path
    """The base model's folder, without chat template."""
    base: Path
    """Keeps the base in 4-bit from run to run."""


def training_of(cell: Cell) -> ResolvedTraining:
    """Return the settings of a run, the same for all arms but for the rate."""
    return ResolvedTraining(
        max_steps=cell.steps,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        auto_micro_batch=False,
        learning_rate=cell.learning_rate,
        scheduler="linear",
        warmup_steps=round(WARMUP * cell.steps),
        max_grad_norm=1.0,
        max_sequence_length=SEQUENCE_TOKENS,
        gradient_checkpointing=False,
        optimizer="adamw",
        seed=cell.seed,
    )


def run_cell(cell: Cell, place: Place) -> Run:
    """Train and score, depending on cell, code and kind of processor only."""
    began, began_processor = time.monotonic(), time.process_time()
    task, training = TASKS[cell.task], training_of(cell)
    sets, is_tuning = sets_of(task), cell.purpose == "tuning"
    scored_rows = sets.validation if is_tuning else sets.held_out
    with tempfile.TemporaryDirectory(prefix="qlora-quality-") as scratch:
        rows = _tokenize(sets.train(task.train_rows, cell.seed), place)
        data = write(Path(scratch) / "train", rows, numpy.arange(len(rows)), SEQUENCE_TOKENS, cell.seed)
        scored = write(Path(scratch) / "scored", _tokenize(scored_rows, place), numpy.arange(len(scored_rows)))
        subject = load_subject(cell.arm, place.model, place.base, LORA, cell.seed)
        earlier: list[Measured] = []

        def evaluate(done: int, steps: int) -> None:
            if is_tuning and done == 3 * steps // 4:
                earlier.append(measure(subject, scored))

        losses = train(subject, data, training, evaluate)
        measured = measure(subject, scored)
        generated = "" if is_tuning else _generated(subject, sets.held_out[:GENERATED], place.model)
    commit, changed = describe_checkout(ROOT)
    return Run(
        cell=cell,
        right=measured.right,
        generated=generated,
        loss=round(measured.loss, 5),
        earlier_loss=round(earlier[0].loss, 5) if earlier else None,
        earlier_score=earlier[0].score if earlier else None,
        train_losses=tuple(
            round(mean(losses[first : first + _MEAN_OF_STEPS]), 4) for first in range(0, len(losses), _MEAN_OF_STEPS)
        ),
        epochs=round(cell.steps / len(data), 2),
        seconds=round(time.monotonic() - began, 1),
        processor_seconds=round(time.process_time() - began_processor, 1),
        commit=commit,
        changed=changed,
        processor=processor("cpu"),
    )


def _tokenize(rows: Sequence[Row], place: Place) -> TokenizedRows:
    return tokenize("prompt-completion", [asdict(row) for row in rows], place.model)


def _generated(subject: Subject, rows: Sequence[Row], tokenizer_folder: Path) -> str:
    """Return for each row 1 if the greedy answer is the expected one, else 0.

    The model must not be trained any further: it has transformers' attention from here on.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, padding_side="left")
    subject.network.set_attn_implementation("sdpa")
    subject.model.eval()
    inputs = tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True, add_special_tokens=False)
    expected = tokenizer([row.completion for row in rows], add_special_tokens=False)["input_ids"]
    with torch.no_grad(), torch.autocast("cpu", dtype=BASE_DTYPE):
        output = subject.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max(map(len, expected)) + 1,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return "".join("1" if answer == row.completion else "0" for answer, row in zip(answers, rows, strict=True))
