"""Builds the data set of a job: finds its files, reads and tokenizes their rows, and chooses the rows of each split."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy

from qlora_api.dataset import Columns, DatasetSpec, EvalSpec, RowFormat
from qlora_api.training import TrainingSpec
from qlora_trainer.core.environment import available_cpus, trainer_version
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.chat_template import Tokenizer
from qlora_trainer.data.chunks import TokenizedRows
from qlora_trainer.data.dataset import Dataset, TokenizedSource
from qlora_trainer.data.files import DataFiles
from qlora_trainer.data.fingerprint import library_versions
from qlora_trainer.data.formats import RowReader, detect_format
from qlora_trainer.data.hub_splits import Wanted, evaluation_part, training_part
from qlora_trainer.data.locate import DataAccess, find_data
from qlora_trainer.data.prepared import Split
from qlora_trainer.data.reading import read_rows, read_sample
from qlora_trainer.data.rows import Row
from qlora_trainer.data.sampling import hold_out
from qlora_trainer.data.tokenize import CHUNK_BYTES, CHUNK_ROWS, ChunkMaker, Recipe, tokenize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetBuilder:
    """Builds the data set of one job. Methods raise StepFailure, BAD_DATASET for invalid data."""

    spec: DatasetSpec
    training: TrainingSpec
    tokenizer: Tokenizer
    tokenizer_files: Mapping[str, str]
    """SHA-256 of each of the tokenizer's files."""
    vocabulary: int
    """Tokens that the model has."""
    access: DataAccess
    scratch: Callable[[str], Path]
    """Gives folders, by name, for what the next attempt resumes from."""
    say: Callable[[str], None]
    """Called with what is being done, for the progress record."""

    def build(self) -> Dataset:
        """The data set: all rows tokenized, and which of them are trained on and held out."""
        if self.spec.shuffle and self.spec.max_samples is None:
            logger.warning(
                "spec.dataset.shuffle has no effect without spec.dataset.maxSamples, whose rows it chooses: set "
                "maxSamples, or leave shuffle out; training.seed orders the rows of each epoch anyway"
            )
        training = self._training_source()
        everything = numpy.arange(len(training.rows))
        evaluation = self.spec.eval
        if evaluation is None:
            return Dataset(training, everything, None, everything[:0])
        if evaluation.fraction is not None:
            seed, name = self.training.seed, training.data.uri
            kept, held_out = hold_out(len(training.rows), evaluation.fraction, seed, name)
            return Dataset(training, kept, training, held_out)
        own = self._evaluation_source(evaluation, training)
        return Dataset(training, everything, own, numpy.arange(len(own.rows)))

    def _training_source(self) -> TokenizedSource:
        spec = self.spec
        data = self._find("train", spec.source, training_part(spec))
        digest = _checked_sha256(data, spec.sha256, "spec.dataset.sha256")
        rows = read_sample(data.files, spec.max_samples, self.training.seed if spec.shuffle else None)
        return self._tokenized("train", data, digest, rows)

    def _evaluation_source(self, spec: EvalSpec, training: TokenizedSource) -> TokenizedSource:
        """The evaluation's own source, read in the format of the training source."""
        data = self._find("eval", spec.source or "", evaluation_part(self.spec, spec))
        digest = _checked_sha256(data, spec.sha256, "spec.dataset.eval.sha256")
        return self._tokenized("eval", data, digest, read_rows(data.files), like=training)

    def _find(self, split: Split, uri: str, wanted: Wanted) -> DataFiles:
        self.say("reading the data set")
        return find_data(uri, wanted, self.access, self.scratch(f"download-{split}"))

    def _tokenized(
        self, split: Split, data: DataFiles, digest: str, rows: Iterator[Row], like: TokenizedSource | None = None
    ) -> TokenizedSource:
        """The rows of the files, tokenized; in the format of `like` if it is set."""
        before = data.versions()
        first = next(rows)
        format_, columns = self._format_of(first) if like is None else (like.reading.format, like.columns)
        recipe = self._recipe(format_, columns)
        recipe.require_place_for_settings(self.tokenizer, data.uri)
        done_before = 0 if like is None else like.rows.rows_read
        chunks = tokenize(
            chain((first,), rows),
            ChunkMaker(recipe, self.tokenizer),
            self._chunk_prefix(split, digest, recipe),
            available_cpus(),
            lambda done: self.say(f"tokenizing: {done_before + done} rows done"),
        )
        if data.versions() != before:
            raise bad_dataset(f"{data.uri} changed while it was read: start the job again when nobody writes to it")
        reading = RowReader(format_, columns).reading(first)
        source = TokenizedSource(data, digest, reading, columns, TokenizedRows(chunks))
        _require_usable(source, recipe.longest_allowed)
        return source

    def _format_of(self, first: Row) -> tuple[RowFormat, Columns]:
        if self.spec.format == "auto":
            return detect_format(first, self.spec.columns, pairs=self.training.compares_answers)
        return self.spec.format, self.spec.columns or Columns()

    def _recipe(self, format_: RowFormat, columns: Columns) -> Recipe:
        return Recipe.of(self.spec, self.training, self.tokenizer, format_, columns, vocabulary=self.vocabulary)

    def _chunk_prefix(self, split: Split, digest: str, recipe: Recipe) -> Path:
        """How the paths of the chunks begin. Deletes the split's chunks of other data or settings."""
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
            "maxSamples": self.spec.max_samples,
            "shuffleSeed": self.training.seed if self.spec.shuffle else None,
            "chatTemplate": self.tokenizer.template_text,
            "systemPrompt": None if recipe.system_prompt is None else recipe.system_prompt.dump(),
        }
        key = sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
        folder = self.scratch("rows")
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{split}-*"):
            if not path.name.startswith(f"{split}-{key}-"):
                path.unlink()
        return folder / f"{split}-{key}"


def _checked_sha256(data: DataFiles, expected: str | None, field: str) -> str:
    """The data's SHA-256. Raises StepFailure BAD_DATASET if the job's `field` expects another one."""
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
    raise bad_dataset(
        f"{name}: none of the {rows.rows_read} rows has a token to train on: check the column with the answers"
    )
