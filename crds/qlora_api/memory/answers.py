"""Estimates the GPU memory to answer a prompt, one token after the other."""

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
        """Count for a model with these attention heads, and keys and values in a block.

        `keys_and_values`: numbers for each token. transformers' attention builds the scores in 16 bit, their softmax in
        32 bit, and that in 16 bit again.
        """
        return cls(per_token=2 * blocks * keys_and_values, per_pair=8 * heads)

    def of_longest(self, tokens: tuple[int, int] | None) -> int:
        """Return the bytes of the longest answer, or 0 for None.

        `tokens`: of its prompt, and of prompt and answer.
        """
        if tokens is None:
            return 0
        prompt, both = tokens
        return both * self.per_token + prompt**2 * self.per_pair
