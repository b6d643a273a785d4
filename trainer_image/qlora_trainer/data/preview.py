"""Reads the first rows of a job's data set, and divides the text of each into what is trained on and what is not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from qlora_api.dataset import Columns, DatasetSpec
from qlora_api.training import TrainingSpec
from qlora_trainer.data.chat_template import Rendered, Tokenizer
from qlora_trainer.data.formats import Reading, RowReader, detect_format
from qlora_trainer.data.hub_splits import training_part
from qlora_trainer.data.locate import DataAccess, find_data
from qlora_trainer.data.reading import read_sample
from qlora_trainer.data.rows import Row
from qlora_trainer.data.tokenize import ANY_VOCABULARY, ChunkMaker, Recipe


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
    """Why prepare leaves the row out; empty if it does not."""


@dataclass(frozen=True)
class Preview:
    """The first rows of a data set, and how its rows are read."""

    uri: str
    reading: Reading
    rows: Iterator[PreviewedRow]
    """Reads on each step. Raises StepFailure for the first invalid row."""


def previews(
    spec: DatasetSpec, training: TrainingSpec, tokenizer: Tokenizer, access: DataAccess, download: Path, count: int
) -> Iterator[Preview]:
    """The first `count` rows that a job would use of each source. Files of a server are downloaded below `download`.

    Raises StepFailure as prepare does.
    """
    for number, field in enumerate(spec.training_sources):
        yield _preview(spec, field, training, tokenizer, access, download / str(number), count)


def _preview(
    spec: DatasetSpec,
    field: str,
    training: TrainingSpec,
    tokenizer: Tokenizer,
    access: DataAccess,
    download: Path,
    count: int,
) -> Preview:
    """The first rows of the source that the job's `field` names."""
    source = spec.training_sources[field]
    data = find_data(source.source, training_part(source, field), access, download)
    rows = read_sample(data.files, spec.max_samples, training.seed if spec.shuffle else None)
    first = list(islice(rows, count))
    format_, columns = source.format, source.columns
    if format_ == "auto":
        format_, columns = detect_format(first[0], source.columns, field, pairs=training.compares_answers)
    columns = (columns or Columns()).model_copy(update={"check": spec.check_column(field)})
    recipe = Recipe.of(spec, training, tokenizer, format_, columns, field, vocabulary=ANY_VOCABULARY)
    recipe.require_place_for_settings(tokenizer, data.uri)
    maker = ChunkMaker(recipe, tokenizer)
    return Preview(data.uri, RowReader(format_, columns).reading(first[0]), _shown(first, maker, tokenizer))


def _shown(rows: Sequence[Row], maker: ChunkMaker, tokenizer: Tokenizer) -> Iterator[PreviewedRow]:
    reader = maker.recipe.row_reader()
    for row in rows:
        shown = list(_previewed(tokenizer, maker.rendered(row), row.location, maker.recipe))
        if not any(text.left_out for text in shown):
            # A row that is used must have all that prepare asks for.
            reader.check(row)
        yield from shown


def _previewed(
    tokenizer: Tokenizer, texts: tuple[Rendered, ...], location: str, recipe: Recipe
) -> Iterator[PreviewedRow]:
    """What a row has: one text, or the two of a pair, which are used or left out together."""
    rows = list(tokenizer.tokenize(texts, recipe.train_on))
    left_out = "" if any(row.is_target.any() for row in rows) else "no token is trained on"
    if sum(len(row.input_ids) for row in rows) > recipe.longest_allowed:
        left_out = f"longer than {recipe.longest_allowed} tokens (spec.training.maxSequenceLength)"
    names = ("",) if len(rows) == 1 else (", chosen", ", rejected")
    for name, text, row in zip(names, texts, rows, strict=True):
        parts = zip(tokenizer.pieces(text), row.is_target.tolist(), strict=True)
        stretches = tuple(
            Stretch("".join(piece for piece, _ in group), trained)
            for trained, group in groupby(parts, key=lambda part: part[1])
        )
        yield PreviewedRow(location + name, stretches, len(row.input_ids), int(row.is_target.sum()), left_out)
