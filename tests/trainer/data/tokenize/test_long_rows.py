"""Rows of many answers: one that is too long is left out without rendering its answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_api.spec.dataset import Columns, RowFormat
from qlora_api.spec.training import TrainOn
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.template_source import JobTemplate
from qlora_trainer.data.tokenize.chunk_maker import ChunkMaker, Recipe
from tests.support.models.tiny import CHATML, chat_row

# Answers before the last are left out of the text.
FORGETFUL = CHATML.replace("message['content']", "message['content'] if loop.last or message['role'] == 'user' else ''")


def turns(answers: int) -> list[dict[str, str]]:
    """A conversation."""
    return [turn for _ in range(answers) for turn in chat_row("q", "a")["messages"]]


def maker(
    tokenizer: Path,
    longest_allowed: int,
    format_: RowFormat = "chat",
    train_on: TrainOn = "completion",
    template: str = CHATML,
) -> ChunkMaker:
    return ChunkMaker(
        Recipe(tokenizer, 512, format_, Columns(), train_on, longest_allowed, template=JobTemplate(template))
    )


def row_of(values: dict[str, Any]) -> Row:
    return Row("line 1", json.dumps(values), 1)


@pytest.fixture
def renderings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of messages of each rendering."""
    counts: list[int] = []
    apply = PreTrainedTokenizerBase.apply_chat_template

    def counted(self: PreTrainedTokenizerBase, conversation: Any, *arguments: Any, **options: Any) -> Any:
        counts.append(len(conversation))
        return apply(self, conversation, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", counted)
    return counts


@pytest.mark.parametrize("train_on", ["completion", "last", "weighted", "marked", "all"])
def test_a_long_conversation_that_is_left_out_is_rendered_once(
    tiny_llama: Path, renderings: list[int], train_on: TrainOn
) -> None:
    messages = [turn | {"train": True} if turn["role"] == "assistant" else turn for turn in turns(100)]
    whole = maker(tiny_llama, 10_000, train_on=train_on).make([row_of({"messages": messages})])
    renderings.clear()

    chunk = maker(tiny_llama, 64, train_on=train_on).make([row_of({"messages": messages})])

    assert sum(count > 1 for count in renderings) == 1
    assert (chunk.too_long.tolist(), chunk.dropped.first_too_long) == (whole.lengths.tolist(), "line 1")
    assert (len(chunk.lengths), chunk.dropped.unlabeled) == (0, 0)


def test_a_long_pair_that_is_left_out_is_rendered_twice(tiny_llama: Path, renderings: list[int]) -> None:
    talk = turns(100)
    pair = row_of({"chosen": talk, "rejected": [*talk[:-1], {"role": "assistant", "content": "b"}]})
    whole = maker(tiny_llama, 10_000, "preference").make([pair])
    renderings.clear()

    chunk = maker(tiny_llama, 64, "preference").make([pair])

    assert sum(count > 1 for count in renderings) == 2
    assert (chunk.too_long.tolist(), chunk.dropped.first_too_long) == (whole.lengths.tolist(), "line 1")


@pytest.mark.parametrize("answers", [1, 8, 9, 20])
def test_a_conversation_of_as_many_tokens_as_are_allowed_is_trained_on_whole(tiny_llama: Path, answers: int) -> None:
    row = row_of({"messages": turns(answers)})
    free = maker(tiny_llama, 10_000).make([row])
    [length] = free.lengths.tolist()

    fits = maker(tiny_llama, length).make([row])

    assert fits.input_ids.tolist() == free.input_ids.tolist()
    assert fits.is_target.tolist() == free.is_target.tolist()
    assert maker(tiny_llama, length - 1).make([row]).too_long.tolist() == [length]


def test_errors_in_the_answers_of_an_unused_row_are_ignored(tiny_llama: Path) -> None:
    row = row_of({"messages": turns(100)})
    with pytest.raises(StepFailure, match=r"line 1: .* message 1 of the conversation cannot be separated"):
        maker(tiny_llama, 10_000, template=FORGETFUL).make([row])
    assert len(maker(tiny_llama, 64, template=FORGETFUL).make([row]).too_long) == 1
