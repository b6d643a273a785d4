"""Writes the data of the benchmarks: conversations whose lengths are distributed as in real chat, from a fixed seed.

Real chat is mostly short with a long tail; a log-normal distribution is its usual model. The text is a small grammar
about machines and their faults: a model can learn it, so the loss falls, and no text has to be shipped.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import NormalDist

PLACES = ("harbour", "bakery", "station", "library", "hospital", "foundry", "orchard", "theatre", "airfield", "mine")
MACHINES = ("pump", "crane", "furnace", "lift", "printer", "mixer", "turbine", "conveyor", "compressor", "boiler")
PARTS = ("valve", "bearing", "sensor", "belt", "gear", "fuse", "cable", "gasket", "filter", "switch")
FAULTS = ("leaks", "overheats", "rattles", "slips", "sticks", "corrodes", "trips", "stalls", "vibrates", "wears out")
REMEDIES = ("clean it", "tighten it", "replace it", "oil it", "align it", "reset it", "insulate it", "drain it")
TIMES = (
    "every morning",
    "twice a week",
    "after each shift",
    "once a month",
    "before winter",
    "when it has cooled down",
)
PEOPLE = ("operator", "engineer", "apprentice", "inspector", "foreman", "electrician")

WORDS_A_SENTENCE = 17
"""About; it turns a length in words into a number of sentences."""


@dataclass(frozen=True)
class Lengths:
    """Distribution of conversation lengths in words, of about 5 tokens per 4 words."""

    median: float
    sigma: float
    """Standard deviation of the logarithm."""
    longest: int

    def draw(self, random: Random) -> int:
        """One length."""
        # Of Random only random() gives the same numbers in every version of Python.
        z = NormalDist().inv_cdf(min(max(random.random(), 1e-12), 1 - 1e-12))
        return min(self.longest, max(WORDS_A_SENTENCE, round(self.median * math.exp(self.sigma * z))))


CHAT = Lengths(median=110, sigma=0.8, longest=700)
SHORT_CHAT = Lengths(median=30, sigma=0.5, longest=200)


def conversations(seed: int, lengths: Lengths) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield endless chat rows of a question and its answer, the same for one seed."""
    random = Random(seed)
    while True:
        yield _conversation(random, lengths.draw(random))


def write_conversations(path: Path, rows: int, seed: int, lengths: Lengths) -> None:
    """Write `rows` conversations as JSONL."""
    with path.open("w") as file:
        for _, row in zip(range(rows), conversations(seed, lengths), strict=False):
            file.write(json.dumps(row) + "\n")


def _conversation(random: Random, words: int) -> dict[str, list[dict[str, str]]]:
    machine, place = _pick(random, MACHINES), _pick(random, PLACES)
    sentences = [_sentence(random, machine) for _ in range(max(1, words // WORDS_A_SENTENCE - 1))]
    return {
        "messages": [
            {"role": "user", "content": f"What should I know about the {machine} of the {place}?"},
            {"role": "assistant", "content": " ".join(sentences)},
        ]
    }


def _sentence(random: Random, machine: str) -> str:
    part, fault, remedy = _pick(random, PARTS), _pick(random, FAULTS), _pick(random, REMEDIES)
    person, time = _pick(random, PEOPLE), _pick(random, TIMES)
    forms = (
        f"If the {part} of the {machine} {fault}, ask the {person} to {remedy} and look at it again {time}.",
        f"The {person} checks the {part} {time}, because a {part} that {fault} stops the whole {machine}.",
        f"When the {part} {fault}, switch the {machine} off, call the {person}, and {remedy} before you start again.",
    )
    return _pick(random, forms)


def _pick(random: Random, values: tuple[str, ...]) -> str:
    return values[int(random.random() * len(values))]
