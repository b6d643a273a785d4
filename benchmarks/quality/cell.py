"""Runs one cell: prepares its rows, trains its arm, and scores the answers."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoTokenizer

from benchmarks.machine import ROOT, describe_checkout
from benchmarks.quality.arms import Subject, load_16_bit, load_subject, store_in_16_bit
from benchmarks.quality.plan import BASE
from benchmarks.quality.results import Cell, Run
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.task import Row, Task, rows_of, sets_of
from benchmarks.quality.training import mean_loss, train
from qlora_api.spec.dataset import Columns
from qlora_api.spec.resolved import ResolvedLora, ResolvedTraining
from qlora_trainer.data.packing import pack
from qlora_trainer.data.prepared import PreparedDataset, write_split
from qlora_trainer.data.read.rows import Row as DataRow
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.tokenize.chunk_maker import ChunkMaker, Recipe
from qlora_trainer.data.tokenize.chunks import TokenizedRows
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
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


def training_of(cell: Cell) -> ResolvedTraining:
    """Return the product's settings but for length, rate and storage of activations."""
    return ResolvedTraining(
        epochs=EPOCHS,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        auto_micro_batch=False,
        learning_rate=cell.learning_rate or 1e-4,
        scheduler="linear",
        warmup_steps=2,
        max_sequence_length=SEQUENCE_TOKENS,
        gradient_checkpointing=False,
        optimizer="adamw",
        seed=cell.seed,
    )


def lora_of(cell: Cell) -> ResolvedLora:
    """The cell's adapter; alpha is QLoRA's, 16, at every rank."""
    return ResolvedLora(
        rank=max(1, cell.rank), alpha=16, target_modules=_ATTENTION if cell.targets == "attention" else ("all-linear",)
    )


def run_cell(cell: Cell, place: Place) -> Run:
    """Train and score, depending on cell, code and kind of processor only."""
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


BATCH = 50
"""Prompts that are answered at a time, padded on the left to the longest of them."""


def answers(model: Any, tokenizer_folder: Path, prompts: Sequence[str], longest: int) -> list[str]:
    """The answers, of at most `longest` tokens each, up to the token that ends them.

    The model must not be trained any further: it has transformers' attention from here on.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, padding_side="left")
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    network.set_attn_implementation("sdpa")
    model.eval()
    found: list[str] = []
    for first in range(0, len(prompts), BATCH):
        inputs = tokenizer(
            list(prompts[first : first + BATCH]), return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.no_grad(), torch.autocast("cpu", dtype=BASE_DTYPE):
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        found += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def without_chat_template(model: Path, folder: Path) -> Path:
    """A folder with the model's files but its chat template: rows are then half as long.

    A prompt and its answer are one text, and the loss counts the answer and the token that ends it.
    """
    folder.mkdir()
    for path in model.iterdir():
        if not path.name.startswith("chat_template"):
            (folder / path.name).symlink_to(path)
    return folder


def prepare(rows: Sequence[Row], model: Path, training: ResolvedTraining, path: Path) -> PreparedDataset:
    """The rows as packed sequences in a file at `path`, whose folder exists."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    recipe = Recipe(
        tokenizer=model,
        vocabulary=vocabulary,
        format="prompt-completion",
        columns=Columns(),
        train_on=training.train_on,
        longest_allowed=training.max_sequence_length,
    )
    contents = [{"prompt": row.prompt, "completion": row.answer} for row in rows]
    chunk = ChunkMaker(recipe, Tokenizer(model)).make(
        [DataRow(f"row {place}", content, 0) for place, content in enumerate(contents, start=1)]
    )
    tokenized = TokenizedRows([chunk])
    if len(tokenized) != len(rows):
        raise ValueError(f"{len(rows) - len(tokenized)} rows are longer than {training.max_sequence_length} tokens")
    arrangement = pack(numpy.arange(len(rows)), tokenized.lengths, training.max_sequence_length, training.seed)
    write_split(path, tokenized, arrangement)
    return PreparedDataset(path)
