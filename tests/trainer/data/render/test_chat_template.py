"""The learned part of a row: its text, and the tokens that are targets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_api.spec.dataset import Columns
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.formats import detect_format
from qlora_trainer.data.read.rows import Row
from qlora_trainer.steps.prepare import prepare
from tests.support.models.learned import learned
from tests.support.models.tiny import CHATML, SHAPE, Recorded, chat_row, save_model, write_rows
from tests.support.row_formats import CALLING, TOOLS
from tests.trainer.conftest import MakeContext

# Like Qwen3's: the reasoning of all answers but the last is left out, and an empty one is put before the last.
THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
{%- set reasoning = '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set content = content.split('</think>')[-1].strip() %}
{%- endif %}
{%- if loop.index0 > ns.last %}{% set content = '<think>\n' + reasoning + '\n</think>\n\n' + content %}{% endif %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}" + CHATML
ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last or m.role == 'user' else '...') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# As SmolVLM's and LLaVA's: it reads the texts among the parts of a message, and leaves out a content that is text.
IN_PARTS = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

DIALOGUE = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>hm</think>First answer."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "<think>well</think>Second answer."},
]


TokenizeRows = Callable[..., list[tuple[str, list[str]]]]


@pytest.fixture
def tokenize_rows(tmp_path: Path, tiny_llama: Path) -> TokenizeRows:
    """Returns each row's text by a model's template, and its stretches of targets."""

    def tokenize(
        rows: list[dict[str, Any]],
        template: str | None = CHATML,
        *,
        of_processor: bool = False,
        columns: Columns | None = None,
        **recipe: Any,
    ) -> list[tuple[str, list[str]]]:
        model = tmp_path / "model"
        if not model.exists():
            model.mkdir()
            for file in tiny_llama.glob("token*"):
                (model / file.name).hardlink_to(file)
            if of_processor:
                (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
            elif template is not None:
                (model / "chat_template.jinja").write_text(template)
        format_, names = detect_format(Row("line 1", rows[0], 1), columns)
        return learned(model, rows, format_, columns=names, **recipe)

    return tokenize


def test_every_answer_and_its_end_mark_are_targets_and_nothing_else(tokenize_rows: TokenizeRows) -> None:
    """The padding token is the end mark: a mask by its id would lose answers' ends."""
    [(text, targets)] = tokenize_rows([{"messages": DIALOGUE}])
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n")
    assert targets == [
        "<think>hm</think>First answer.<|im_end|>",
        "<think>well</think>Second answer.<|im_end|>",
    ]


def test_every_token_is_a_target_with_train_on_all(tokenize_rows: TokenizeRows) -> None:
    [(text, targets)] = tokenize_rows([{"messages": DIALOGUE}], train_on="all")
    assert targets == [text.removeprefix("<|im_start|>")]


def test_reasoning_that_a_template_leaves_out_is_not_a_target(tokenize_rows: TokenizeRows) -> None:
    [(text, targets)] = tokenize_rows([{"messages": DIALOGUE}], THINKING)
    assert "hm" not in text
    assert targets == ["First answer.<|im_end|>", "<think>\nwell\n</think>\n\nSecond answer.<|im_end|>"]


@pytest.mark.parametrize("of_processor", [False, True])
def test_a_template_that_takes_the_parts_of_a_message_gets_them(
    tokenize_rows: TokenizeRows, of_processor: bool
) -> None:
    [(text, targets)] = tokenize_rows([{"messages": DIALOGUE[1:3]}], IN_PARTS, of_processor=of_processor)
    assert text == "User: One?<|im_end|>\nAssistant: <think>hm</think>First answer.<|im_end|>\n"
    assert targets == ["<think>hm</think>First answer.<|im_end|>"]


def test_a_processors_template_that_is_no_text_is_a_bad_configuration(tokenize_rows: TokenizeRows) -> None:
    with pytest.raises(StepFailure, match=r"chat_template\.json has no chat_template that is text") as failure:
        tokenize_rows([{"messages": DIALOGUE[1:3]}], None, of_processor=True)
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_a_template_without_generation_prompt_works(tokenize_rows: TokenizeRows) -> None:
    row = {"messages": DIALOGUE[1:]}
    [(text, targets)] = tokenize_rows([row], ALTERNATING)
    assert text.startswith("[INST] One? [/INST]<think>hm</think>First answer.<|im_end|>[INST] Two? [/INST]")
    assert targets[0] == "<think>hm</think>First answer.<|im_end|>"


def test_an_answer_that_a_template_drops_is_rejected(tokenize_rows: TokenizeRows) -> None:
    with pytest.raises(StepFailure, match="line 1: in the text that the model's chat template makes, message 2"):
        tokenize_rows([{"messages": DIALOGUE}], FORGETFUL)


def test_a_conversation_that_a_template_rejects_is_reported_with_its_location(tokenize_rows: TokenizeRows) -> None:
    with pytest.raises(StepFailure, match=r"line 2: .* rejects this conversation: System role not supported") as e:
        tokenize_rows([{"messages": DIALOGUE[1:]}, {"messages": DIALOGUE}], ALTERNATING)
    assert e.value.exit_code is ExitCode.BAD_DATASET


def test_a_template_that_does_not_compile_is_a_bad_configuration(tokenize_rows: TokenizeRows) -> None:
    with pytest.raises(StepFailure, match="chat template cannot be used") as e:
        tokenize_rows([chat_row("a", "b")], "{% for %}")
    assert e.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_the_date_in_a_template_is_frozen(tokenize_rows: TokenizeRows) -> None:
    [(text, _)] = tokenize_rows([chat_row("a", "b")], DATED)
    assert "Today is 01 January 2025" in text


def test_a_chat_needs_a_template(tokenize_rows: TokenizeRows) -> None:
    with pytest.raises(StepFailure, match="the model has no chat template: name one in spec") as e:
        tokenize_rows([chat_row("a", "b")], None)
    assert e.value.exit_code is ExitCode.BAD_DATASET


def test_columns_may_have_other_names(tokenize_rows: TokenizeRows) -> None:
    columns = Columns(instruction="question", output="answer")
    [(text, _)] = tokenize_rows([{"question": "Which?", "answer": "This.", "other": 3}], columns=columns)
    assert text.startswith("<|im_start|>user\nWhich?<|im_end|>")


def test_sharegpt_gives_the_tokens_of_the_same_chat(tokenize_rows: TokenizeRows) -> None:
    sides = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": sides[turn["role"]], "value": turn["content"]} for turn in DIALOGUE]
    chat = tokenize_rows([{"messages": DIALOGUE}])
    assert tokenize_rows([{"conversations": turns}]) == chat
    assert tokenize_rows([{"conversations": turns[1:], "system": "Be short."}]) == chat
    assert tokenize_rows([{"dialogue": turns}], columns=Columns(conversations="dialogue")) == chat


@pytest.mark.parametrize(("column", "format_"), [("messages", "sharegpt"), ("conversations", "chat")])
def test_the_notation_decides_the_format_and_not_the_name_of_the_column(
    tokenize_rows: TokenizeRows, column: str, format_: str
) -> None:
    turns = DIALOGUE
    if format_ == "sharegpt":
        turns = [{"from": turn["role"], "value": turn["content"]} for turn in DIALOGUE]
    [(_, targets)] = tokenize_rows([{column: turns}])
    assert len(targets) == 2
    assert detect_format(Row("line 1", {column: turns}, 1), None)[0] == format_


CALLS = [
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "pods", "arguments": {"namespace": "wéb"}}}]},
    {"role": "tool", "content": "shop", "name": "pods"},
    {"role": "assistant", "content": "The shop."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "pods", "arguments": {}}}]},
    {"role": "tool", "content": "none"},
    {"role": "assistant", "content": "No more."},
]
LEARNT_CALLS = [
    '<call>{"name": "pods", "arguments": {"namespace": "wéb"}}</call><|im_end|>',
    "The shop.<|im_end|>",
    'I look.<call>{"name": "pods", "arguments": {}}</call><|im_end|>',
    "No more.<|im_end|>",
]


def with_text_arguments() -> list[dict[str, Any]]:
    """Return the same calls with arguments as JSON in a text, as in OpenAI's API."""
    calls = json.loads(json.dumps(CALLS))
    for message in calls:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return list(calls)


def test_tool_calls_are_targets_and_their_results_are_not(tokenize_rows: TokenizeRows) -> None:
    """Whether tools and arguments are objects or texts."""
    [(text, targets)] = tokenize_rows([{"messages": CALLS, "tools": TOOLS}], CALLING)
    assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "pods"')
    assert targets == LEARNT_CALLS
    texts = {"messages": with_text_arguments(), "tools": json.dumps(TOOLS)}
    assert tokenize_rows([texts], CALLING) == [(text, targets)]


@pytest.mark.parametrize("leaves_out", ["{{ tool | tojson }}", "(call.function | tojson)", "message.content"])
def test_a_template_that_leaves_out_part_of_a_call_is_rejected(tokenize_rows: TokenizeRows, leaves_out: str) -> None:
    template = CALLING.replace(leaves_out, "''")
    with pytest.raises(StepFailure, match="line 1: the conversation uses tools, but the model's chat template leaves"):
        tokenize_rows([{"messages": CALLS, "tools": TOOLS}], template)


def test_all_tokens_of_one_character_are_targets(tokenize_rows: TokenizeRows) -> None:
    [(text, targets)] = tokenize_rows([chat_row("日本語?", "はい、🎉 ünïcödé")])
    assert "日本語?" in text
    assert targets == ["はい、🎉 ünïcödé<|im_end|>"]


def test_a_tokenizer_of_another_model_is_rejected(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    model = save_model(tmp_path / "models" / "model", LlamaConfig(**{**SHAPE, "vocab_size": 128}))
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")])
    with pytest.raises(StepFailure, match=r"but the model has only 128 tokens \(vocab_size\)") as e:
        prepare(make_context(model=model), records)
    assert e.value.exit_code is ExitCode.BAD_CONFIGURATION
