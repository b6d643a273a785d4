"""Groups prompts to answer at the same time, within the memory that training no longer needs: pure functions."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from qlora_api.memory.estimate import AnswerBytes
from qlora_trainer.evaluation.prompts import Prompt

MOST_ROWS = 16


@dataclass(frozen=True)
class AnswerRoom:
    """The memory for answers beyond the weights. One prompt may always be answered."""

    memory: int
    """Bytes of keys, values and scores of attention."""
    prompt_tokens: int
    """Of all prompts in a batch, padding included."""

    @classmethod
    def after_training(cls, trained_bytes: int, batch_tokens: int, *, hidden_size: int, blocks: int) -> Self:
        """Return the room of gradients and of the blocks' inputs, in 16 bit, of a micro batch with so many tokens."""
        return cls(trained_bytes + 2 * batch_tokens * hidden_size * blocks, batch_tokens)

    def has(self, rows: int, prompt: int, new_tokens: int, sizes: AnswerBytes) -> bool:
        """Whether `rows` prompts of up to `prompt` tokens are answered within it."""
        needed = rows * sizes.of_longest((prompt, prompt + new_tokens))
        return rows * prompt <= self.prompt_tokens and needed <= self.memory


def batches(
    prompts: Iterable[Prompt], new_tokens: int, sizes: AnswerBytes, room: AnswerRoom
) -> list[tuple[Prompt, ...]]:
    """Return the prompts in batches of like lengths. Equal prompts and room give equal batches."""
    found: list[list[Prompt]] = []
    for prompt in sorted(prompts, key=lambda prompt: (len(prompt.tokens), prompt.sha256)):
        rows = len(found[-1]) + 1 if found else MOST_ROWS + 1
        if rows <= MOST_ROWS and room.has(rows, len(prompt.tokens), new_tokens, sizes):
            found[-1].append(prompt)
        else:
            found.append([prompt])
    return [tuple(batch) for batch in found]
