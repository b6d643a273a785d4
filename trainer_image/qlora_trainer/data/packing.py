"""Decides which rows share a sequence.

Rows are not sorted by length. That saves 1 to 2 % of padding, but reached 48 % on the demo's data where unpacked rows
reached 61 % (one run each, one sequence per optimizer step).
"""

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from qlora_trainer.data.sampling import Purpose, RowIndices, permutation


@dataclass(frozen=True)
class Arrangement:
    """Which rows a split's sequences hold, in order."""

    rows: RowIndices
    """int64 [rows]: indices of the rows, sequence after sequence."""
    offsets: NDArray[numpy.int64]
    """int64 [sequences + 1]: where a sequence begins in `rows`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence(self, index: int) -> RowIndices:
        """The rows of the sequence at `index`."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]


def one_row_each(rows: RowIndices) -> Arrangement:
    """The arrangement without packing: each row is a sequence, in the order of `rows`."""
    return Arrangement(rows, numpy.arange(len(rows) + 1))


def pack(rows: RowIndices, lengths: NDArray[numpy.int32], capacity: int, seed: int) -> Arrangement:
    """Put `rows` of `lengths` tokens into sequences of at most `capacity` tokens: best fit, in an order from `seed`.

    Every row is in exactly one sequence. Each goes, in turn, where the least room is left over. Rows longer than half a
    sequence go first, as no two of them can share one. Sorting all rows by length (best fit decreasing) would waste a
    little less, but put rows of one length, and so of one kind, together. In random order best fit wastes
    O(sqrt(n) log(n)^(3/4)) sequences for uniformly distributed lengths (Shor 1986, Combinatorica 6(2)).

    Time: n scans of `capacity` bits. Memory: some 32 bytes per row. Raises ValueError if a row is empty or longer than
    `capacity`.
    """
    wrong = numpy.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(wrong):
        raise ValueError(f"row {rows[wrong[0]]} has {lengths[wrong[0]]} tokens: must be from 1 to {capacity}")
    order = permutation(len(lengths), seed, Purpose.PACKING)
    order = order[numpy.argsort(lengths[order] <= capacity // 2, kind="stable")]
    sequence_of = _best_fit(lengths[order], capacity)
    sizes = numpy.bincount(sequence_of)
    return Arrangement(
        rows[order[numpy.argsort(sequence_of, kind="stable")]],
        numpy.concatenate(([0], numpy.cumsum(sizes))).astype(numpy.int64),
    )


def _best_fit(lengths: NDArray[numpy.int32], capacity: int) -> NDArray[numpy.int32]:
    """int32 [rows]: the sequence of each row, numbered in the order of their opening."""
    open_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set where there is a sequence with room for exactly r tokens: the next set bit is found in one operation.
    rooms, opened = 0, 0
    chosen = numpy.empty(len(lengths), dtype=numpy.int32)
    for row, length in enumerate(lengths.tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = open_by_room[room].pop()
            if not open_by_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence, opened = capacity, opened, opened + 1
        chosen[row] = sequence
        left = room - length
        if left:
            open_by_room[left].append(sequence)
            rooms |= 1 << left
    return chosen
