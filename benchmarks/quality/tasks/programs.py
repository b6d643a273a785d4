"""Tasks whose rows a program makes: word problems, days of the year, the demo's commands, and orders as JSON."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from benchmarks.quality.tasks.task import Row, Task, number, pick, shuffled
from examples.demo.score import is_right

_NAMES = ("Ann", "Tom", "Eva", "Max", "Lea", "Ben", "Ida", "Sam")
_THINGS = ("pens", "cups", "books", "eggs", "keys", "coins", "shirts", "nuts")
_NUMBER = re.compile(r"\s*(-?\d+)\s*")


def _arithmetic_rows(random: Random) -> Iterator[Row]:
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


def _is_right_arithmetic(answer: str, expected: str) -> bool:
    given, wanted = _NUMBER.fullmatch(answer), _NUMBER.fullmatch(expected)
    return given is not None and wanted is not None and int(given[1]) == int(wanted[1])


ARITHMETIC = Task(
    name="arithmetic",
    says="solve a word problem with one or two operations on numbers below 25",
    rows=_arithmetic_rows,
    is_right=_is_right_arithmetic,
    train_rows=160,
    max_answer_tokens=6,
)


_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_ORDINALS = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}
_FORM = re.compile(r"\s*(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])\s*")


def _dates_rows(random: Random) -> Iterator[Row]:
    while True:
        month, day = number(random, 1, 12), number(random, 1, 28)
        name, ordinal = _MONTHS[month - 1], f"{day}{_ORDINALS.get(day, 'th')}"
        words = pick(random, (f"{name} {day}", f"{day} {name}", f"the {ordinal} of {name}", f"{name} the {ordinal}"))
        yield Row(f"{words}:", f" {month:02}-{day:02}")


def _is_right_dates(answer: str, expected: str) -> bool:
    given, wanted = _FORM.fullmatch(answer), _FORM.fullmatch(expected)
    return given is not None and wanted is not None and given.groups() == wanted.groups()


DATES = Task(
    name="dates",
    says="translate a day of the year in words into `MM-DD`",
    rows=_dates_rows,
    is_right=_is_right_dates,
    train_rows=128,
    max_answer_tokens=8,
)


_FILE = Path(__file__).parents[3] / "examples" / "demo" / "train.jsonl"


def _commands_rows(random: Random) -> Iterator[Row]:
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    for _, user, assistant in shuffled(random, [json.loads(line)["messages"] for line in lines]):
        yield Row(f"{user['content']}\n", assistant["content"])


COMMANDS = Task(
    name="commands",
    says="answer a request with one kubectl command (the rows of the demo)",
    rows=_commands_rows,
    is_right=is_right,
    train_rows=112,
    max_answer_tokens=40,
)


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


def _extraction_rows(random: Random) -> Iterator[Row]:
    while True:
        order = {
            "name": pick(random, _FIRST),
            "count": number(random, 2, 99),
            "goods": pick(random, _GOODS),
        }
        yield Row(f"{pick(random, _SENTENCES).format(**order)}\n", json.dumps(order, separators=(",", ":")))


def _is_right_extraction(answer: str, expected: str) -> bool:
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    wanted = json.loads(expected)
    # JSON's numbers are equal if they are of one type: 3 is not true, and not 3.0.
    return bool(given == wanted and [type(given[key]) for key in wanted] == [type(wanted[key]) for key in wanted])


EXTRACTION = Task(
    name="extraction",
    says="extract name, count and goods of an order in a sentence as JSON",
    rows=_extraction_rows,
    is_right=_is_right_extraction,
    train_rows=64,
    max_answer_tokens=24,
)
