"""Prepares a task's rows as the product's prepare step does: tokenized, targets marked, packed, in a file."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy

from benchmarks.quality.tasks.task import Row
from qlora_api.dataset import Columns
from qlora_api.training import TrainingSpec
from qlora_trainer.data.packing import pack
from qlora_trainer.data.prepared import PreparedDataset, write_split
from qlora_trainer.data.read.rows import Row as DataRow
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.tokenize.chunk_maker import ChunkMaker, Recipe
from qlora_trainer.data.tokenize.chunks import TokenizedRows


def without_chat_template(model: Path, folder: Path) -> Path:
    """A folder with the model's files but its chat template: rows are then half as long.

    A prompt and its answer are one text, and the loss counts the answer and the token that ends it.
    """
    folder.mkdir()
    for path in model.iterdir():
        if not path.name.startswith("chat_template"):
            (folder / path.name).symlink_to(path)
    return folder


def prepare(rows: Sequence[Row], model: Path, training: TrainingSpec, path: Path) -> PreparedDataset:
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
