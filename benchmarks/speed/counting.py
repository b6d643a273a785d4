"""Counts the useful tokens of a transformers Trainer in its collator."""

from typing import Any

from torch import Tensor


class CountingCollator:
    """A collator around another one. Notes the tokens without padding, and the rows, of each micro batch."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator
        self._tokens: list[int] = []
        self._rows: list[int] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch."""
        self._tokens.append(sum(len(example["input_ids"]) for example in examples))
        # Where rows are packed, TRL keeps the length of each.
        self._rows.append(sum(len(example.get("seq_lengths", "1")) for example in examples))
        batch: dict[str, Tensor] = self._collator(examples)
        return batch

    def by_step(self, steps: int, accumulation: int) -> tuple[list[int], list[int]]:
        """Tokens and rows of each optimizer step. The loader reads ahead, so there are more batches than were used."""

        def sums(values: list[int]) -> list[int]:
            return [sum(values[step * accumulation : (step + 1) * accumulation]) for step in range(steps)]

        return sums(self._tokens), sums(self._rows)
