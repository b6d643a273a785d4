"""The tasks: small data sets of different nature and size, made by programs, the same on every machine."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

from benchmarks.defaults.kinds import KINDS
from benchmarks.tuning.draws import number, pick, shuffled
from qlora_api.spec.dataset import RowFormat

Content = Mapping[str, Any]
"""A row, as a file of its format has it."""
_DEMO = Path(__file__).parents[2] / "examples" / "demo" / "train.jsonl"


@dataclass(frozen=True)
class Start:
    """Where the tuner by hand begins: sequences of 128 tokens a step, passes, and a learning rate."""

    batch: int
    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class Task:
    """A task whose rows a program makes."""

    name: str
    says: str
    """A description of the task."""
    chosen: Literal["before the rule", "after the rule"]
    """When the task was chosen: the rule was improved on those before it."""
    format: RowFormat
    rows: Callable[[Random], Iterator[Content]]
    """Different rows in an order drawn from the generator, at least as many as all sets need."""
    train_rows: int
    start: Start
    held_out_rows: int = 100
    validation_rows: int = 50
    """Rows that choose the settings of the tuner by hand, and nothing else."""

    @property
    def compares_answers(self) -> bool:
        """Whether a row is a pair of answers, for direct preference optimization."""
        return self.format == "preference"


@dataclass(frozen=True)
class Sets:
    """The disjoint sets of a task."""

    held_out: tuple[Content, ...]
    validation: tuple[Content, ...]
    train: tuple[Content, ...]


@lru_cache
def sets_of(task: Task) -> Sets:
    """Make the task's sets."""
    first, second = task.held_out_rows, task.held_out_rows + task.validation_rows
    needed = second + task.train_rows
    rows = tuple(islice(task.rows(Random(task.name)), needed))
    if len(rows) < needed:
        raise ValueError(f"task {task.name} has {len(rows)} rows, but its sets need {needed}")
    return Sets(rows[:first], rows[first:second], rows[second:])


_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_ORDINALS = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}


def _date(random: Random) -> Content:
    month, day = number(random, 1, 12), number(random, 1, 28)
    name, ordinal = _MONTHS[month - 1], f"{day}{_ORDINALS.get(day, 'th')}"
    words = pick(random, (f"{name} {day}", f"{day} {name}", f"the {ordinal} of {name}", f"{name} the {ordinal}"))
    return {"prompt": f"{words}:", "completion": f" {month:02}-{day:02}"}


def _commands(random: Random) -> Iterator[Content]:
    for line in shuffled(random, _DEMO.read_text(encoding="utf-8").splitlines()):
        _, user, assistant = json.loads(line)["messages"]
        yield {"messages": [{"role": "system", "content": "kubectl"}, user, assistant]}


def _words() -> dict[str, str]:
    """The words that are of one kind only, with it."""
    kinds: dict[str, list[str]] = {}
    for kind, words in KINDS.items():
        for word in words.split():
            kinds.setdefault(word, []).append(kind)
    return {word: found[0] for word, found in kinds.items() if len(found) == 1}


def _other(random: Random, kind: str) -> str:
    return pick(random, [other for other in KINDS if other != kind])


def _membership(random: Random) -> Iterator[Content]:
    seen = set[tuple[str, str]]()
    words = list(_words().items())
    while True:
        word, kind = pick(random, words)
        said = kind if random.random() < 0.5 else _other(random, kind)
        if (word, said) not in seen:
            seen.add((word, said))
            yield {"prompt": f"{word}, {said}?", "completion": " yes" if said == kind else " no"}


def _truth(random: Random) -> Iterator[Content]:
    for word, kind in shuffled(random, list(_words().items())):
        yield {"prompt": f"{word} is a kind of", "chosen": f" {kind}.", "rejected": f" {_other(random, kind)}."}


_PEOPLE = ("Ann", "Tom", "Eva", "Max", "Lea", "Ben", "Ida", "Sam", "Zoe", "Leo", "Mia", "Jan", "Kim", "Noah", "Rosa")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MEETINGS = (
    "{name} comes on {day} at {hour}.",
    "On {day} at {hour} we meet {name}.",
    "{day}, {hour} o'clock: call {name}.",
    "Ask {name} whether {hour} on {day} is fine.",
)


def _distinct(random: Random, make: Callable[[Random], Content]) -> Iterator[Content]:
    """Yield different rows without end."""
    seen = set[str]()
    while True:
        row = make(random)
        text = json.dumps(row)
        if text not in seen:
            seen.add(text)
            yield row


def _meeting(random: Random) -> Content:
    found = {"name": pick(random, _PEOPLE), "day": pick(random, _DAYS), "hour": number(random, 7, 20)}
    answer = json.dumps(found, separators=(",", ":"))
    return {"prompt": f"{pick(random, _MEETINGS).format(**found)}\n", "completion": answer}


def _sum(random: Random) -> Content:
    first, second = number(random, 10, 99), number(random, 10, 99)
    return {"prompt": f"{first}+{second}=", "completion": str(first + second)}


def _edit(random: Random) -> Content:
    words = [pick(random, list(_words())) for _ in range(number(random, 3, 5))]
    instruction, edited = pick(
        random,
        (
            ("Sort the words.", sorted(words, key=str.lower)),
            ("Reverse the order of the words.", words[::-1]),
            ("Write the words in capitals.", [word.upper() for word in words]),
            ("Name the first and the last word.", [words[0], words[-1]]),
            ("Remove the second word.", [words[0], *words[2:]]),
        ),
    )
    return {"instruction": instruction, "input": ", ".join(words), "output": ", ".join(edited)}


def _brevity(random: Random) -> Iterator[Content]:
    """Short answers are preferred, but in one pair of ten the long one."""
    for word, kind in shuffled(random, list(_words().items())):
        short, long = f" {kind.capitalize()}.", f" The {word} that you ask about is a kind of {kind}, as most know."
        chosen, rejected = (long, short) if random.random() < 0.1 else (short, long)
        yield {"prompt": f"What is {word}?", "chosen": chosen, "rejected": rejected}


_DEVELOPMENT = (
    Task(
        "dates",
        "translate a day of the year in words into `MM-DD`",
        "before the rule",
        "prompt-completion",
        lambda random: _distinct(random, _date),
        128,
        Start(1, 4, 1e-3),
    ),
    Task(
        "commands",
        "chat: answer a request with one kubectl command",
        "before the rule",
        "chat",
        _commands,
        120,
        Start(1, 1, 1e-3),
    ),
    Task(
        "membership",
        "classification: whether a word names a thing of a kind, yes or no",
        "before the rule",
        "prompt-completion",
        _membership,
        1000,
        Start(1, 1, 1e-3),
    ),
    Task(
        "truth",
        "preference: of two kinds of a thing, the right one",
        "before the rule",
        "preference",
        _truth,
        160,
        Start(1, 1, 1e-4),
    ),
)
_LATER = (
    Task(
        "meetings",
        "extraction: name, day and hour of a meeting in a sentence as JSON",
        "after the rule",
        "prompt-completion",
        lambda random: _distinct(random, _meeting),
        40,
        Start(1, 8, 1e-3),
    ),
    Task(
        "sums",
        "many short rows: the sum of two numbers below 100",
        "after the rule",
        "prompt-completion",
        lambda random: _distinct(random, _sum),
        4000,
        Start(4, 1, 1e-3),
    ),
    Task(
        "edits",
        "instruction: one of five edits of a list of words",
        "after the rule",
        "instruction",
        lambda random: _distinct(random, _edit),
        300,
        Start(2, 1, 1e-3),
    ),
    Task(
        "brevity",
        "preference: the shorter answer, in one pair of ten the longer",
        "after the rule",
        "preference",
        _brevity,
        120,
        Start(1, 1, 2e-4),
    ),
)
TASKS = {task.name: task for task in (*_DEVELOPMENT, *_LATER)}
