"""Translation between two formats: a day of the year in words into digits."""

import re
from collections.abc import Iterator
from random import Random

from benchmarks.quality.tasks.task import Row, Task, number, pick

_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_ORDINALS = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}
_FORM = re.compile(r"\s*(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])\s*")


def _rows(random: Random) -> Iterator[Row]:
    while True:
        month, day = number(random, 1, 12), number(random, 1, 28)
        name, ordinal = _MONTHS[month - 1], f"{day}{_ORDINALS.get(day, 'th')}"
        words = pick(random, (f"{name} {day}", f"{day} {name}", f"the {ordinal} of {name}", f"{name} the {ordinal}"))
        yield Row(f"{words}:", f" {month:02}-{day:02}")


def _is_right(answer: str, expected: str) -> bool:
    given, wanted = _FORM.fullmatch(answer), _FORM.fullmatch(expected)
    return given is not None and wanted is not None and given.groups() == wanted.groups()


TASK = Task(
    name="dates",
    says="translate a day of the year in words into `MM-DD`",
    rows=_rows,
    is_right=_is_right,
    train_rows=128,
    max_answer_tokens=8,
)
