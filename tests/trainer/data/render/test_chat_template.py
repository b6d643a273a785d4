"""The learned part of a row: its text, and the tokens that are targets."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import CHATML, SHAPE, Recorded, chat_row, save_model, write_rows
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


class TokenizeRows:
    """Rows of prepare with a model's template."""

    def __init__(self, make_context: MakeContext, records: Recorded, tmp_path: Path, tiny_llama: Path) -> None:
        self._make_context, self._records = make_context, records
        self._data, self._model, self._tiny_llama = tmp_path / "data", tmp_path / "models" / "model", tiny_llama

    def __call__(
        self, rows: list[dict[str, Any]], template: str | None = CHATML, *, of_processor: bool = False, **spec: Any
    ) -> list[tuple[str, list[str]]]:
        """For each row its text and the stretches of it that are targets."""
        if not self._model.exists():
            self._model.parent.mkdir()
            self._model.mkdir()
            for file in self._tiny_llama.iterdir():
                if file.name != "chat_template.jinja":
                    (self._model / file.name).hardlink_to(file)
            if of_processor:
                (self._model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
            elif template is not None:
                (self._model / "chat_template.jinja").write_text(template)
        write_rows(self._data / "train.jsonl", rows)
        spec = {"training": {"packing": False, "maxSequenceLength": 256}, **spec}
        context = self._make_context(spec, model=self._model)
        record = prepare(context, self._records)
        dataset = PreparedDataset.open(context.workspace.root / record.data_path, "train")
        tokenizer = AutoTokenizer.from_pretrained(self._model)
        return [self._text_and_targets(tokenizer, dataset[index]) for index in range(len(dataset))]

    @staticmethod
    def _text_and_targets(tokenizer: Any, sequence: Any) -> tuple[str, list[str]]:
        stretches: list[list[int]] = []
        before = False
        for token, label in zip(sequence.input_ids.tolist(), sequence.labels.tolist(), strict=True):
            assert label in (token, -100)
            if label == token:
                stretches[-1:] = [[*stretches[-1], token]] if before else [*stretches[-1:], [token]]
            before = label == token
        return tokenizer.decode(sequence.input_ids), [tokenizer.decode(stretch) for stretch in stretches]


@pytest.fixture
def tokenize_rows(make_context: MakeContext, records: Recorded, tmp_path: Path, tiny_llama: Path) -> TokenizeRows:
    return TokenizeRows(make_context, records, tmp_path, tiny_llama)


def test_every_answer_and_its_end_mark_are_targets_and_nothing_else(tokenize_rows: TokenizeRows) -> None:
    """The padding token is the end mark here: a mask made by its id would lose the end of every answer."""
    [(text, targets)] = tokenize_rows([{"messages": DIALOGUE}])
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n")
    assert targets == [
        "<think>hm</think>First answer.<|im_end|>",
        "<think>well</think>Second answer.<|im_end|>",
    ]


def test_every_token_is_a_target_with_train_on_all(tokenize_rows: TokenizeRows) -> None:
    training = {"packing": False, "maxSequenceLength": 256, "trainOn": "all"}
    [(text, targets)] = tokenize_rows([{"messages": DIALOGUE}], training=training)
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


def test_a_prompt_becomes_a_turn_of_a_chat_template(tokenize_rows: TokenizeRows) -> None:
    [(text, targets)] = tokenize_rows([{"prompt": "Which pods?", "completion": "All."}])
    assert text == "<|im_start|>user\nWhich pods?<|im_end|>\n<|im_start|>assistant\nAll.<|im_end|>\n"
    assert targets == ["All.<|im_end|>"]


def test_an_instruction_becomes_a_turn_with_its_input(tokenize_rows: TokenizeRows) -> None:
    rows = [
        {"instruction": "Scale it.", "input": "the shop", "output": "Done."},
        {"instruction": "Scale it.", "input": "", "output": "Done."},
    ]
    (with_input, targets), (without, _) = tokenize_rows(rows)
    assert with_input.startswith("<|im_start|>user\nScale it.\n\nthe shop<|im_end|>\n")
    assert without.startswith("<|im_start|>user\nScale it.<|im_end|>\n")
    assert targets == ["Done.<|im_end|>"]


def test_without_a_template_prompt_and_completion_are_one_text_with_an_end(tokenize_rows: TokenizeRows) -> None:
    [(text, targets)] = tokenize_rows([{"prompt": "Which pods? ", "completion": "All."}], None)
    assert (text, targets) == ("Which pods? All.<|im_end|>", ["All.<|im_end|>"])


def test_the_first_token_of_an_answer_is_a_target_even_with_the_prompts_space(
    tokenize_rows: TokenizeRows,
) -> None:
    [(text, targets)] = tokenize_rows([{"prompt": "kubectl get ", "completion": "pods"}], None)
    assert (text, targets) == ("kubectl get pods<|im_end|>", [" pods<|im_end|>"])


def test_without_a_template_an_instruction_is_paragraphs(tokenize_rows: TokenizeRows) -> None:
    [(text, targets)] = tokenize_rows([{"instruction": "Scale it.", "input": "the shop", "output": "Done."}], None)
    assert (text, targets) == ("Scale it.\n\nthe shop\n\nDone.<|im_end|>", ["Done.<|im_end|>"])


def test_plain_text_is_a_target_as_a_whole_even_with_a_chat_template(tokenize_rows: TokenizeRows) -> None:
    [(text, targets)] = tokenize_rows([{"text": "kubectl get pods"}])
    assert text == "kubectl get pods<|im_end|>"
    assert targets[-1].endswith("get pods<|im_end|>")


def test_a_chat_needs_a_template(tokenize_rows: TokenizeRows) -> None:
    with pytest.raises(StepFailure, match="the model has no chat template: name one in spec") as e:
        tokenize_rows([chat_row("a", "b")], None)
    assert e.value.exit_code is ExitCode.BAD_DATASET


def test_columns_may_have_other_names(tokenize_rows: TokenizeRows) -> None:
    columns = {"instruction": "question", "output": "answer"}
    [(text, _)] = tokenize_rows([{"question": "Which?", "answer": "This.", "other": 3}], dataset={"columns": columns})
    assert text.startswith("<|im_start|>user\nWhich?<|im_end|>")


def test_sharegpt_gives_the_tokens_of_the_same_chat(tokenize_rows: TokenizeRows) -> None:
    sides = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": sides[turn["role"]], "value": turn["content"]} for turn in DIALOGUE]
    chat = tokenize_rows([{"messages": DIALOGUE}])
    assert tokenize_rows([{"conversations": turns}]) == chat
    assert tokenize_rows([{"conversations": turns[1:], "system": "Be short."}]) == chat
    assert (
        tokenize_rows([{"dialogue": turns}], dataset={"format": "sharegpt", "columns": {"conversations": "dialogue"}})
        == chat
    )


@pytest.mark.parametrize(("column", "format_"), [("messages", "sharegpt"), ("conversations", "chat")])
def test_the_notation_decides_the_format_and_not_the_name_of_the_column(
    tokenize_rows: TokenizeRows, records: Recorded, column: str, format_: str
) -> None:
    turns = DIALOGUE
    if format_ == "sharegpt":
        turns = [{"from": turn["role"], "value": turn["content"]} for turn in DIALOGUE]
    [(_, targets)] = tokenize_rows([{column: turns}])
    assert len(targets) == 2
    assert records.findings.dataset is not None
    assert records.findings.dataset.format == format_


def test_an_instruction_may_have_a_system_message(tokenize_rows: TokenizeRows) -> None:
    row = {"instruction": "Scale it.", "output": "Done.", "system": "Be short."}
    [(text, targets)] = tokenize_rows([row])
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nScale it.<|im_end|>\n")
    assert targets == ["Done.<|im_end|>"]


def test_without_a_template_a_system_message_comes_first(tokenize_rows: TokenizeRows) -> None:
    [(text, _)] = tokenize_rows([{"instruction": "Scale it.", "output": "Done.", "system": "Be short."}], None)
    assert text == "Be short.\n\nScale it.\n\nDone.<|im_end|>"


TOOLS = [{"type": "function", "function": {"name": "pods", "description": "", "parameters": {"type": "object"}}}]
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
CALLING = """\
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LEARNT_CALLS = [
    '<call>{"name": "pods", "arguments": {"namespace": "wéb"}}</call><|im_end|>',
    "The shop.<|im_end|>",
    'I look.<call>{"name": "pods", "arguments": {}}</call><|im_end|>',
    "No more.<|im_end|>",
]


def with_text_arguments() -> list[dict[str, Any]]:
    """The same calls with their arguments as JSON in a text, as OpenAI's interface has them."""
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


def test_tool_calls_in_sharegpt_are_targets_too(tokenize_rows: TokenizeRows) -> None:
    turns = [
        {"from": "human", "value": "Which?"},
        {"from": "function_call", "value": '{"name": "pods", "arguments": {"namespace": "wéb"}}'},
        {"from": "observation", "value": "shop"},
        {"from": "gpt", "value": "The shop."},
    ]
    [(_, targets)] = tokenize_rows([{"conversations": turns, "tools": json.dumps(TOOLS)}], CALLING)
    assert targets == LEARNT_CALLS[:2]


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
