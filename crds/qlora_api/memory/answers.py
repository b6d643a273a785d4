"""Estimates the GPU memory that it takes to answer a prompt, one token after the other."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class AnswerBytes:
    """Bytes that an answer takes beyond the weights, by its tokens."""

    per_token: int
    """Keys and values of all blocks, which are kept."""
    per_pair: int
    """Scores of one block's attention, for each pair of the prompt's tokens."""

    @classmethod
    def of(cls, blocks: int, heads: int, *, keys_and_values: int) -> Self:
        """Of a model with so many attention heads, and so many numbers in a token's keys and values in a block.

        transformers' attention builds the scores in 16 bit, their softmax in 32 bit, and that in 16 bit again.
        """
        return cls(per_token=2 * blocks * keys_and_values, per_pair=8 * heads)

    def of_longest(self, tokens: tuple[int, int] | None) -> int:
        """Bytes of the longest answer, by the tokens of its prompt and of both; 0 for None."""
        if tokens is None:
            return 0
        prompt, both = tokens
        return both * self.per_token + prompt**2 * self.per_pair
