"""Turns data files into tokenized rows for training and evaluation; changes with which rows are used."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path

from qlora_api.dataset import DatasetSpec
from qlora_api.status import DatasetStatus
from qlora_api.training import TrainingSpec
from qlora_trainer.data import Row, read_rows
from qlora_trainer.data_source import DataFile
from qlora_trainer.disk import file_sha256
from qlora_trainer.failures import bad_configuration, bad_dataset
from qlora_trainer.formats import Format, RowReader, detect_format
from qlora_trainer.packing import one_row_each, pack
from qlora_trainer.prepared import Split, TokenizedRows, write_split
from qlora_trainer.templates import Tokenizer

_BATCH_ROWS = 128

OnRows = Callable[[int], None]
"""Called with the rows tokenized so far."""


@dataclass(frozen=True)
class TokenizedFile:
    """The usable rows of one data file, and how many were not."""

    rows: TokenizedRows
    format: Format
    rows_read: int
    too_long: int
    """Rows left out because they have more tokens than a sequence may."""
    unlabelled: int
    """Rows left out because none of their tokens counts in the loss."""
    longest: int
    """Tokens of the longest row, left out or not."""
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """The rows of a job: where they come from, and which are trained on (by index into `training.rows`)."""

    training: TokenizedFile
    training_rows: tuple[int, ...]
    evaluation: TokenizedFile | None
    evaluation_rows: tuple[int, ...]

    @property
    def evaluation_sha256(self) -> str | None:
        """SHA-256 of the evaluation's own file, if it has one."""
        own = None if self.evaluation is self.training else self.evaluation
        return None if own is None else own.sha256

    def status(self) -> DatasetStatus:
        """What is told about it."""
        files = {id(file): file for file in (self.training, self.evaluation) if file is not None}.values()
        lengths = self.training.rows.lengths
        return DatasetStatus(
            format=self.training.format,
            rows=self.training.rows_read,
            used_rows=len(self.training_rows),
            eval_rows=len(self.evaluation_rows),
            too_long_rows=sum(file.too_long for file in files),
            longest_row_tokens=max(file.longest for file in files),
            tokens=sum(lengths[row] for row in self.training_rows),
            sha256=self.training.sha256,
        )


def build_dataset(
    spec: DatasetSpec,
    training: TrainingSpec,
    find: Callable[[str, Split], DataFile],
    tokenizer: Tokenizer,
    vocabulary: int,
    on_rows: OnRows,
) -> Dataset:
    """Read, check and tokenize the data set of a job. `find` has the file of an address, for `train` or `eval`.

    `vocabulary` is the number of tokens that the model knows. Raises StepFailure BAD_DATASET for anything wrong with
    the data.
    """
    file = find(spec.source, "train")
    digest = file_sha256(file.path)
    if spec.sha256 is not None and digest != spec.sha256:
        raise bad_dataset(f"{file.name} has SHA-256 {digest}, but spec.dataset.sha256 is {spec.sha256}: it has changed")
    tokenize = _FileTokenizer(spec, training, tokenizer, vocabulary)
    trained = tokenize(file, digest, None if spec.format == "auto" else spec.format, spec.max_samples, on_rows)
    everything = tuple(range(len(trained.rows)))
    if spec.eval is None:
        return Dataset(trained, everything, None, ())
    if spec.eval.fraction is not None:
        kept, held_out = hold_out(len(trained.rows), spec.eval.fraction, training.seed, file.name)
        return Dataset(trained, kept, trained, held_out)
    own = find(spec.eval.source or "", "eval")
    evaluated = tokenize(
        own, file_sha256(own.path), trained.format, None, lambda rows: on_rows(trained.rows_read + rows)
    )
    return Dataset(trained, everything, evaluated, tuple(range(len(evaluated.rows))))


def hold_out(rows: int, fraction: float, seed: int, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the rows that are kept and of those held out: the nearest number to `fraction`, at least one of each.

    Which ones depends on `rows` and `seed` only: those whose SHA-256 of "seed:index" is smallest. Raises StepFailure
    BAD_DATASET if there are fewer than two rows.
    """
    if rows < 2:
        raise bad_dataset(
            f"{name} has {rows} usable row: to hold out a fraction (spec.dataset.eval.fraction) it needs at least two"
        )
    count = min(max(round(fraction * rows), 1), rows - 1)
    held_out = sorted(sorted(range(rows), key=lambda row: sha256(f"{seed}:{row}".encode()).digest())[:count])
    chosen = frozenset(held_out)
    return tuple(row for row in range(rows) if row not in chosen), tuple(held_out)


class _FileTokenizer:
    """Tokenizes the files of one job, all in the same way."""

    def __init__(self, spec: DatasetSpec, training: TrainingSpec, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._columns = spec.columns
        self._train_on = training.train_on
        self._longest_allowed = training.max_sequence_length
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def __call__(
        self, file: DataFile, digest: str, format_: Format | None, limit: int | None, on_rows: OnRows
    ) -> TokenizedFile:
        """The usable rows among the first `limit` rows of `file`; the format is detected from the first if None."""
        rows = islice(read_rows(file), limit)
        first = next(rows)
        reader = RowReader(format_ or detect_format(first, self._columns), self._columns)
        tokenized = TokenizedRows()
        rows_read = too_long = unlabelled = longest = 0
        for batch in _batches(chain((first,), rows), _BATCH_ROWS):
            rendered = [self._tokenizer.render(reader.read(row), row.place) for row in batch]
            for tokens in self._tokenizer.tokenize(rendered, self._train_on):
                longest = max(longest, len(tokens.input_ids))
                if len(tokens.input_ids) > self._longest_allowed:
                    too_long += 1
                elif not any(tokens.is_target):
                    unlabelled += 1
                else:
                    self._require_known(tokens.input_ids)
                    tokenized.append(tokens.input_ids, tokens.is_target)
            rows_read += len(batch)
            on_rows(rows_read)
        result = TokenizedFile(tokenized, reader.format, rows_read, too_long, unlabelled, longest, digest)
        _require_usable(result, file.name, self._longest_allowed)
        return result

    def _require_known(self, input_ids: Iterable[int]) -> None:
        largest = max(input_ids)
        if largest >= self._vocabulary:
            raise bad_configuration(
                f"the tokenizer makes token {largest}, but the model knows only {self._vocabulary} (vocab_size): "
                "the tokenizer belongs to another model"
            )


def _require_usable(file: TokenizedFile, name: str, longest_allowed: int) -> None:
    if len(file.rows):
        return
    if file.too_long:
        raise bad_dataset(
            f"{name}: all {file.too_long} rows are longer than spec.training.maxSequenceLength ({longest_allowed}), "
            f"the longest has {file.longest} tokens: raise it up to that, or shorten the rows"
        )
    raise bad_dataset(f"{name}: none of the {file.rows_read} rows has a token to learn: check the answers' column")


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(islice(rows, size)):
        yield batch


def write_sequences(path: Path, rows: TokenizedRows, used: tuple[int, ...], capacity: int, *, packed: bool) -> None:
    """Write the used rows as the file of a split, several in a sequence of at most `capacity` tokens if `packed`."""
    if not packed:
        write_split(path, rows, one_row_each(used))
        return
    lengths = rows.lengths
    packed_rows = pack([lengths[row] for row in used], capacity)
    write_split(path, rows, [[used[index] for index in sequence] for sequence in packed_rows])
