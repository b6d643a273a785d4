"""Decides which rows share a sequence; changes with the packing method."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows of `lengths` tokens into as few sequences of at most `capacity` tokens as best fit decreasing finds.

    Returns, for each sequence, the indices of its rows; every row is in exactly one. The longest row goes first, each
    into the sequence where the least room is left over, so the result depends on nothing but the arguments. It needs at
    most 11/9 times the fewest sequences possible, plus four (Johnson et al. 1974, SIAM J. Comput. 3(4)).

    Raises ValueError if a row is empty or longer than `capacity`.
    """
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, index of the sequence), ascending
    for row in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[row]
        if not 1 <= length <= capacity:
            raise ValueError(f"row {row} has {length} tokens: must be from 1 to {capacity}")
        place = bisect_left(room, (length, -1))
        if place == len(room):
            left, sequence = capacity, len(sequences)
            sequences.append([])
        else:
            left, sequence = room.pop(place)
        sequences[sequence].append(row)
        if left > length:
            insort(room, (left - length, sequence))
    return sequences


def one_row_each(rows: Iterable[int]) -> list[list[int]]:
    """The arrangement without packing: each row is a sequence."""
    return [[row] for row in rows]
