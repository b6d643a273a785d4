"""Draws rows at random from a seed: their order, which are held out, which are used.

Randomness is the raw output of Philox (Salmon et al. 2011), which numpy promises never to change, unlike what its
generators derive from it.
"""

from enum import IntEnum

import numpy
from numpy.typing import NDArray

from qlora_trainer.core.failures import bad_dataset

RowIndices = NDArray[numpy.int64]
"""int64 [n]: indices of rows."""


class Purpose(IntEnum):
    """A permutation's purpose, with a separate random stream. Smaller keys: epochs."""

    USED = 2**32
    HELD_OUT = 2**32 + 1
    PACKING = 2**32 + 2
    MIX = 2**32 + 3


def permutation(count: int, seed: int, purpose: Purpose, part: tuple[int, int] = (0, 0)) -> RowIndices:
    """The numbers from 0 to `count` - 1 in an order that the arguments alone decide.

    `part` is the upper half of the generator's counter: no two parts have numbers of one stream in common.
    """
    key, counter = (numpy.array(words, dtype=numpy.uint64) for words in ((seed, purpose), (0, 0, *part)))
    drawn = numpy.random.Philox(key=key, counter=counter).random_raw(count)
    return numpy.argsort(drawn, kind="stable")


def used_rows(count: int, limit: int, seed: int) -> RowIndices:
    """The `limit` of `count` rows that `seed` chooses, ascending, or all rows."""
    return numpy.sort(permutation(count, seed, Purpose.USED)[:limit])


def hold_out(count: int, fraction: float, seed: int, name: str) -> tuple[RowIndices, RowIndices]:
    """Row indices to keep and to hold out, ascending. Raises StepFailure for one row."""
    if count < 2:
        raise bad_dataset(
            f"{name} has {count} usable row: to hold out a fraction (spec.dataset.eval.fraction) it needs at least two"
        )
    held_out = min(max(round(fraction * count), 1), count - 1)
    order = permutation(count, seed, Purpose.HELD_OUT)
    return numpy.sort(order[held_out:]), numpy.sort(order[:held_out])
