"""Extraction: the facts of a sentence about an order, as JSON."""

import json
from collections.abc import Iterator
from random import Random

from benchmarks.quality.tasks.task import Row, Task, number, pick

_FIRST = ("Ann", "Tom", "Eva", "Max", "Lea", "Ben", "Ida", "Sam", "Zoe", "Leo", "Mia", "Jan", "Kim", "Noah", "Rosa")
_GOODS = ("lamps", "chairs", "tents", "bikes", "pans", "drums", "boots", "clocks", "mugs", "ropes", "kites", "desks")
_SENTENCES = (
    "{name} wants {count} {goods}.",
    "Send {count} {goods} to {name}.",
    "{count} {goods}, says {name}.",
    "{goods}, {count} of them, for {name}.",
    "{name}: {goods}, {count}.",
    "{name} had {count} {goods} brought.",
)


def _rows(random: Random) -> Iterator[Row]:
    while True:
        order = {
            "name": pick(random, _FIRST),
            "count": number(random, 2, 99),
            "goods": pick(random, _GOODS),
        }
        yield Row(f"{pick(random, _SENTENCES).format(**order)}\n", json.dumps(order, separators=(",", ":")))


def _is_right(answer: str, expected: str) -> bool:
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    wanted = json.loads(expected)
    # JSON's numbers are equal if they are of one type: 3 is not true, and not 3.0.
    return bool(given == wanted and [type(given[key]) for key in wanted] == [type(wanted[key]) for key in wanted])


TASK = Task(
    name="extraction",
    says="extract name, count and goods of an order in a sentence as JSON",
    rows=_rows,
    is_right=_is_right,
    train_rows=64,
    max_answer_tokens=24,
)
