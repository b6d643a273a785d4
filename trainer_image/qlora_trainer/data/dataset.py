"""A job's data set, tokenized: which rows each split has, and the files that the train step reads."""

from dataclasses import dataclass
from pathlib import Path

import numpy

from qlora_api.dataset import Columns
from qlora_api.status import DatasetStatus
from qlora_trainer.data.chunks import Int32s, TokenizedRows
from qlora_trainer.data.files import DataFiles
from qlora_trainer.data.formats import Reading
from qlora_trainer.data.packing import one_row_each, pack
from qlora_trainer.data.prepared import Split, split_file, write_split
from qlora_trainer.data.sampling import RowIndices
from qlora_trainer.data.statistics import DataStatistics, Lengths, SourceStatistics, SplitStatistics, dropped_rows

_LISTED_FILES = 100


@dataclass(frozen=True)
class TokenizedSource:
    """The tokenized rows of one address, and how they were read."""

    data: DataFiles
    sha256: str
    reading: Reading
    columns: Columns
    rows: TokenizedRows

    def all_lengths(self) -> Int32s:
        """int32 [rows]: tokens of each row, those of rows that are too long last."""
        return numpy.concatenate([self.rows.lengths, self.rows.too_long])

    def statistics(self, longest_allowed: int) -> SourceStatistics:
        """Its part of `statistics.json`. `longest_allowed`: tokens of a sequence."""
        return SourceStatistics(
            uri=self.data.uri,
            files=self.data.relative_names[:_LISTED_FILES],
            file_count=len(self.data.files),
            sha256=self.sha256,
            format=self.reading.format,
            columns=self.reading.columns,
            ignored_columns=self.reading.ignored,
            rows_read=self.rows.rows_read,
            dropped=dropped_rows(self.rows, longest_allowed),
            lengths=Lengths.of(self.all_lengths()),
        )


@dataclass(frozen=True)
class Dataset:
    """The rows of a job: where they come from, and which of them are trained on and held out."""

    training: TokenizedSource
    training_rows: RowIndices
    """Into `training.rows`."""
    evaluation: TokenizedSource | None
    """The source of the held-out rows: `training` itself where a fraction of it is held out; None without any."""
    evaluation_rows: RowIndices
    """Into `evaluation.rows`."""

    @property
    def sources(self) -> tuple[TokenizedSource, ...]:
        """The training source, and the evaluation source if that is another one."""
        own = None if self.evaluation is self.training else self.evaluation
        return (self.training,) if own is None else (self.training, own)

    @property
    def evaluation_sha256(self) -> str | None:
        """SHA-256 of the evaluation's own data; None if it has none."""
        return self.sources[1].sha256 if len(self.sources) > 1 else None

    def status(self) -> DatasetStatus:
        """The data set as the job's status reports it."""
        return DatasetStatus(
            format=self.training.reading.format,
            rows=self.training.rows.rows_read,
            used_rows=len(self.training_rows),
            eval_rows=len(self.evaluation_rows),
            too_long_rows=sum(len(source.rows.too_long) for source in self.sources),
            longest_row_tokens=max(int(source.all_lengths().max()) for source in self.sources),
            tokens=int(self.training.rows.lengths[self.training_rows].sum(dtype=numpy.int64)),
            sha256=self.training.sha256,
        )

    def write(self, folder: Path, *, capacity: int, seed: int, packed: bool) -> None:
        """Write the files of the splits, and their statistics.

        `capacity`: tokens of a sequence. `packed`: whether a sequence may have several rows; `seed` then chooses them.
        Raises OSError if the disk is full.
        """

        def write(split: Split, rows: TokenizedRows, used: RowIndices) -> SplitStatistics:
            arrangement = pack(used, rows.lengths[used], capacity, seed) if packed else one_row_each(used)
            write_split(split_file(folder, split), rows, arrangement)
            return SplitStatistics.of(rows, arrangement, capacity, packed=packed)

        train = write("train", self.training.rows, self.training_rows)
        evaluation = None
        if self.evaluation is not None:
            evaluation = write("eval", self.evaluation.rows, self.evaluation_rows)
        sources = tuple(source.statistics(capacity) for source in self.sources)
        DataStatistics(sources=sources, train=train, eval=evaluation).write(folder)
