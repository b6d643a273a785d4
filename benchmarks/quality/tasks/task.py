"""A task: its rows, their split, and the check of answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from random import Random
from typing import Literal, TypeVar

HELD_OUT_ROWS = 100
VALIDATION_ROWS = 50
POOL_ROWS = 240
"""Rows that each seed draws its training rows from."""
_SEED = 20261128
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A prompt, and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A task whose rows a program can make in any number, and check the answers."""

    name: str
    says: str
    """A description of the task."""
    rows: Callable[[Random], Iterator[Row]]
    """Rows in an order drawn from the generator; without end, or at least as many as all sets need."""
    is_right: Callable[[str, str], bool]
    """Whether an answer is right, given the expected one."""
    train_rows: int
    """Default number of training rows."""
    max_answer_tokens: int
    """Maximal tokens of an answer; no expected answer is longer."""


@dataclass(frozen=True)
class Sets:
    """The disjoint sets of a task: no prompt of one is in another."""

    held_out: tuple[Row, ...]
    validation: tuple[Row, ...]
    pool: tuple[Row, ...]

    def train(self, count: int, seed: int) -> tuple[Row, ...]:
        """Return this seed's training rows, those of smaller counts among them."""
        if count > len(self.pool):
            raise ValueError(f"{count} rows to train on, but there are {len(self.pool)}")
        order = shuffled(Random(f"train {seed}"), self.pool)
        return tuple(order[:count])


@lru_cache
def sets_of(task: Task) -> Sets:
    """The task's sets, the same on every machine."""
    unique = list(islice(_without_repetition(task.rows(Random(f"{task.name} {_SEED}"))), _ALL_ROWS))
    if len(unique) < _ALL_ROWS:
        raise ValueError(f"task {task.name} has {len(unique)} rows, but its sets need {_ALL_ROWS}")
    rest = unique[HELD_OUT_ROWS:]
    return Sets(tuple(unique[:HELD_OUT_ROWS]), tuple(rest[:VALIDATION_ROWS]), tuple(rest[VALIDATION_ROWS:]))


_ALL_ROWS = HELD_OUT_ROWS + VALIDATION_ROWS + POOL_ROWS


def rows_of(task: Task, split: Literal["validation", "held-out"]) -> tuple[Row, ...]:
    """The rows that are scored in a split."""
    sets = sets_of(task)
    return sets.validation if split == "validation" else sets.held_out


def _without_repetition(rows: Iterator[Row]) -> Iterator[Row]:
    seen = set[str]()
    for row in rows:
        if row.prompt not in seen:
            seen.add(row.prompt)
            yield row


def pick(random: Random, values: Sequence[T]) -> T:
    """Choose by `Random.random`, which alone repeats on all versions of Python."""
    return values[int(random.random() * len(values))]


def number(random: Random, first: int, last: int) -> int:
    """A number from `first` to `last`."""
    return first + int(random.random() * (last - first + 1))


def shuffled(random: Random, values: Sequence[T]) -> list[T]:
    """The values in an order drawn from the generator."""
    return [value for _, value in sorted(((random.random(), value) for value in values), key=lambda pair: pair[0])]


def same_text(answer: str, expected: str) -> bool:
    """Whether the two are equal but for white space around them."""
    return answer.strip() == expected.strip()
