"""Reads prompts with two answers: texts, message lists, two conversations, or OpenAI's rows."""

import dataclasses
from collections.abc import Mapping

from qlora_api.schema import replace
from qlora_api.spec.dataset import Columns
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.examples.conversations import CHAT, SHAREGPT, check_turns, checked_text, read_turns
from qlora_trainer.data.examples.example import Conversation, Message, Preference, PromptCompletion
from qlora_trainer.data.examples.fields import Fields
from qlora_trainer.data.read.rows import describe

_ANSWERS = ("chosen", "rejected")
_OPENAI = {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}


def pair_columns(values: Mapping[str, object], columns: Columns) -> Columns:
    """The columns of a pair: OpenAI's if the row has an answer there, and neither job nor row has others."""
    is_named = any(getattr(columns, field) is not None for field in _OPENAI)
    if is_named or _OPENAI.keys() & values.keys() or not any(_OPENAI[answer] in values for answer in _ANSWERS):
        return columns
    return replace(columns, **_OPENAI)


def read_preference(fields: Fields) -> Preference:
    """The row's example. Raises StepFailure BAD_DATASET naming location and column."""
    fields = _with_parts_of_prompt(fields)
    tools, prompt = fields.tools(), fields.optional_value("prompt")
    # Both are read first: a missing column is reported before the form of the other.
    if all(isinstance(value, str) for value in [fields.value(answer) for answer in _ANSWERS]):
        return _of_texts(fields, prompt)
    answers = [_turns(fields, answer) for answer in _ANSWERS]
    first = _prompt_turns(fields, prompt, answers[0])
    # An answer may begin with the prompt already.
    chosen, rejected = (answer if answer[: len(first)] == first else (*first, *answer) for answer in answers)
    for messages, answer, field in zip((chosen, rejected), answers, _ANSWERS, strict=True):
        asked = len(messages) - len(answer)
        check_turns(messages, fields.row.location, fields.column(field), asked, fields.column("prompt"))
        if messages[-1].role != "assistant" or messages[-1].tool_calls:
            raise bad_dataset(
                f"{fields.where(field)} ends with a message of role {messages[-1].role!r}"
                f"{' that calls a tool' if messages[-1].tool_calls else ''}: must end with an answer in words"
            )
    shared = _shared_messages(chosen, rejected)
    if not any(message.role == "user" for message in shared):
        raise bad_dataset(
            f"{fields.where('chosen')} and {fields.column('rejected')!r} do not begin with the same prompt: "
            f"both must be answers to one prompt; name its column in {fields.setting}.columns.prompt if there is one"
        )
    shared_answers = sum(message.role == "assistant" for message in shared)
    return Preference(Conversation(chosen, tools), Conversation(rejected, tools), shared_answers)


def _with_parts_of_prompt(fields: Fields) -> Fields:
    """The fields, with the messages and tools of a prompt that is an object as columns."""
    prompt, column = fields.optional_value("prompt"), fields.column("prompt")
    if not isinstance(prompt, dict):
        return fields
    tools = f"{column}.tools" if "tools" in prompt else fields.columns.tools
    return dataclasses.replace(
        fields,
        values={**fields.values, **{f"{column}.{key}": value for key, value in prompt.items()}},
        columns=replace(fields.columns, prompt=f"{column}.messages", tools=tools),
    )


def _of_texts(fields: Fields, prompt: object) -> Preference:
    if prompt is None:
        raise bad_dataset(
            f"{fields.row.location} has no {fields.column('prompt')!r}: {fields.column('chosen')!r} and "
            f"{fields.column('rejected')!r} are texts, which need one; name it in {fields.setting}.columns.prompt, or "
            "write whole conversations as lists of {role, content}"
        )
    question = checked_text(prompt, fields.where("prompt"))
    chosen, rejected = (PromptCompletion(question, fields.text(answer)) for answer in _ANSWERS)
    return Preference(chosen, rejected)


def _prompt_turns(fields: Fields, prompt: object, chosen: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages of the prompt, or none where the answers include them."""
    if prompt is None:
        return ()
    if isinstance(prompt, str):
        # As in UltraFeedback, whose conversations begin with the text of the column.
        whole = chosen[0].role in ("system", "user")
        return () if whole else (Message("user", checked_text(prompt, fields.where("prompt"))),)
    return _turns(fields, "prompt")


def _turns(fields: Fields, field: str) -> tuple[Message, ...]:
    value = fields.value(field)
    if not isinstance(value, list):
        raise bad_dataset(
            f"{fields.where(field)} is {describe(value)}: must be text, or a list of {{role, content}}; "
            f"{fields.column('chosen')!r} and {fields.column('rejected')!r} must be of the same kind"
        )
    first = value[0] if value else None
    notation = SHAREGPT if isinstance(first, dict) and SHAREGPT.role in first else CHAT
    return read_turns(value, notation, fields.row.location, fields.column(field), is_columnar=fields.row.is_columnar)


def _shared_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages that both begin with: the prompt. Excludes the last answers."""
    most = min(len(chosen), len(rejected)) - 1
    count = next((index for index in range(most) if chosen[index] != rejected[index]), most)
    return chosen[:count]
