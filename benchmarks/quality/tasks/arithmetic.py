"""Word problems: one or two operations on small numbers."""

import re
from collections.abc import Iterator
from random import Random

from benchmarks.quality.tasks.task import Row, Task, number, pick

_NAMES = ("Ann", "Tom", "Eva", "Max", "Lea", "Ben", "Ida", "Sam")
_THINGS = ("pens", "cups", "books", "eggs", "keys", "coins", "shirts", "nuts")
_NUMBER = re.compile(r"\s*(-?\d+)\s*")


def _rows(random: Random) -> Iterator[Row]:
    while True:
        name, things = pick(random, _NAMES), pick(random, _THINGS)
        a, b, c = number(random, 6, 19), number(random, 2, 5), number(random, 2, 4)
        problem, result = pick(
            random,
            (
                (f"{name} has {a} {things} and buys {b}:", a + b),
                (f"{name} had {a} {things} and lost {b}:", a - b),
                (f"{name} has {c} boxes of {b} {things}:", b * c),
                (f"{name} had {a} {things}, got {b}, lost {c}:", a + b - c),
            ),
        )
        yield Row(problem, f" {result}")


def _is_right(answer: str, expected: str) -> bool:
    given, wanted = _NUMBER.fullmatch(answer), _NUMBER.fullmatch(expected)
    return given is not None and wanted is not None and int(given[1]) == int(wanted[1])


TASK = Task(
    name="arithmetic",
    says="solve a word problem with one or two operations on numbers below 25",
    rows=_rows,
    is_right=_is_right,
    train_rows=160,
    max_answer_tokens=6,
)
