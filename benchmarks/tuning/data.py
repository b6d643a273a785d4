"""Prepares the rows of a benchmark as the product does."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_api.spec.dataset import Columns, RowFormat
from qlora_trainer.data.packing import one_row_each, pack
from qlora_trainer.data.prepared import PreparedDataset, write_split
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.sampling import RowIndices
from qlora_trainer.data.tokenize.chunk_maker import ChunkMaker, Recipe
from qlora_trainer.data.tokenize.chunks import TokenizedRows


def tokenize(row_format: RowFormat, contents: Sequence[Mapping[str, Any]], model: Path) -> TokenizedRows:
    """Tokenize rows as prepare does."""
    recipe = Recipe(
        tokenizer=model,
        vocabulary=json.loads((model / "config.json").read_text())["vocab_size"],
        format=row_format,
        columns=Columns(),
        train_on="completion",
        longest_allowed=8192,
    )
    maker = ChunkMaker(recipe, Tokenizer(model))
    return TokenizedRows([maker.make([Row(f"row {number}", dict(row), 0) for number, row in enumerate(contents, 1)])])


def write(
    path: Path, rows: TokenizedRows, used: RowIndices, packed_to: int | None = None, seed: int = 0
) -> PreparedDataset:
    """Write the used rows to a file, whose folder exists: packed, or one in each sequence."""
    packed = one_row_each(used) if packed_to is None else pack(used, rows.lengths[used], packed_to, seed)
    write_split(path, rows, packed)
    return PreparedDataset(path)


def without_chat_template(model: Path, folder: Path) -> Path:
    """A folder with the model's files but its chat template: rows are then half as long.

    A prompt and its answer are one text, and the loss counts the answer and the token that ends it.
    """
    folder.mkdir()
    for path in model.iterdir():
        if not path.name.startswith("chat_template"):
            (folder / path.name).symlink_to(path)
    return folder
