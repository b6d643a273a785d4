"""Draws that are the same on all versions of Python."""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def pick(random: Random, values: Sequence[T]) -> T:
    """Choose by `Random.random`, which alone repeats on all versions of Python."""
    return values[int(random.random() * len(values))]


def number(random: Random, first: int, last: int) -> int:
    """A number from `first` to `last`."""
    return first + int(random.random() * (last - first + 1))


def shuffled(random: Random, values: Sequence[T]) -> list[T]:
    """The values in an order drawn from the generator."""
    return [value for _, value in sorted(((random.random(), value) for value in values), key=lambda pair: pair[0])]
