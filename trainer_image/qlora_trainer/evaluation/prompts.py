"""Chooses the prompts that a model answers, out of held-out rows."""

import hashlib
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from qlora_api.spec.gate import MAX_PROMPT_TOKENS
from qlora_trainer.data.examples.row_check import RowCheck
from qlora_trainer.data.prepared import IGNORED_LABEL, PreparedDataset


@dataclass(frozen=True)
class Prompt:
    """The tokens of a row up to its first answer, and that answer."""

    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    check: RowCheck | None = None
    """The one that the row brings for its answer."""

    @property
    def sha256(self) -> str:
        """SHA-256 of prompt, answer and check, in hexadecimal, without the row's place."""
        brought = () if self.check is None else (self.check.value,)
        return hashlib.sha256(json.dumps([self.tokens, self.answer, *brought], sort_keys=True).encode()).hexdigest()


def choose_prompts(data: PreparedDataset, count: int) -> list[Prompt]:
    """The prompts of the first rows of `count` evenly spaced sequences in `data`."""
    every = max(1, len(data) // max(1, count))
    prompts = (next(_prompts(data, index)) for index in range(0, len(data), every))
    fitting = [prompt for prompt in prompts if len(prompt.tokens) <= MAX_PROMPT_TOKENS]
    return fitting[:count]


@dataclass(frozen=True)
class ScoredPrompts:
    """The prompts to answer for a score."""

    chosen: tuple[Prompt, ...]
    fitting: int
    """Rows whose prompt is short enough."""
    too_long: int
    """Rows whose prompt is not."""

    @classmethod
    def from_data(cls, data: PreparedDataset, count: int) -> Self:
        """The `count` rows with the lowest SHA-256, for every seed and packing."""
        fitting = rows = 0

        def short_enough() -> Iterator[Prompt]:
            nonlocal fitting, rows
            for prompt in (prompt for index in range(len(data)) for prompt in _prompts(data, index)):
                rows += 1
                if len(prompt.tokens) <= MAX_PROMPT_TOKENS:
                    fitting += 1
                    yield prompt

        chosen = heapq.nsmallest(count, short_enough(), key=lambda prompt: prompt.sha256)
        return cls(tuple(chosen), fitting, rows - fitting)


def _prompts(data: PreparedDataset, index: int) -> Iterator[Prompt]:
    """The prompt of each row of a sequence. A pair counts with its chosen answer."""
    sequence, start, answers = data[index], 0, 2 if data.pairs else 1
    for number, length in zip(data.row_numbers(index), sequence.row_lengths, strict=True):
        ids, labels = sequence.input_ids[start : start + length], sequence.labels[start : start + length]
        if number % answers == 0:
            yield _prompt(ids.tolist(), (labels != IGNORED_LABEL).tolist(), data.check(number // answers))
        start += length


def _prompt(tokens: list[int], is_target: list[bool], check: RowCheck | None) -> Prompt:
    length, first = len(tokens), is_target.index(True)
    if first <= 1:
        # Plain text is trained on from its second token on: its first half is the prompt.
        first = max(1, length // 2)
    end = next((position for position in range(first, length) if not is_target[position]), length)
    return Prompt(tuple(tokens[:first]), tuple(tokens[first:end]), check)
