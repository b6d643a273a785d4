"""The trained turns of a conversation, the effect of a system prompt and reasoning, and rejections."""

import re
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_api.spec.dataset import SystemPromptSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.example import Conversation, Message
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.render.template_source import JobTemplate
from tests.support.models.learned import learned
from tests.support.models.tiny import save_tokenizer
from tests.support.row_formats import ANSWER, ASK, CALL, CALLING, RESULT, TOOLS

SYSTEM = {"role": "system", "content": "Be short."}
DIALOGUE: list[dict[str, Any]] = [
    SYSTEM,
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Third."},
]
END = "<|im_end|>"

# As Qwen3's: the reasoning of an answer is a separate key, and is kept after the last question only.
THINKS = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.KEY and loop.index0 > ns.last %}{{- '<think>\n' + m.KEY + '\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\nPROMPT' }}{% endif %}"""


def thinking(key: str = "reasoning_content", prompt: str = "") -> JobTemplate:
    """The template for models that use this key and begin answers with reasoning."""
    return JobTemplate(THINKS.replace("KEY", key).replace("PROMPT", prompt))


def marked(*marks: dict[str, Any]) -> list[dict[str, Any]]:
    """The dialogue whose answers have these marks."""
    given = iter(marks)
    return [turn | next(given, {}) if turn["role"] == "assistant" else turn for turn in DIALOGUE]


def rejected(folder: Path, row: dict[str, Any], says: str, **recipe: Any) -> StepFailure:
    """Why the row is rejected."""
    with pytest.raises(StepFailure, match=re.escape(says)) as failure:
        learned(folder, [row], **recipe)
    return failure.value


def test_the_last_answer_alone_is_trained_on(tiny_llama: Path) -> None:
    [(text, targets)] = learned(tiny_llama, [{"messages": DIALOGUE}], train_on="last")
    assert "First." in text
    assert targets == [f"Third.{END}"]


def test_the_only_answer_of_a_prompt_is_its_last(tiny_llama: Path) -> None:
    row = {"prompt": "Which?", "completion": "All."}
    assert learned(tiny_llama, [row], "prompt-completion", train_on="last") == learned(
        tiny_llama, [row], "prompt-completion"
    )


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([{}, {"train": True}], ["Second."]),
        ([{"train": True}, {"train": False}, {"train": True}], ["First.", "Third."]),
        ([{"weight": 0}, {"weight": 1}, {"weight": 0}], ["Second."]),
        ([{"weight": 0}], ["Second.", "Third."]),  # OpenAI trains on turns without a weight
        ([{"train": True, "weight": 1}, {"train": None}], ["First."]),
    ],
)
def test_the_marked_answers_alone_are_trained_on(
    tiny_llama: Path, marks: list[dict[str, Any]], expected: list[str]
) -> None:
    [(_, targets)] = learned(tiny_llama, [{"messages": marked(*marks)}], train_on="marked")
    assert targets == [answer + END for answer in expected]


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([], ["First.", "Second.", "Third."]),
        ([{"weight": 0}, {"weight": 1}], ["Second.", "Third."]),
        ([{}, {"train": False}, {"train": True}], ["First.", "Third."]),
    ],
)
def test_every_answer_but_those_of_weight_0_is_trained_on(
    tiny_llama: Path, marks: list[dict[str, Any]], expected: list[str]
) -> None:
    [(_, targets)] = learned(tiny_llama, [{"messages": marked(*marks)}], train_on="weighted")
    assert targets == [answer + END for answer in expected]


def test_a_call_of_weight_0_is_not_trained_on(tmp_path: Path) -> None:
    """The result of a tool never is."""
    save_tokenizer(tmp_path, CALLING)
    row = {"messages": [ASK, CALL | {"weight": 0}, RESULT, ANSWER], "tools": TOOLS}
    [(text, targets)] = learned(tmp_path, [row], train_on="weighted")
    assert "<call>" in text
    assert targets == [f"All.{END}"]


def test_marks_are_ignored_by_default(tiny_llama: Path) -> None:
    [(_, targets)] = learned(tiny_llama, [{"messages": marked({"weight": 0}, {"train": "?"})}])
    assert len(targets) == 3


def test_sharegpt_marks_its_turns_too(tiny_llama: Path) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in DIALOGUE]
    turns[4] = turns[4] | {"train": True}
    [(_, targets)] = learned(tiny_llama, [{"conversations": turns}], "sharegpt", train_on="marked")
    assert targets == [f"Second.{END}"]


@pytest.mark.parametrize("train_on", ["marked", "weighted"])
def test_a_row_whose_marks_are_all_off_is_left_out(tiny_llama: Path, train_on: str) -> None:
    off = marked({"weight": 0}, {"weight": 0}, {"weight": 0})
    assert learned(tiny_llama, [{"messages": off}], train_on=train_on) == []


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (DIALOGUE, "line 1: 'messages' has no mark, and spec.training.trainOn is marked: set train: true"),
        (marked({"train": "yes"}), "'messages[2].train' is text: must be true or false"),
        (marked({"weight": 0.5}), "'messages[2].weight' is 0.5: must be 0 or 1"),
        (marked({"weight": 0, "train": True}), "'messages[2].train' and 'weight' contradict each other"),
        ([SYSTEM | {"train": True}, *DIALOGUE[1:]], "'messages[0].train' marks a system message: only an assistant's"),
        ([SYSTEM | {"weight": 1}, *DIALOGUE[1:]], "'messages[0].weight' marks a system message: only an assistant's"),
    ],
)
def test_a_mark_that_is_missing_or_wrong_is_rejected(
    tiny_llama: Path, messages: list[dict[str, Any]], says: str
) -> None:
    failure = rejected(tiny_llama, {"messages": messages}, says, train_on="marked")
    assert failure.exit_code is ExitCode.BAD_DATASET


@pytest.mark.parametrize("train_on", ["marked", "weighted"])
def test_marks_in_rows_without_turns_are_a_bad_configuration(tiny_llama: Path, train_on: str) -> None:
    failure = rejected(
        tiny_llama,
        {"prompt": "a", "completion": "b"},
        f"spec.training.trainOn is {train_on}, and rows of format prompt-completion mark nothing",
        format_="prompt-completion",
        train_on=train_on,
    )
    assert failure.exit_code is ExitCode.BAD_CONFIGURATION


@pytest.mark.parametrize("of_the_row", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("of_the_template", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_any_name_is_trained_on_with_its_answer(
    tiny_llama: Path, of_the_row: str, of_the_template: str
) -> None:
    row = {"messages": [DIALOGUE[1], {**DIALOGUE[2], of_the_row: "I count."}]}
    [(_, targets)] = learned(tiny_llama, [row], template=thinking(of_the_template))
    assert targets == [f"<think>\nI count.\n</think>\n\nFirst.{END}"]


@pytest.mark.parametrize("prompt", ["", "<think>\\n"])
def test_reasoning_that_a_template_leaves_out_of_earlier_answers_is_no_target(tiny_llama: Path, prompt: str) -> None:
    answers = [{"reasoning_content": "One."}, {"reasoning_content": "Two."}, {"reasoning_content": "Three."}]
    [(text, targets)] = learned(tiny_llama, [{"messages": marked(*answers)}], template=thinking(prompt=prompt))
    assert "Two." not in text
    begun = "" if prompt else "<think>\n"
    assert targets == [f"First.{END}", f"Second.{END}", f"{begun}Three.\n</think>\n\nThird.{END}"]


def test_a_row_without_reasoning_gives_the_same_text_as_before(tiny_llama: Path) -> None:
    rows = [{"messages": marked({"reasoning": ""}, {"reasoning": None})}]
    assert learned(tiny_llama, rows) == learned(tiny_llama, [{"messages": DIALOGUE}])


def test_reasoning_needs_a_template_that_writes_it(tiny_llama: Path) -> None:
    row = {"messages": [DIALOGUE[1], DIALOGUE[2] | {"reasoning": "hm"}]}
    rejected(tiny_llama, row, "line 1: an answer has reasoning, but the model's chat template leaves it out: use")


PROMPT = SystemPromptSpec(text="Answer in English.")
INSTEAD = SystemPromptSpec(text="Answer in English.", mode="replace")


@pytest.mark.parametrize(
    ("prompt", "with_own", "without"),
    [(PROMPT, "Be short.", "Answer in English."), (INSTEAD, "Answer in English.", "Answer in English.")],
)
def test_a_system_prompt_is_added_or_replaces_the_rows_own(
    tiny_llama: Path, prompt: SystemPromptSpec, with_own: str, without: str
) -> None:
    rows = [{"messages": DIALOGUE}, {"messages": DIALOGUE[1:]}]
    first, second = learned(tiny_llama, rows, system_prompt=prompt)
    assert first[0].startswith(f"<|im_start|>system\n{with_own}{END}\n<|im_start|>user\nOne?")
    assert second[0].startswith(f"<|im_start|>system\n{without}{END}\n<|im_start|>user\nOne?")
    assert first[1] == second[1] == [f"First.{END}", f"Second.{END}", f"Third.{END}"]


def test_an_empty_system_message_of_a_row_is_kept(tiny_llama: Path) -> None:
    rows = [{"messages": [{"role": "system", "content": ""}, *DIALOGUE[1:]]}]
    [(text, _)] = learned(tiny_llama, rows, system_prompt=PROMPT)
    assert "English" not in text


@pytest.mark.parametrize(("prompt", "own"), [(PROMPT, "Be short."), (INSTEAD, "Answer in English.")])
def test_instructions_get_the_system_prompt_too(tiny_llama: Path, prompt: SystemPromptSpec, own: str) -> None:
    row = {"instruction": "Scale it.", "output": "Done."}
    (bare, _), (given, _) = learned(
        tiny_llama, [row, row | {"system": "Be short."}], "instruction", system_prompt=prompt
    )
    assert bare.startswith(f"<|im_start|>system\nAnswer in English.{END}\n")
    assert given.startswith(f"<|im_start|>system\n{own}{END}\n")


def test_a_template_without_system_messages_is_a_bad_configuration(tiny_llama: Path) -> None:
    raising = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    for template in (
        raising + "{{ m.content + eos_token }}{% endfor %}",
        "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}",
    ):
        with pytest.raises(StepFailure, match=r"spec\.dataset\.systemPrompt is set, but .* takes no system") as failure:
            Tokenizer(tiny_llama, JobTemplate(template)).require_system_message()
        assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    Tokenizer(tiny_llama).require_system_message()


def test_a_template_that_rejects_every_conversation_is_reported_as_such(tiny_llama: Path) -> None:
    tokenizer = Tokenizer(tiny_llama, JobTemplate("{{ messages[0].content.nosuch() }}"))
    tokenizer.require_system_message()
    with pytest.raises(StepFailure, match=r"line 1: the chat template .* rejects this conversation"):
        tokenizer.render(Conversation((Message("user", "q"), Message("assistant", "a"))), "line 1")
