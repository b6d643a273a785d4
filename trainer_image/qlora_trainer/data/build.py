"""Turns data files into the packed sequences of training and evaluation."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy

from qlora_api.dataset import Columns, DatasetSpec
from qlora_api.sources import HubSource, parse_source
from qlora_api.status import DatasetStatus
from qlora_api.training import TrainingSpec
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.environment import available_cpus, trainer_version
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.chat_template import Tokenizer
from qlora_trainer.data.chunks import Chunk, TokenizedRows
from qlora_trainer.data.files import DataFiles
from qlora_trainer.data.formats import Format, Reading, RowReader, detect_format
from qlora_trainer.data.hub_splits import EVALUATION, TRAINING, Wanted
from qlora_trainer.data.locate import find_data, mounted_data
from qlora_trainer.data.packing import Arrangement, one_row_each, pack
from qlora_trainer.data.prepared import Split, split_file, write_split
from qlora_trainer.data.reading import parse, read_rows
from qlora_trainer.data.rows import RawRow
from qlora_trainer.data.sampling import RowIndices, hold_out, used_rows
from qlora_trainer.data.statistics import DataStatistics, Lengths, SourceStatistics, SplitStatistics, dropped_rows
from qlora_trainer.data.tokenize import CHUNK_BYTES, CHUNK_ROWS, ChunkMaker, OnRows, Recipe, tokenize
from qlora_trainer.stores.hub import Hub
from qlora_trainer.stores.s3 import ObjectFolder

logger = logging.getLogger(__name__)

_LISTED_FILES = 100


@dataclass(frozen=True)
class TokenizedSource:
    """The usable rows of one address, and how many were not."""

    data: DataFiles
    sha256: str
    reading: Reading
    columns: Columns
    chunks: tuple[Chunk, ...]
    rows: TokenizedRows

    @property
    def rows_read(self) -> int:
        """Rows that were read, used or not."""
        return sum(chunk.rows_read for chunk in self.chunks)

    @property
    def too_long(self) -> int:
        """Rows left out because they have more tokens than a sequence may."""
        return sum(len(chunk.too_long) for chunk in self.chunks)

    def all_lengths(self) -> numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.int32]]:
        """int32 [rows]: tokens of each row, of those that are too long too."""
        return numpy.concatenate([self.rows.lengths, *(chunk.too_long for chunk in self.chunks)])

    def statistics(self, longest_allowed: int) -> SourceStatistics:
        """What is told about it."""
        return SourceStatistics(
            uri=self.data.uri,
            files=self.data.relative_names[:_LISTED_FILES],
            file_count=len(self.data.files),
            sha256=self.sha256,
            format=self.reading.format,
            columns=self.reading.columns,
            ignored_columns=self.reading.ignored,
            rows_read=self.rows_read,
            dropped=dropped_rows(self.chunks, longest_allowed),
            lengths=Lengths.of(self.all_lengths()),
        )


@dataclass(frozen=True)
class Dataset:
    """The rows of a job: where they come from, and which are trained on (by index into `training.rows`)."""

    training: TokenizedSource
    training_rows: RowIndices
    evaluation: TokenizedSource | None
    evaluation_rows: RowIndices

    @property
    def sources(self) -> tuple[TokenizedSource, ...]:
        """The training's, and the evaluation's if that has its own."""
        own = None if self.evaluation is self.training else self.evaluation
        return (self.training,) if own is None else (self.training, own)

    @property
    def evaluation_sha256(self) -> str | None:
        """SHA-256 of the evaluation's own files, if it has some."""
        return self.sources[1].sha256 if len(self.sources) > 1 else None

    def status(self) -> DatasetStatus:
        """What is told about it."""
        return DatasetStatus(
            format=self.training.reading.format,
            rows=self.training.rows_read,
            used_rows=len(self.training_rows),
            eval_rows=len(self.evaluation_rows),
            too_long_rows=sum(source.too_long for source in self.sources),
            longest_row_tokens=max(int(source.all_lengths().max()) for source in self.sources),
            tokens=int(self.training.rows.lengths[self.training_rows].sum(dtype=numpy.int64)),
            sha256=self.training.sha256,
        )

    def write(self, folder: Path, training: TrainingSpec, *, packed: bool) -> None:
        """Write the splits' files and the statistics. Raises OSError if the disk is full."""
        capacity = training.max_sequence_length

        def write(split: Split, rows: TokenizedRows, used: RowIndices) -> SplitStatistics:
            arrangement = _arrange(rows, used, capacity, training.seed, packed=packed)
            write_split(split_file(folder, split), rows, arrangement)
            return SplitStatistics.of(rows, arrangement, capacity, packed=packed)

        train = write("train", self.training.rows, self.training_rows)
        evaluation = None
        if self.evaluation is not None:
            evaluation = write("eval", self.evaluation.rows, self.evaluation_rows)
        sources = tuple(source.statistics(capacity) for source in self.sources)
        DataStatistics(sources=sources, train=train, eval=evaluation).write(folder)


def _arrange(rows: TokenizedRows, used: RowIndices, capacity: int, seed: int, *, packed: bool) -> Arrangement:
    """The sequences of the used rows, several in each if `packed`."""
    arranged = pack(rows.lengths[used], capacity, seed) if packed else one_row_each(len(used))
    return Arrangement(used[arranged.rows], arranged.offsets)


class DatasetBuilder:
    """Reads, checks and tokenizes the data set of a job."""

    def __init__(
        self,
        spec: DatasetSpec,
        training: TrainingSpec,
        tokenizer: Tokenizer,
        *,
        vocabulary: int,
        identity: Mapping[str, object],
        scratch: Path,
        workers: int,
        on_rows: OnRows,
    ) -> None:
        """`vocabulary`: tokens that the model knows. `scratch`: folder of what an interrupted attempt goes on from.

        `identity`: what decides the tokens besides data and spec: tokenizer, libraries and this program, by version.
        """
        self._spec, self._training, self._tokenizer = spec, training, tokenizer
        self._vocabulary, self._identity, self._scratch = vocabulary, identity, scratch
        self._workers, self._on_rows = workers, on_rows

    def build(self, find: Callable[[str, Split], DataFiles]) -> Dataset:
        """The data set. `find` has the files of an address, for `train` or `eval`.

        Raises StepFailure BAD_DATASET for anything wrong with the data.
        """
        spec = self._spec
        data = find(spec.source, "train")
        trained = self._tokenized(data, _checked_sha256(data, spec.sha256, "spec.dataset.sha256"), "train")
        everything = numpy.arange(len(trained.rows))
        none = everything[:0]
        if spec.eval is None:
            return Dataset(trained, everything, None, none)
        if spec.eval.fraction is not None:
            kept, held_out = hold_out(len(trained.rows), spec.eval.fraction, self._training.seed, data.uri)
            return Dataset(trained, kept, trained, held_out)
        own = find(spec.eval.source or "", "eval")
        digest = _checked_sha256(own, spec.eval.sha256, "spec.dataset.eval.sha256")
        evaluated = self._tokenized(own, digest, "eval", trained)
        return Dataset(trained, everything, evaluated, numpy.arange(len(evaluated.rows)))

    def _tokenized(
        self, data: DataFiles, digest: str, split: Split, like: TokenizedSource | None = None
    ) -> TokenizedSource:
        """The usable rows of the files, read as the source `like` is if there is one."""
        before = data.versions()
        rows = self._used(data) if like is None else read_rows(data.files)
        raw = next(rows)
        first = parse(raw)
        if like is not None:
            format_, columns = like.reading.format, like.columns
        elif self._spec.format == "auto":
            format_, columns = detect_format(first, self._spec.columns)
        else:
            format_, columns = self._spec.format, self._spec.columns or Columns()
        recipe = self._recipe(format_, columns)
        offset = 0 if like is None else like.rows_read
        chunks = tokenize(
            chain((raw,), rows),
            ChunkMaker(recipe, self._tokenizer),
            recipe,
            self._chunk_prefix(split, digest, recipe),
            self._workers,
            lambda done: self._on_rows(offset + done),
        )
        if data.versions() != before:
            raise bad_dataset(f"{data.uri} changed while it was read: start again when nobody writes to it")
        reading = RowReader(format_, columns).reading(first)
        source = TokenizedSource(data, digest, reading, columns, tuple(chunks), TokenizedRows(chunks))
        _require_usable(source, recipe.longest_allowed)
        return source

    def _used(self, data: DataFiles) -> Iterator[RawRow]:
        """The rows of the training data that `maxSamples` and `shuffle` leave."""
        limit = self._spec.max_samples
        if limit is None or not self._spec.shuffle:
            yield from islice(read_rows(data.files), limit)
            return
        count = sum(1 for _ in read_rows(data.files))
        chosen = iter(used_rows(count, limit, self._training.seed))
        wanted = next(chosen, None)
        for number, row in enumerate(read_rows(data.files)):
            if number == wanted:
                yield row
                wanted = next(chosen, None)
            if wanted is None:
                return

    def _recipe(self, format_: Format, columns: Columns) -> Recipe:
        training = self._training
        return Recipe(
            tokenizer=self._tokenizer.folder,
            vocabulary=self._vocabulary,
            format=format_,
            columns=columns,
            train_on=training.train_on,
            longest_allowed=training.max_sequence_length,
        )

    def _chunk_prefix(self, split: Split, digest: str, recipe: Recipe) -> Path:
        """Where the chunks lie; nothing else of this split lies beside them."""
        inputs = {
            "data": digest,
            "identity": self._identity,
            "chunk": [CHUNK_ROWS, CHUNK_BYTES],
            "format": recipe.format,
            "columns": recipe.columns.dump(),
            "trainOn": recipe.train_on,
            "longestAllowed": recipe.longest_allowed,
            "vocabulary": recipe.vocabulary,
            "maxSamples": self._spec.max_samples,
            "shuffleSeed": self._training.seed if self._spec.shuffle else None,
        }
        key = sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
        self._scratch.mkdir(parents=True, exist_ok=True)
        for path in self._scratch.glob(f"{split}-*"):
            if not path.name.startswith(f"{split}-{key}-"):
                path.unlink()
        return self._scratch / f"{split}-{key}"


def _checked_sha256(data: DataFiles, wanted: str | None, field: str) -> str:
    """The data's SHA-256. Raises StepFailure BAD_DATASET if the job wants another one."""
    digest = data.sha256()
    if wanted is not None and digest != wanted:
        raise bad_dataset(
            f"{data.uri} has SHA-256 {digest}, but {field} is {wanted}: it has changed, or was never what it should be"
        )
    return digest


def _require_usable(source: TokenizedSource, longest_allowed: int) -> None:
    if len(source.rows):
        return
    name = source.data.uri
    if source.too_long:
        raise bad_dataset(
            f"{name}: all {source.too_long} rows are longer than spec.training.maxSequenceLength ({longest_allowed}), "
            f"the longest has {source.all_lengths().max()} tokens: raise it up to that, or shorten the rows"
        )
    raise bad_dataset(f"{name}: none of the {source.rows_read} rows has a token to learn: check the answers' column")


_LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide which tokens a row becomes and which rows are used, by name."""
    return {name: version(name) for name in _LIBRARIES}


def read_dataset(
    context: StepContext,
    hub: Callable[[], Hub],
    tokenizer: Tokenizer,
    *,
    vocabulary: int,
    tokenizer_files: Mapping[str, str],
    scratch: Callable[[str], Path],
    say: Callable[[str], None],
) -> Dataset:
    """The job's data set, tokenized. `scratch` gives folders, by name, for what the next attempt goes on from.

    `vocabulary`: tokens that the model knows. `tokenizer_files`: SHA-256 of each. Raises StepFailure.
    """
    spec = context.spec.dataset
    if spec.shuffle and spec.max_samples is None:
        logger.warning(
            "spec.dataset.shuffle does nothing without spec.dataset.maxSamples, whose rows it chooses: set that, or "
            "leave it out; training.seed orders the rows of each epoch anyway"
        )

    def find(uri: str, split: Split) -> DataFiles:
        say("reading the data set")
        return find_data(
            uri,
            wanted_part(context, split),
            revision=_wanted_revision(spec, split),
            mounts=context.mounts,
            hub=hub,
            objects=lambda source: ObjectFolder(source, context.secret("dataset"), refuse=bad_dataset),
            download=scratch(f"download-{split}"),
        )

    builder = DatasetBuilder(
        spec,
        context.spec.training,
        tokenizer,
        vocabulary=vocabulary,
        identity={"tokenizer": tokenizer_files, "libraries": libraries(), "trainer": trainer_version()},
        scratch=scratch("rows"),
        workers=available_cpus(),
        on_rows=lambda rows: say(f"tokenizing: {rows} rows done"),
    )
    return builder.build(find)


def wanted_part(context: StepContext, split: Split) -> Wanted:
    """Which configuration and split of a hub data set the job trains on, or evaluates with."""
    spec = context.spec.dataset
    own = spec.eval if split == "eval" else None
    if own is None:
        return Wanted((spec.split,) if spec.split else TRAINING.splits, spec.config)
    config = own.config or (spec.config if _evaluates_with_itself(spec) else None)
    return replace(EVALUATION, splits=(own.split,) if own.split else EVALUATION.splits, config=config)


def _wanted_revision(spec: DatasetSpec, split: Split) -> str | None:
    """The branch, tag or commit of a hub data set that the job trains on, or evaluates with."""
    own = spec.eval if split == "eval" else None
    if own is None:
        return spec.revision
    return own.revision or (spec.revision if _evaluates_with_itself(spec) else None)


def _evaluates_with_itself(spec: DatasetSpec) -> bool:
    """Whether the evaluation's rows are of the same repository: its revision and configuration hold for both."""
    evaluated = None if spec.eval is None or spec.eval.source is None else _repository(spec.eval.source)
    return evaluated == _repository(spec.source)


def _repository(uri: str) -> str | None:
    source = parse_source(uri)
    return source.repository if isinstance(source, HubSource) else None


def same_data(resolved: Mapping[str, Any], context: StepContext) -> bool:
    """Whether data files on volumes are as they were prepared; what is gone is needed no more."""
    dataset = context.spec.dataset
    own_evaluation = dataset.eval.source if dataset.eval is not None else None
    for uri, digest in ((dataset.source, resolved["data"]), (own_evaluation, resolved["evalData"])):
        data = None if uri is None else mounted_data(uri, context.mounts)
        if data is not None and data.sha256() != digest:
            return False
    return True
