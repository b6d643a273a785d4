"""Finds rows that are equal, token for token and target for target: duplicates, and rows on both sides of a split."""

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from qlora_trainer.data.chunks import Digests
from qlora_trainer.data.sampling import RowIndices


def first_equal(digests: Digests) -> RowIndices:
    """int64 [rows]: for each row the index of the first that is equal to it, its own if none is before it.

    `digests`: uint8 [rows, 16]. Takes some 60 bytes per row, by sorting.
    """
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
    """The first of them, and the first held-out row that is equal to it; None if there are none."""

    @classmethod
    def of(cls, first_equal_: RowIndices, training: RowIndices, held_out: RowIndices) -> "Overlap":
        """The overlap of `training` and `held_out`, indices into the rows that `first_equal_` describes."""
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
