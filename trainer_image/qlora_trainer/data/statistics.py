"""The statistics of a data set for the report: a file next to the prepared data."""

import json
from pathlib import Path

import numpy
from numpy.typing import NDArray
from pydantic import Field

from qlora_api.schema import ObservedModel
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.data.packing import Arrangement
from qlora_trainer.data.tokenize.chunks import TokenizedRows

STATISTICS = "statistics.json"
EQUAL_ANSWERS = "chosen and rejected are the same"
"""Why a pair is left out."""


class LengthCount(ObservedModel):
    """One bar of a histogram."""

    up_to: int = Field(description="Tokens of the longest rows that the bar counts.")
    rows: int


class Lengths(ObservedModel):
    """Lengths of the rows in tokens, rows that are left out included."""

    shortest: int
    mean: float
    median: int
    p90: int
    p99: int
    longest: int
    histogram: tuple[LengthCount, ...] = Field(description="Bars whose upper ends are consecutive powers of two.")

    @classmethod
    def from_lengths(cls, lengths: NDArray[numpy.int32]) -> "Lengths":
        """The statistics of at least one row's length. `lengths`: int32 [rows]."""
        ordered = numpy.sort(lengths)
        top = max(int(ordered[-1]) - 1, 0).bit_length()
        bottom = max(int(ordered[0]) - 1, 0).bit_length()
        counts = numpy.bincount(numpy.ceil(numpy.log2(numpy.maximum(ordered, 1))).astype(int), minlength=top + 1)
        at = [int(ordered[min(len(ordered) - 1, int(part * len(ordered)))]) for part in (0.5, 0.9, 0.99)]
        return cls(
            shortest=int(ordered[0]),
            mean=round(float(ordered.mean()), 2),
            median=at[0],
            p90=at[1],
            p99=at[2],
            longest=int(ordered[-1]),
            histogram=tuple(LengthCount(up_to=2**bar, rows=int(counts[bar])) for bar in range(bottom, top + 1)),
        )


class DroppedRows(ObservedModel):
    """Rows that were read but not used, for one reason."""

    reason: str
    rows: int
    first: str = Field(description="Location of the first of them.")


class SplitStatistics(ObservedModel):
    """The sequences of one split."""

    rows: int
    tokens: int
    target_tokens: int = Field(description="Tokens that count in the loss.")
    sequences: int
    sequence_length: int = Field(description="Tokens that a sequence may hold.")
    packed: bool
    packing_efficiency: float = Field(description="Tokens, as a fraction of what the sequences could hold.")

    @classmethod
    def from_rows(
        cls, rows: TokenizedRows, arrangement: Arrangement, capacity: int, *, packed: bool
    ) -> "SplitStatistics":
        """The statistics of `rows` in sequences of at most `capacity` tokens."""
        tokens = int(rows.lengths[arrangement.rows].sum(dtype=numpy.int64))
        return cls(
            rows=len(arrangement.rows),
            tokens=tokens,
            target_tokens=int(rows.target_counts[arrangement.rows].sum(dtype=numpy.int64)),
            sequences=len(arrangement),
            sequence_length=capacity,
            packed=packed,
            packing_efficiency=round(tokens / (len(arrangement) * capacity), 4),
        )


class SourceStatistics(ObservedModel):
    """Statistics of the rows from one address."""

    uri: str
    files: tuple[str, ...] = Field(description="Names of the first hundred files.")
    file_count: int
    sha256: str
    format: str
    columns: tuple[str, ...] = Field(description="Columns that are used.")
    ignored_columns: tuple[str, ...]
    rows_read: int
    dropped: tuple[DroppedRows, ...] = ()
    duplicate_rows: int = Field(0, description="Rows with the tokens of an earlier one, also of an earlier source.")
    held_out_rows: int = 0
    used_rows: int = Field(0, description="Rows that are trained on.")
    weight: float | None = Field(None, description="As in the mix; not set without one.")
    epoch_rows: int | None = Field(None, description="Rows drawn in each epoch; not set without a mix.")
    epoch_tokens: int | None = Field(None, description="Tokens of these on average; not set without a mix.")
    lengths: Lengths


class OverlapStatistics(ObservedModel):
    """Rows for training that are also held out, token for token."""

    rows: int
    left_out: bool = Field(description="Whether they are left out of training.")
    first: str = Field(description="Location of the first of them.")
    held_out: str = Field(description="Location of the first held-out row that is equal to it.")

    def sentence(self) -> str:
        """Report their number, and the place of the first."""
        subject = "1 row for training is" if self.rows == 1 else f"{self.rows:,} rows for training are"
        return f"{subject} also held out: the first, {self.first}, is equal to {self.held_out}"

    def remark(self) -> str:
        """The same, and what is done about it."""
        return f"{self.sentence()}; {'left out of training' if self.left_out else 'trained on nevertheless'}"


class DataStatistics(ObservedModel):
    """The file `statistics.json` of a data folder."""

    sources: tuple[SourceStatistics, ...] = Field(description="The training rows', the evaluation's own, the guards'.")
    train: SplitStatistics = Field(description="With a mix, of the first epoch.")
    epochs: int | None = Field(None, description="Epochs whose rows are drawn; not set without a mix.")
    eval: SplitStatistics | None = None
    overlap: OverlapStatistics | None = Field(None, description="Not set if no row is trained on and held out.")

    def write(self, folder: Path) -> None:
        """Write it to a data folder."""
        content = json.dumps(self.dump(), indent=2, sort_keys=True, allow_nan=False)
        write_atomically(folder / STATISTICS, content.encode() + b"\n")

    @classmethod
    def read(cls, folder: Path) -> "DataStatistics":
        """Read it from a data folder. Raises FileNotFoundError or ValidationError."""
        return cls.model_validate_json((folder / STATISTICS).read_bytes())


def dropped_rows(rows: TokenizedRows, longest_allowed: int, *, pairs: bool) -> tuple[DroppedRows, ...]:
    """The rows that are not used, by reason. `pairs`: each row is a pair of answers."""
    too_long = DroppedRows(
        reason=f"longer than {longest_allowed} tokens (spec.training.maxSequenceLength)",
        rows=len(rows.too_long),
        first=next((dropped.first_too_long for dropped in rows.dropped if dropped.first_too_long), ""),
    )
    return tuple(part for part in (too_long, unlabeled_rows(rows, pairs=pairs)) if part.rows)


def unlabeled_rows(rows: TokenizedRows, *, pairs: bool) -> DroppedRows:
    """The rows that are left out because no token of them counts in the loss."""
    return DroppedRows(
        reason=EQUAL_ANSWERS if pairs else "no token to train on",
        rows=sum(dropped.unlabeled for dropped in rows.dropped),
        first=next((dropped.first_unlabeled for dropped in rows.dropped if dropped.first_unlabeled), ""),
    )
