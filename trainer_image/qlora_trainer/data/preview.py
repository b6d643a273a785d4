"""Reads a job's first rows, and divides their text into targets and the rest."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path

import numpy

from qlora_api.schema import replace
from qlora_api.spec.dataset import Columns, DatasetSpec, RowFormat
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.training import TrainingSpec
from qlora_trainer.data.examples.formats import PAIRS, Reading, RowReader, has_pairs, source_format
from qlora_trainer.data.examples.wrong_rows import WrongRows
from qlora_trainer.data.held_out import held_out_sets
from qlora_trainer.data.read.hub_splits import evaluation_part, training_part
from qlora_trainer.data.read.locate import find_data
from qlora_trainer.data.read.reading import read_rows, read_used_rows
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.chat_template import Rendered, Tokenizer
from qlora_trainer.data.statistics import EQUAL_ANSWERS
from qlora_trainer.data.tokenize.chunk_maker import ANY_VOCABULARY, ChunkMaker, Recipe, pair_rows
from qlora_trainer.stores.access import StoreAccess

ALL = 0
"""As the number of rows to read."""
_SHOWN_OF_ALL = 3
MOST_COUNTED = 100_000
"""Of the rows after those that are read."""


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


@dataclass
class Counts:
    """The rows of a source, counted while it is read."""

    read: int = 0
    unread: int = 0
    """At most MOST_COUNTED."""


@dataclass(frozen=True)
class Preview:
    """The first rows of a data set, and how its rows are read."""

    uri: str
    reading: Reading
    rows: Iterator[PreviewedRow]
    """Reads on each step, and collects wrong rows."""
    counts: Counts
    """Complete once `rows` has ended."""
    has_text: bool
    """False if rows are only read, without a tokenizer."""
    held_out: bool


@dataclass(frozen=True)
class _Source:
    """A source's rows, and how they are read."""

    uri: str
    first: Row
    others: Iterator[Row]
    format: RowFormat
    columns: Columns
    field: str
    held_out: bool = False


_Show = Callable[[Row], Sequence[PreviewedRow]]


def previews(
    job: QLoRAJobSpec,
    tokenizer: Tokenizer | None,
    access: StoreAccess,
    download: Path,
    count: int,
    wrong: WrongRows,
    *,
    objective_is_known: bool = True,
) -> Iterator[Preview]:
    """The first `count` rows of each source; of ALL that are read, the first few.

    Without a tokenizer, ALL are read and none is shown. The rows decide on an unknown objective.
    Collects the wrong rows. Raises StepFailure for anything else, as prepare does.
    """
    for source in _sources(job, access, download, objective_is_known=objective_is_known):
        show = _show_with(source, job.dataset, job.training, tokenizer)
        reading = RowReader(source.format, source.columns).reading(source.first)
        counts = Counts()
        rows = _read(source, ALL if tokenizer is None else count, show, counts, wrong)
        yield Preview(source.uri, reading, rows, counts, has_text=tokenizer is not None, held_out=source.held_out)


def _show_with(source: _Source, spec: DatasetSpec, training: TrainingSpec, tokenizer: Tokenizer | None) -> _Show:
    """What shows a row of the source, or only checks it."""
    if tokenizer is None:
        return partial(_check, RowReader(source.format, source.columns, source.field))
    recipe = Recipe.from_spec(
        spec, training, tokenizer, source.format, source.columns, source.field, vocabulary=ANY_VOCABULARY
    )
    recipe.require_place_for_settings(tokenizer, source.uri)
    return partial(_show, ChunkMaker(recipe, tokenizer), tokenizer)


def _sources(job: QLoRAJobSpec, access: StoreAccess, download: Path, *, objective_is_known: bool) -> Iterator[_Source]:
    spec, training = job.dataset, job.training
    first: _Source | None = None
    seed = training.seed if spec.shuffle else None
    for number, (field, part) in enumerate(spec.training_sources.items()):
        data = find_data(part.source, training_part(part, field), access, download / str(number))
        rows = read_used_rows(data.files, spec.max_rows, seed)
        row = next(rows)
        pairs = training.compares_answers if objective_is_known else has_pairs(row)
        format_, columns = source_format(row, spec, field, pairs=pairs)
        source = _Source(data.uri, row, rows, format_, columns, field)
        first = first or source
        yield source
    if first is None:
        raise AssertionError("a validated data set has a source or a mix")
    for each in held_out_sets(job):
        data = find_data(each.uri, evaluation_part(spec, each.rows, each.field), access, download / each.split)
        rows, columns = read_rows(data.files), replace(first.columns, check=each.check)
        row = next(rows)
        yield dataclasses.replace(first, uri=data.uri, first=row, others=rows, columns=columns, held_out=True)


def _read(
    source: _Source,
    count: int,
    show: _Show,
    counts: Counts,
    wrong: WrongRows,
) -> Iterator[PreviewedRow]:
    shown_rows = 0
    # A file that cannot be read further ends the rows.
    with wrong.collecting():
        for row in chain((source.first,), source.others):
            if count != ALL and counts.read == count:
                counts.unread = 1 + sum(1 for _ in islice(source.others, MOST_COUNTED - 1))
                return
            counts.read += 1
            shown: Sequence[PreviewedRow] = ()
            with wrong.collecting(row.location):
                shown = show(row)
            if count != ALL or shown_rows < _SHOWN_OF_ALL:
                yield from shown
                shown_rows += bool(shown)


def _check(reader: RowReader, row: Row) -> tuple[PreviewedRow, ...]:
    reader.read(row)
    return ()


def _show(maker: ChunkMaker, tokenizer: Tokenizer, row: Row) -> list[PreviewedRow]:
    shown = list(_preview_row(tokenizer, maker.render(row), row.location, maker.recipe))
    if not any(text.left_out for text in shown):
        # A row that is used must have all that prepare asks for.
        maker.recipe.row_reader().check(row)
    return shown


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
