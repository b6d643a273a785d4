"""The learned part of rows: the text that the model sees, and the stretches of it that are targets."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy
from transformers import AutoTokenizer

from qlora_api.spec.dataset import Columns, RowFormat
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.tokenize.chunk_maker import ChunkMaker, Recipe
from qlora_trainer.data.tokenize.chunks import TokenizedRows


def learned(
    tokenizer: Path, rows: list[dict[str, Any]], format_: RowFormat = "chat", **recipe: Any
) -> list[tuple[str, list[str]]]:
    """The text and the targets of each used row, as the chunks of prepare have them."""
    maker = ChunkMaker(Recipe(**_DEFAULTS | {"tokenizer": tokenizer, "format": format_} | recipe))
    chunk = maker.make([Row(f"line {number}", json.dumps(row), 1) for number, row in enumerate(rows, start=1)])
    made, plain = TokenizedRows([chunk]), AutoTokenizer.from_pretrained(tokenizer)
    found: list[tuple[str, list[str]]] = []
    for index in range(len(made)):
        row = numpy.array([index])
        ids, is_target = made.input_ids(row).tolist(), made.is_target(row).tolist()
        found.append((plain.decode(ids), _stretches(plain, ids, is_target)))
    return found


def _stretches(tokenizer: Any, ids: list[int], is_target: list[bool]) -> list[str]:
    groups = groupby(zip(ids, is_target, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in group]) for target, group in groups if target]


_DEFAULTS: dict[str, Any] = {
    "vocabulary": 1_000_000,
    "columns": Columns(),
    "train_on": "completion",
    "longest_allowed": 10_000,
}
