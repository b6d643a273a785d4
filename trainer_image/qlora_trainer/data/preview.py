"""Reads a job's first rows, and divides their text into targets and the rest."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy

from qlora_api.schema import replace
from qlora_api.spec.dataset import Columns, DatasetSpec, RowFormat
from qlora_api.spec.training import TrainingSpec
from qlora_trainer.data.examples.formats import PAIRS, Reading, RowReader, source_format
from qlora_trainer.data.read.hub_splits import evaluation_part, training_part
from qlora_trainer.data.read.locate import find_data
from qlora_trainer.data.read.reading import read_rows, read_used_rows
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.chat_template import Rendered, Tokenizer
from qlora_trainer.data.statistics import EQUAL_ANSWERS
from qlora_trainer.data.tokenize.chunk_maker import ANY_VOCABULARY, ChunkMaker, Recipe, paired
from qlora_trainer.stores.access import StoreAccess


@dataclass(frozen=True)
class Stretch:
    """A part of a row's text whose tokens are all trained on, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class PreviewedRow:
    """One row as the model sees it."""

    location: str
    stretches: tuple[Stretch, ...]
    """The text, special tokens included."""
    tokens: int
    targets: int
    """Tokens that are trained on."""
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
    """Whether they are rows of the evaluation's own source."""


@dataclass(frozen=True)
class _Source:
    """The first rows of one source, and what decides how they are read."""

    uri: str
    rows: Sequence[Row]
    field: str
    """Of the job, with the settings by which they are read."""
    format: RowFormat
    columns: Columns
    held_out: bool = False


def previews(
    spec: DatasetSpec, training: TrainingSpec, tokenizer: Tokenizer, access: StoreAccess, download: Path, count: int
) -> Iterator[Preview]:
    """The first `count` rows that a job would use of each source, the evaluation's own last.

    Files of a server are downloaded below `download`. Raises StepFailure as prepare does.
    """
    for source in _sources(spec, training, access, download, count):
        recipe = Recipe.from_spec(
            spec, training, tokenizer, source.format, source.columns, source.field, vocabulary=ANY_VOCABULARY
        )
        recipe.require_place_for_settings(tokenizer, source.uri)
        reading = RowReader(source.format, source.columns).reading(source.rows[0])
        shown = _show(source.rows, ChunkMaker(recipe, tokenizer), tokenizer)
        yield Preview(source.uri, reading, shown, source.held_out)


def _sources(
    spec: DatasetSpec, training: TrainingSpec, access: StoreAccess, download: Path, count: int
) -> Iterator[_Source]:
    """The training sources, then the evaluation's, read in the format of the first."""
    like: _Source | None = None
    for number, (field, source) in enumerate(spec.training_sources.items()):
        data = find_data(source.source, training_part(source, field), access, download / str(number))
        rows = list(islice(read_used_rows(data.files, spec.max_rows, training.seed if spec.shuffle else None), count))
        format_, columns = source_format(rows[0], spec, field, pairs=training.compares_answers)
        found = _Source(data.uri, rows, field, format_, columns)
        like = like or found
        yield found
    if like is not None and spec.eval is not None and spec.eval.source is not None:
        data = find_data(spec.eval.source, evaluation_part(spec, spec.eval), access, download / "eval")
        columns = replace(like.columns, check=spec.check_column(like.field, own_evaluation=True))
        yield dataclasses.replace(
            like, uri=data.uri, rows=list(islice(read_rows(data.files), count)), columns=columns, held_out=True
        )


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
    [row] = paired(iter(rows)) if pairs else rows
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
