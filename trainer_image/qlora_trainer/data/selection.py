"""Chooses the rows to train on and to hold out, and finds equal ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy
from numpy.typing import NDArray

from qlora_api.spec.dataset import DatasetSpec
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.sampling import RowIndices, hold_out
from qlora_trainer.data.tokenize.chunks import Digests


def first_equal(digests: Digests) -> RowIndices:
    """int64 [rows]: each row's first equal one, by the digests (uint8 [rows, 16])."""
    halves = numpy.ascontiguousarray(digests).view(numpy.uint64)
    # lexsort is stable: equal rows follow each other in the order of their indices.
    order = numpy.lexsort((halves[:, 0], halves[:, 1]))
    begins = numpy.ones(len(order), dtype=bool)
    begins[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
    first = numpy.empty(len(order), dtype=numpy.int64)
    first[order] = order[numpy.flatnonzero(begins)[numpy.cumsum(begins) - 1]]
    return first


@dataclass(frozen=True)
class Overlap:
    """Rows for training that are equal to rows that are held out."""

    is_held_out: NDArray[numpy.bool_]
    """bool [training rows]: which of them."""
    first: tuple[int, int] | None
    """The first of them, and the first held-out row that is equal to it, or None."""

    @classmethod
    def from_rows(cls, first_equal_: RowIndices, training: RowIndices, held_out: RowIndices) -> "Overlap":
        """The overlap of `training` and `held_out`, row indices for `first_equal_`."""
        is_held_out = numpy.isin(first_equal_[training], first_equal_[held_out])
        found = training[is_held_out]
        if not len(found):
            return cls(is_held_out, None)
        same = held_out[first_equal_[held_out] == first_equal_[found[0]]]
        return cls(is_held_out, (int(found[0]), int(same[0])))

    @property
    def count(self) -> int:
        """Rows for training that are held out too."""
        return int(self.is_held_out.sum())


@dataclass(frozen=True)
class Selection:
    """The rows of each split: ascending indices into the rows of consecutive sources."""

    training: tuple[RowIndices, ...]
    """Of each training source: those that are trained on."""
    held_out: tuple[RowIndices, ...]
    """Of each training source, or of the evaluation's separate source."""
    duplicates: tuple[int, ...]
    """Of each training source, how many rows are equal to an earlier row, also of an earlier source. Then of the
    evaluation's separate source, how many are equal to an earlier one of it.
    """
    overlap: Overlap
    """Of training and held-out rows, before any are left out for it."""
    is_overlap_left_out: bool = False


def select_rows(
    spec: DatasetSpec, seed: int, sources: Mapping[str, int], own_rows: int, first_equal: RowIndices
) -> Selection:
    """The rows of each split. Duplicates are left out first, then rows are held out, then the overlap is left out.

    `sources` has the number of rows of each training source, by its name for messages; `own_rows` is that of the
    evaluation's own source, whose rows follow those of all others. `first_equal` is each row's first equal one.
    Raises StepFailure (BAD_DATASET) if a source has no rows left to train on.
    """
    bounds = numpy.cumsum([0, *sources.values()])
    ranges = [numpy.arange(first, end) for first, end in pairwise(bounds.tolist())]
    firsts = [rows[first_equal[rows] == rows] for rows in ranges]
    usable = firsts if spec.deduplicate else ranges
    for name, rows in zip(sources, usable, strict=True):
        _require_rows(rows, name, "is a duplicate of an earlier row: leave the source out, or unset deduplicate")
    own = numpy.arange(bounds[-1], bounds[-1] + own_rows)
    # Equal to no earlier one of them. Other rows may be equal.
    _, positions = numpy.unique(first_equal[own], return_index=True)
    own_firsts = own[numpy.sort(positions)]
    training: tuple[RowIndices, ...] = tuple(usable)
    held_out: tuple[RowIndices, ...] = ()
    evaluation = spec.eval
    if evaluation is not None and evaluation.fraction:
        divided = [
            [rows[part] for part in hold_out(len(rows), evaluation.fraction, seed, name)]
            for name, rows in zip(sources, usable, strict=True)
        ]
        training, held_out = tuple(kept for kept, _ in divided), tuple(chosen for _, chosen in divided)
    elif evaluation is not None and evaluation.source is not None:
        held_out = (own_firsts if spec.deduplicate else own,)
    overlap = Overlap.from_rows(first_equal, numpy.concatenate(training), numpy.concatenate([bounds[:0], *held_out]))
    drops = evaluation is not None and evaluation.overlap == "drop"
    if drops:
        flags = numpy.split(overlap.is_held_out, numpy.cumsum([len(rows) for rows in training])[:-1])
        training = tuple(rows[~held_out] for rows, held_out in zip(training, flags, strict=True))
        for name, rows in zip(sources, training, strict=True):
            _require_rows(rows, name, "is held out too: hold out others, or set spec.dataset.eval.overlap to report")
    duplicates = (
        *(len(rows) - len(kept) for rows, kept in zip(ranges, firsts, strict=True)),
        len(own) - len(own_firsts),
    )
    return Selection(training, held_out, duplicates, overlap, drops)


def _require_rows(rows: RowIndices, name: str, why: str) -> None:
    if not len(rows):
        raise bad_dataset(f"{name} has no row left to train on, as each of its rows {why}")
