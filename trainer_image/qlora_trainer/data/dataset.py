"""A job's data set, tokenized: the rows of each split, and the files for train."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy

from qlora_api.automatic import RowFacts
from qlora_api.choice import Choice
from qlora_api.printable import printable, shortened_in_the_middle
from qlora_api.schema import replace
from qlora_api.spec.dataset import Columns
from qlora_api.spec.resolved import ResolvedTraining
from qlora_api.status import MAX_MIXED_SOURCE_LENGTH, DatasetStatus, MixedSourceStatus
from qlora_trainer.data.epochs import EpochArrangements, Mix
from qlora_trainer.data.examples.formats import PAIRS, Reading
from qlora_trainer.data.packing import Arrangement, one_row_each, pack
from qlora_trainer.data.prepared import split_file, write_split
from qlora_trainer.data.read.files import DataFiles
from qlora_trainer.data.sampling import RowIndices
from qlora_trainer.data.selection import Selection
from qlora_trainer.data.statistics import (
    DataStatistics,
    Lengths,
    OverlapStatistics,
    SourceStatistics,
    SplitStatistics,
    dropped_rows,
)
from qlora_trainer.data.tokenize.chunks import Int32s, TokenizedRows

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

    def statistics(self, longest_allowed: int, counts: Mapping[str, object]) -> SourceStatistics:
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
            dropped=dropped_rows(self.rows, longest_allowed, pairs=self.reading.format in PAIRS),
            lengths=Lengths.from_lengths(self.all_lengths()),
            **counts,
        )


@dataclass(frozen=True)
class Dataset:
    """The rows of a job, with their sources and the splits that use them."""

    training: tuple[TokenizedSource, ...]
    held_out_sources: Mapping[str, TokenizedSource]
    """The sources of rows that are only held out, by split: of dataset.eval.source, if set, and of guards."""
    rows: TokenizedRows
    """Of the training sources, then of the evaluation's own."""
    selection: Selection
    mix: Mix | None = None
    weights: tuple[float | None, ...] = ()
    chosen_share: Choice | None = None
    """The share of held-out rows that was chosen, as the job leaves it open; None without any."""

    @property
    def sources(self) -> tuple[TokenizedSource, ...]:
        """The training sources, and those of rows that are only held out."""
        return (*self.training, *self.held_out_sources.values())

    @property
    def _guards(self) -> Mapping[str, TokenizedSource]:
        return {split: source for split, source in self.held_out_sources.items() if split != "eval"}

    def status(self) -> DatasetStatus:
        """The data set as the job's status reports it."""
        listed = "".join(f"{source.sha256}  {source.data.uri}\n" for source in self.training)
        return DatasetStatus(
            format=", ".join(sorted({source.reading.format for source in self.training})),
            rows=sum(source.rows.rows_read for source in self.training),
            used_rows=sum(map(len, self.selection.training)),
            eval_rows=sum(map(len, self.selection.held_out)),
            too_long_rows=sum(len(source.rows.too_long) for source in self.sources),
            longest_row_tokens=max(int(source.all_lengths().max()) for source in self.sources),
            duplicate_rows=sum(self.selection.duplicates[: len(self.training)]),
            overlap_rows=self.selection.overlap.count,
            tokens=sum(map(self._epoch_tokens, range(len(self.training)))),
            sha256=self.training[0].sha256 if self.mix is None else sha256(listed.encode()).hexdigest(),
            sources=None if self.mix is None else tuple(self._mixed_sources(self.mix)),
        )

    def _mixed_sources(self, mix: Mix) -> Iterator[MixedSourceStatus]:
        for number, source in enumerate(self.training):
            yield MixedSourceStatus(
                source=shortened_in_the_middle(source.data.uri, MAX_MIXED_SOURCE_LENGTH),
                rows=source.rows.rows_read,
                used_rows=len(self.selection.training[number]),
                epoch_rows=mix.shares[number],
                tokens=self._epoch_tokens(number),
            )

    def _epoch_tokens(self, source: int) -> int:
        """Tokens that a source gives to an epoch, on average with a mix."""
        used = self.selection.training[source]
        tokens = int(self.rows.lengths[used].sum(dtype=numpy.int64))
        return tokens if self.mix is None else round(Fraction(tokens * self.mix.shares[source], len(used)))

    @property
    def overlap(self) -> OverlapStatistics | None:
        """The rows for training that are also held out, or None."""
        found = self.selection.overlap
        if found.first is None:
            return None
        first, held_out = (printable(self.rows.location(row)) for row in found.first)
        left_out = self.selection.is_overlap_left_out
        return OverlapStatistics(rows=found.count, left_out=left_out, first=first, held_out=held_out)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks on the rows for the user."""
        of_columns = [
            f"{source.data.uri}: {source.reading.remark}" for source in self.training if source.reading.remark
        ]
        return (*of_columns, *(() if self.overlap is None else (self.overlap.remark(),)))

    def facts(self, sequence_length: int, seed: int, *, packed: bool) -> RowFacts:
        """Count the rows of an epoch, of the first one with a mix.

        `packed`: whether a sequence may have several rows.
        """
        used = numpy.concatenate(self.selection.training)
        rows = used if self.mix is None else used[next(self.mix.epochs(seed))]
        lengths = self.rows.lengths[rows]
        arrangement = pack(rows, lengths, sequence_length, seed) if packed else one_row_each(rows)
        return RowFacts(
            rows=len(rows),
            sequences=len(arrangement),
            loss_tokens=int(self.rows.target_counts[rows].sum(dtype=numpy.int64)),
            held_out=any(len(part) for part in self.selection.held_out),
        )

    def write(self, folder: Path, training: ResolvedTraining, *, packed: bool, on_epoch: Callable[[int], None]) -> None:
        """Write the files of the splits, and their statistics. Raises OSError if the disk is full.

        `packed`: whether a sequence may have several rows. `on_epoch` gets the number of each epoch that is drawn.
        """
        capacity = training.max_sequence_length
        used, epochs = numpy.concatenate(self.selection.training), None
        lengths = self.rows.lengths[used]

        def statistics(arrangement: Arrangement) -> SplitStatistics:
            return SplitStatistics.from_rows(self.rows, arrangement, capacity, packed=packed)

        def write(split: str, rows: RowIndices, of: TokenizedRows, training: ResolvedTraining) -> Arrangement:
            arrangement = _arrange(rows, of.lengths[rows], training, packed=packed)
            checks = None if split == "train" else of.checks(arrangement.rows)
            write_split(split_file(folder, split), of, arrangement, checks=checks)
            return arrangement

        if self.mix is None:
            train = statistics(write("train", used, self.rows, training))
        else:
            drawn = self.mix.epochs(training.seed)
            epochs = EpochArrangements.from_epochs(
                drawn, lambda rows: _arrange(rows, lengths[rows], training, packed=packed), training, folder, on_epoch
            )
            write_split(split_file(folder, "train"), self.rows, one_row_each(used), epochs)
            train = statistics(Arrangement(used[epochs.first.rows], epochs.first.offsets))
        held_out = self.selection.held_out
        evaluation = None
        if held_out:
            evaluation = statistics(write("eval", numpy.concatenate(held_out), self.rows, training))
        for split, source in self._guards.items():
            # In the same sequences for every seed: cells that train together share the losses of their base.
            write(split, numpy.arange(len(source.rows)), source.rows, replace(training, seed=0))
        DataStatistics(
            sources=tuple(self._source_statistics(capacity)),
            train=train,
            epochs=None if epochs is None else len(epochs.epoch_offsets) - 1,
            eval=evaluation,
            overlap=self.overlap,
        ).write(folder)

    def _source_statistics(self, capacity: int) -> Iterator[SourceStatistics]:
        selection, mix, own = self.selection, self.mix, self.held_out_sources.get("eval")
        held_out = list(map(len, selection.held_out))
        for number, source in enumerate(self.training):
            counts: dict[str, object] = {
                "duplicate_rows": selection.duplicates[number],
                "held_out_rows": held_out[number] if held_out and own is None else 0,
                "used_rows": len(selection.training[number]),
            }
            if mix is not None:
                counts |= {
                    "weight": self.weights[number],
                    "epoch_rows": mix.shares[number],
                    "epoch_tokens": self._epoch_tokens(number),
                }
            yield source.statistics(capacity, counts)
        if own is not None:
            counts = {"duplicate_rows": selection.duplicates[-1], "held_out_rows": held_out[0]}
            yield own.statistics(capacity, counts)
        for source in self._guards.values():
            yield source.statistics(capacity, {"held_out_rows": len(source.rows)})


def _arrange(rows: RowIndices, lengths: Int32s, training: ResolvedTraining, *, packed: bool) -> Arrangement:
    return pack(rows, lengths, training.max_sequence_length, training.seed) if packed else one_row_each(rows)
