"""Batches of prompts to answer: like lengths together, within the memory that training has left."""

from qlora_api.memory.estimate import AnswerBytes
from qlora_trainer.evaluation.answer_batches import MOST_ROWS, AnswerRoom, batches
from qlora_trainer.evaluation.prompts import Prompt

SIZES = AnswerBytes(per_token=100, per_pair=1)
ROOMY = AnswerRoom(memory=10**9, prompt_tokens=10**6)


def prompts(*lengths: int) -> list[Prompt]:
    return [Prompt((number,) * length, (1,)) for number, length in enumerate(lengths)]


def lengths_of(rows: list[Prompt], room: AnswerRoom) -> list[list[int]]:
    return [[len(prompt.tokens) for prompt in batch] for batch in batches(rows, 10, SIZES, room)]


def test_prompts_of_like_lengths_share_a_batch_whatever_their_order() -> None:
    rows = prompts(30, 1, 20, 2, *[5] * MOST_ROWS)

    found = batches(rows, 10, SIZES, ROOMY)

    assert lengths_of(rows, ROOMY) == [[1, 2, *[5] * (MOST_ROWS - 2)], [5, 5, 20, 30]]
    assert batches(reversed(rows), 10, SIZES, ROOMY) == found


def test_a_batch_takes_no_more_memory_and_tokens_than_training_did() -> None:
    # Two rows of 10 tokens and their answers: 2 * (20 * 100 + 10**2) bytes.
    for memory, tokens, expected in ((4200, 20, [[10, 10], [10]]), (4199, 20, [[10]] * 3), (4200, 19, [[10]] * 3)):
        assert lengths_of(prompts(10, 10, 10), AnswerRoom(memory, tokens)) == expected
    assert lengths_of(prompts(10, 1000), AnswerRoom(0, 0)) == [[10], [1000]]


def test_the_room_is_that_of_gradients_and_inputs_of_the_blocks() -> None:
    assert AnswerRoom.after_training(1000, 512, hidden_size=64, blocks=2) == AnswerRoom(1000 + 512 * 64 * 2 * 2, 512)
