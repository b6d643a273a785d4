"""Builds a job's data set: reads and tokenizes its files, and splits the rows."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy

from qlora_api.automatic import LONGEST, choose_held_out
from qlora_api.choice import Choice
from qlora_api.schema import replace
from qlora_api.spec.dataset import Columns, DatasetSpec, EvalSpec, RowFormat
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.training import TrainingSpec
from qlora_trainer.core.environment import available_cpus, trainer_version
from qlora_trainer.core.failures import StepFailure, bad_dataset
from qlora_trainer.data.dataset import Dataset, TokenizedSource
from qlora_trainer.data.epochs import Mix
from qlora_trainer.data.examples.formats import PAIRS, RowReader, source_format
from qlora_trainer.data.fingerprint import library_versions
from qlora_trainer.data.held_out import held_out_sets
from qlora_trainer.data.read.files import DataFiles
from qlora_trainer.data.read.hub_splits import Wanted, evaluation_part, training_part
from qlora_trainer.data.read.locate import find_data
from qlora_trainer.data.read.reading import MAX_FILES, read_rows, read_used_rows
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.sampling import RowIndices
from qlora_trainer.data.selection import first_equal, select_rows
from qlora_trainer.data.tokenize.chunk_maker import CHUNK_BYTES, CHUNK_ROWS, ChunkMaker, Recipe, tokenize
from qlora_trainer.data.tokenize.chunks import TokenizedRows
from qlora_trainer.data.tokenize.row_cache import RowsFolder
from qlora_trainer.stores.access import StoreAccess

logger = logging.getLogger(__name__)

_HeldOut = dict[str, TokenizedSource]
"""The sources of rows that are only held out, by split."""


@dataclass(frozen=True)
class ExaminedData:
    """The findings in a job's rows, whether or not it can train on them."""

    sources: tuple[TokenizedSource, ...]
    dataset: Dataset | None
    rejection: str
    """Why the job fails with BAD_DATASET, or an empty string."""


@dataclass(frozen=True)
class DatasetBuilder:
    """Builds one job's data set. Raises StepFailure, BAD_DATASET for invalid data."""

    job: QLoRAJobSpec
    tokenizer: Tokenizer
    tokenizer_files: Mapping[str, str]
    """SHA-256 of each of the tokenizer's files."""
    vocabulary: int
    access: StoreAccess
    scratch: Callable[[str], Path]
    """Gives folders, by name, for what the next attempt resumes from."""
    rows: RowsFolder
    say: Callable[[str], None]
    """Called with what is being done, for the progress record."""
    context: int | None = None
    """Tokens of a row that the model has positions for, None for any number."""

    @property
    def spec(self) -> DatasetSpec:
        """The job's data set."""
        return self.job.dataset

    @property
    def training(self) -> TrainingSpec:
        """The job's run."""
        return self.job.training

    @property
    def _longest(self) -> int:
        """Most tokens of a row."""
        return self.training.max_sequence_length or min(self.context or LONGEST, LONGEST)

    def build(self) -> Dataset:
        """The data set: all rows tokenized, and which of them are trained on and held out."""
        if self.spec.shuffle and self.spec.max_rows is None:
            logger.warning(
                "spec.dataset.shuffle has no effect without spec.dataset.maxRows, whose rows it chooses: set "
                "maxRows, or leave shuffle out; training.seed orders the rows of each epoch anyway"
            )
        dataset = self._choose(*self._sources(usable=True))
        self._require_trainable(dataset)
        if dataset.overlap is not None:
            logger.warning("%s", dataset.overlap.remark())
        return dataset

    def examine(self) -> ExaminedData:
        """All rows of all sources, tokenized. Raises StepFailure if they are unreadable."""
        training, held_out = self._sources(usable=False)
        sources, dataset, rejection = (*training, *held_out.values()), None, ""
        try:
            for source in sources:
                _require_usable(source, self._longest)
            dataset = self._choose(training, held_out)
            self._require_trainable(dataset)
        except StepFailure as failure:
            rejection = failure.message
        return ExaminedData(sources, dataset, rejection)

    def _choose(self, training: tuple[TokenizedSource, ...], held_out_sources: _HeldOut) -> Dataset:
        """The rows of each split and, with a mix, how many of each source an epoch has."""
        own = held_out_sources.get("eval")
        rows = TokenizedRows.from_parts([source.rows for source in (*training, *([own] if own else []))])
        self.say("looking for rows that are equal")
        first = first_equal(rows.digests())
        held_out = None if self.spec.eval is not None else self._choose_held_out(training, first)
        selection = select_rows(
            self.spec if held_out is None else replace(self.spec, eval=EvalSpec(fraction=float(held_out.value))),
            self.training.seed,
            {name: len(source.rows) for name, source in zip(self._names(), training, strict=True)},
            0 if own is None else len(own.rows),
            first,
        )
        dataset = Dataset(training, held_out_sources, rows, selection, chosen_share=held_out)
        if self.spec.mix is None:
            return dataset
        weights = tuple(source.weight for source in self.spec.mix)
        return dataclasses.replace(
            dataset, mix=Mix.from_sizes([len(part) for part in selection.training], weights), weights=weights
        )

    def _choose_held_out(self, training: tuple[TokenizedSource, ...], first: RowIndices) -> Choice | None:
        """Choose the share of held-out rows: none of a source with a single row.

        `first`: the first equal row of each row of all sources.
        """
        ends = numpy.cumsum([len(source.rows) for source in training])
        used = first == numpy.arange(len(first)) if self.spec.deduplicate else numpy.ones(len(first), dtype=bool)
        counts = [int(part.sum()) for part in numpy.split(used[: ends[-1]], ends[:-1])]
        if min(counts) > 1:
            return choose_held_out(self.job, sum(counts))
        if self.training.keep == "best" or self.training.early_stopping is not None:
            raise bad_dataset(
                f"{self._names()[counts.index(min(counts))]} has a single row, so that none is held out, and "
                "spec.training.keep: best and earlyStopping need held-out rows: add rows, name others in "
                "spec.dataset.eval, or remove these settings"
            )
        return None

    def _require_trainable(self, dataset: Dataset) -> None:
        """Raise StepFailure BAD_DATASET for rejected overlap or a source without rows."""
        overlap, evaluation = dataset.overlap, self.spec.eval
        if overlap is not None and evaluation is not None and evaluation.overlap == "fail":
            raise bad_dataset(
                f"{overlap.sentence()}; spec.dataset.eval.overlap is fail: remove them from one of the two, or set "
                "it to drop to leave them out of training"
            )
        if dataset.mix is None:
            return
        shares = dataset.mix.shares
        for name, share in zip(self._names(), shares, strict=True):
            if not share:
                raise bad_dataset(
                    f"{name} gives none of the {sum(shares)} rows of an epoch: raise its weight, or leave it out"
                )

    def _sources(self, *, usable: bool) -> tuple[tuple[TokenizedSource, ...], _HeldOut]:
        """The sources of training, and of rows that are only held out. `usable`: reject those without rows."""
        training, held_out = self._training_sources(usable=usable), dict[str, TokenizedSource]()
        # Read in the format of the first training source.
        field = next(iter(self.spec.training_sources))
        for each in held_out_sets(self.job):
            data = self._find(each.split, each.uri, evaluation_part(self.spec, each.rows, each.field))
            digest, rows = _checked_sha256(data, each.rows.sha256, f"{each.field}.sha256"), read_rows(data.files)
            like = training[0].reading.format, replace(training[0].columns, check=each.check)
            earlier = (*training, *held_out.values())
            held_out[each.split] = self._tokenize(
                each.split, data, digest, rows, field, earlier=earlier, usable=usable, like=like
            )
        return training, held_out

    def _names(self) -> list[str]:
        """The training sources' names in messages."""
        of_a_mix = self.spec.mix is not None
        sources = self.spec.training_sources.items()
        return [f"{source.source} ({field})" if of_a_mix else source.source for field, source in sources]

    def _training_sources(self, *, usable: bool) -> tuple[TokenizedSource, ...]:
        seed = self.training.seed if self.spec.shuffle else None
        sources: list[TokenizedSource] = []
        for number, (field, source) in enumerate(self.spec.training_sources.items()):
            part = "train" if self.spec.mix is None else f"train{number}"
            data = self._find(part, source.source, training_part(source, field))
            count = len(data.files) + sum(len(earlier.data.files) for earlier in sources)
            if count > MAX_FILES:
                raise bad_dataset(
                    f"the sources of the mix have {count} data files, at most {MAX_FILES} are allowed: merge them"
                )
            digest = _checked_sha256(data, source.sha256, f"{field}.sha256")
            rows = read_used_rows(data.files, self.spec.max_rows, seed)
            sources.append(self._tokenize(part, data, digest, rows, field, earlier=sources, usable=usable))
        return tuple(sources)

    def _find(self, part: str, uri: str, wanted: Wanted) -> DataFiles:
        self.say("reading the data set")
        return find_data(uri, wanted, self.access, self.scratch(f"download-{part}"))

    def _tokenize(
        self,
        part: str,
        data: DataFiles,
        digest: str,
        rows: Iterator[Row],
        field: str,
        *,
        earlier: Sequence[TokenizedSource],
        usable: bool,
        like: tuple[RowFormat, Columns] | None = None,
    ) -> TokenizedSource:
        """Tokenize a source's rows. `usable`: raise StepFailure if none can be used.

        `like`: their format and columns; found by the first row if not given.
        """
        before = data.versions()
        first = next(rows)
        format_, columns = like or source_format(first, self.spec, field, pairs=self.training.compares_answers)
        recipe = Recipe.from_spec(
            self.spec,
            self.training,
            self.tokenizer,
            format_,
            columns,
            field,
            vocabulary=self.vocabulary,
            longest=self._longest,
        )
        recipe.require_place_for_settings(self.tokenizer, data.uri)
        done_before = sum(source.rows.rows_read for source in earlier)
        waiting = partial(self.say, "waiting for another cell of the sweep to tokenize the same rows")
        with self.rows.part(part, self._rows_key(digest, recipe), recipe.limits, waiting) as files:
            chunks = tokenize(
                chain((first,), rows),
                ChunkMaker(recipe, self.tokenizer),
                files,
                available_cpus(),
                lambda done: self.say(f"tokenizing: {done_before + done} rows done"),
            )
        if data.versions() != before:
            raise bad_dataset(f"{data.uri} changed while it was read: start the job again when no process writes to it")
        reading = RowReader(format_, columns).reading(first)
        source = TokenizedSource(data, digest, reading, columns, TokenizedRows(chunks))
        if usable:
            _require_usable(source, recipe.longest_allowed)
        return source

    def _rows_key(self, digest: str, recipe: Recipe) -> str:
        """Stands for all that decides the tokens of a part whose data have this SHA-256."""
        inputs = {
            "data": digest,
            "identity": {
                "tokenizer": self.tokenizer_files,
                "libraries": library_versions(),
                "trainer": trainer_version(),
            },
            "chunk": [CHUNK_ROWS, CHUNK_BYTES],
            "format": recipe.format,
            "columns": recipe.columns.dump(),
            "trainOn": recipe.train_on,
            "longestAllowed": recipe.longest_allowed,
            "vocabulary": recipe.vocabulary,
            "maxRows": self.spec.max_rows,
            "shuffleSeed": self.training.seed if self.spec.shuffle else None,
            "chatTemplate": self.tokenizer.template_text,
            "systemPrompt": None if recipe.system_prompt is None else recipe.system_prompt.dump(),
        }
        return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def _checked_sha256(data: DataFiles, expected: str | None, field: str) -> str:
    """The data's SHA-256. Raises StepFailure BAD_DATASET unless it is the expected."""
    digest = data.sha256()
    if expected is not None and digest != expected:
        raise bad_dataset(
            f"{data.uri} has SHA-256 {digest}, but {field} is {expected}: the data has changed, or is not the intended "
            "data; restore it, or correct the field"
        )
    return digest


def _require_usable(source: TokenizedSource, longest_allowed: int) -> None:
    rows, name = source.rows, source.data.uri
    if len(rows):
        return
    if len(rows.too_long):
        raise bad_dataset(
            f"{name}: all {len(rows.too_long)} rows are longer than spec.training.maxSequenceLength "
            f"({longest_allowed}), the longest has {source.all_lengths().max()} tokens: raise it up to that, or "
            "shorten the rows"
        )
    if source.reading.format in PAIRS:
        chosen, rejected, *_ = source.reading.columns
        raise bad_dataset(
            f"{name}: in all {rows.rows_read} rows {chosen!r} and {rejected!r} are the same, so that there is nothing "
            "to prefer: check which columns have the two answers (columns.chosen and rejected)"
        )
    raise bad_dataset(
        f"{name}: none of the {rows.rows_read} rows has a token to train on: check the column with the answers, and "
        "the marks that exclude them, such as weight: 0"
    )
