"""Reads a job's first rows, and divides their text into targets and the rest."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy

from qlora_api.schema import replace
from qlora_api.spec.dataset import DatasetSpec
from qlora_api.spec.training import TrainingSpec
from qlora_trainer.data.examples.formats import PAIRS, Reading, RowReader, source_format
from qlora_trainer.data.read.hub_splits import evaluation_part, training_part
from qlora_trainer.data.read.locate import find_data
from qlora_trainer.data.read.reading import read_rows, read_used_rows
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.chat_template import Rendered, Tokenizer
from qlora_trainer.data.statistics import EQUAL_ANSWERS
from qlora_trainer.data.tokenize.chunk_maker import ANY_VOCABULARY, ChunkMaker, Recipe, pair_rows
from qlora_trainer.stores.access import StoreAccess


@dataclass(frozen=True)
class Stretch:
    """A part of a row's text whose tokens are all trained on, or all not."""

    text: str
    is_trained: bool


@dataclass(frozen=True)
class PreviewedRow:
    """One row as the model sees it."""

    location: str
    stretches: tuple[Stretch, ...]
    """The text, special tokens included."""
    tokens: int
    targets: int
    left_out: str
    """Why prepare leaves the row out, or an empty string."""


@dataclass(frozen=True)
class Preview:
    """The first rows of a data set, and how its rows are read."""

    uri: str
    reading: Reading
    rows: Iterator[PreviewedRow]
    """Reads on each step. Raises StepFailure for the first invalid row."""
    held_out: bool = False


def previews(
    spec: DatasetSpec, training: TrainingSpec, tokenizer: Tokenizer, access: StoreAccess, download: Path, count: int
) -> Iterator[Preview]:
    """The first `count` rows of each source. Raises StepFailure as prepare does."""
    first: Recipe | None = None
    seed = training.seed if spec.shuffle else None
    for number, (field, source) in enumerate(spec.training_sources.items()):
        data = find_data(source.source, training_part(source, field), access, download / str(number))
        rows = list(islice(read_used_rows(data.files, spec.max_rows, seed), count))
        format_, columns = source_format(rows[0], spec, field, pairs=training.compares_answers)
        recipe = Recipe.from_spec(spec, training, tokenizer, format_, columns, field, vocabulary=ANY_VOCABULARY)
        first = first or recipe
        yield _preview(data.uri, rows, recipe, tokenizer)
    if first is not None and spec.eval is not None and spec.eval.source is not None:
        data = find_data(spec.eval.source, evaluation_part(spec, spec.eval), access, download / "eval")
        rows = list(islice(read_rows(data.files), count))
        columns = replace(first.columns, check=spec.check_column(first.field, own_evaluation=True))
        recipe = dataclasses.replace(first, columns=columns)
        yield dataclasses.replace(_preview(data.uri, rows, recipe, tokenizer), held_out=True)


def _preview(uri: str, rows: Sequence[Row], recipe: Recipe, tokenizer: Tokenizer) -> Preview:
    recipe.require_place_for_settings(tokenizer, uri)
    reading = RowReader(recipe.format, recipe.columns).reading(rows[0])
    return Preview(uri, reading, _show(rows, ChunkMaker(recipe, tokenizer), tokenizer))


def _show(rows: Sequence[Row], maker: ChunkMaker, tokenizer: Tokenizer) -> Iterator[PreviewedRow]:
    reader = maker.recipe.row_reader()
    for row in rows:
        shown = list(_preview_row(tokenizer, maker.render(row), row.location, maker.recipe))
        if not any(text.left_out for text in shown):
            # A row that is used must have all that prepare asks for.
            reader.check(row)
        yield from shown


def _preview_row(
    tokenizer: Tokenizer, texts: tuple[Rendered, ...], location: str, recipe: Recipe
) -> Iterator[PreviewedRow]:
    """The parts of a row: one text, or a pair's two, used or left out together."""
    rows = list(tokenizer.tokenize(texts, recipe.train_on))
    pairs = recipe.format in PAIRS
    [row] = pair_rows(iter(rows)) if pairs else rows
    left_out = "" if row.is_target.any() else EQUAL_ANSWERS if pairs else "no token is trained on"
    if sum(len(row.input_ids) for row in rows) > recipe.longest_allowed:
        left_out = f"longer than {recipe.longest_allowed} tokens (spec.training.maxSequenceLength)"
        # Answers are only searched for in some of these rows, and not in those with many.
        rows = [dataclasses.replace(row, is_target=numpy.zeros_like(row.is_target)) for row in rows]
    names = ("",) if len(rows) == 1 else (", chosen", ", rejected")
    for name, text, row in zip(names, texts, rows, strict=True):
        parts = zip(tokenizer.pieces(text), row.is_target.tolist(), strict=True)
        stretches = tuple(
            Stretch("".join(piece for piece, _ in group), trained)
            for trained, group in groupby(parts, key=lambda part: part[1])
        )
        yield PreviewedRow(location + name, stretches, len(row.input_ids), int(row.is_target.sum()), left_out)
