"""The tasks of the study: rows that a program makes, or of public data, and their split."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from random import Random

from benchmarks.tuning.draws import number, pick, shuffled

HELD_OUT_ROWS = 1000
VALIDATION_ROWS = 200
POOL_ROWS = 8000
"""At most, of the rows that each seed draws its training rows from."""
_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Row:
    """A prompt, and the answer to it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Task:
    """A task with one right answer to each prompt."""

    name: str
    says: str
    """A description of the task."""
    rows: Callable[[Random], Iterator[Row]]
    """Rows in an order drawn from the generator; without end, or at least as many as all sets need."""
    train_rows: int


@dataclass(frozen=True)
class Sets:
    """The disjoint sets of a task: no prompt of one is in another, not even with other punctuation or capitals."""

    held_out: tuple[Row, ...]
    validation: tuple[Row, ...]
    pool: tuple[Row, ...]

    def train(self, count: int, seed: int) -> tuple[Row, ...]:
        """Return this seed's training rows."""
        if count > len(self.pool):
            raise ValueError(f"{count} rows to train on, but there are {len(self.pool)}")
        return tuple(shuffled(Random(f"train {seed}"), self.pool)[:count])


@lru_cache
def sets_of(task: Task) -> Sets:
    """The task's sets, the same on every machine."""
    first, second = HELD_OUT_ROWS, HELD_OUT_ROWS + VALIDATION_ROWS
    rows = tuple(islice(_without_repetition(task.rows(Random(f"{task.name} 20261202"))), second + POOL_ROWS))
    return Sets(rows[:first], rows[first:second], rows[second:])


def _without_repetition(rows: Iterator[Row]) -> Iterator[Row]:
    seen = set[str]()
    for row in rows:
        letters = plain(row.prompt)
        if letters not in seen:
            seen.add(letters)
            yield row


def plain(prompt: str) -> str:
    """Return the letters and digits in lower case, with single spaces between the words."""
    return " ".join(re.findall(r"\w+", prompt.casefold()))


_NAMES = ("Ann", "Tom", "Eva", "Max", "Lea", "Ben", "Ida", "Sam")
_THINGS = ("pens", "cups", "books", "eggs", "keys", "coins", "shirts", "nuts")


def _arithmetic(random: Random) -> Iterator[Row]:
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


def _extraction(random: Random) -> Iterator[Row]:
    while True:
        order = {"name": pick(random, _FIRST), "count": number(random, 2, 99), "goods": pick(random, _GOODS)}
        yield Row(f"{pick(random, _SENTENCES).format(**order)}\n", json.dumps(order, separators=(",", ":")))


def _of_file(name: str, form: str) -> Callable[[Random], Iterator[Row]]:
    """Return the rows of a file of public data, whose prompts have this form."""

    def rows(random: Random) -> Iterator[Row]:
        lines = (_DATA / name).read_text(encoding="utf-8").splitlines()
        for text, answer in shuffled(random, [line.split("\t") for line in lines]):
            yield Row(form.format(text), f" {answer}")

    return rows


TASKS = {
    task.name: task
    for task in (
        Task("arithmetic", "solve a word problem with one or two operations on numbers below 25", _arithmetic, 2400),
        Task("extraction", "extract name, count and goods of an order in a sentence as JSON", _extraction, 2400),
        Task("questions", "turn a sentence into a question", _of_file("questions.tsv", "{}. Question:"), 1600),
        Task("sentiment", "say whether a movie review is positive", _of_file("snippets.tsv", "{} Sentiment:"), 2400),
    )
}
"""By name, in the order of the study."""
