"""Rows of each format: what a model learns from the good ones, and the messages about the wrong ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_api.spec.dataset import RowFormat
from tests.support.models.tiny import CHATML
from tests.support.rejected.inputs import read_table

TOOLS = [{"type": "function", "function": {"name": "pods", "description": "", "parameters": {"type": "object"}}}]
CALLING = """\
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""A template of a model that calls tools."""
ASK, ANSWER = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "All."}
AGAIN, OTHER = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "None."}
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "pods", "arguments": {"n": "é"}}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "shop"}
CALLS = [ASK, CALL, RESULT, ANSWER]
END = "<|im_end|>"
ASKED = f"<|im_start|>user\nWhich?{END}\n<|im_start|>assistant\n"
CALLED = f'<call>{{"name": "pods", "arguments": {{"n": "é"}}}}</call>{END}'


@dataclass(frozen=True)
class GoodRow:
    """A row, and what a model learns from it."""

    format: RowFormat
    row: Mapping[str, Any]
    ending: str
    """The end of its text."""
    targets: tuple[str, ...]
    """The stretches of the text that count in the loss."""
    template: str | None = CHATML
    """The model's chat template."""


GOOD_ROWS = (
    GoodRow("chat", {"messages": [ASK, ANSWER]}, f"{ASKED}All.{END}\n", (f"All.{END}",)),
    GoodRow("chat", {"messages": CALLS, "tools": TOOLS}, f"All.{END}\n", (CALLED, f"All.{END}"), CALLING),
    GoodRow(
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "All."}], "system": "s"},
        f"<|im_start|>system\ns{END}\n{ASKED}All.{END}\n",
        (f"All.{END}",),
    ),
    GoodRow(
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Which?"},
                {"from": "function_call", "value": '{"name": "pods", "arguments": {"n": "é"}}'},
                {"from": "observation", "value": "shop"},
                {"from": "gpt", "value": "All."},
            ],
            "tools": '[{"name": "pods"}]',
        },
        f"All.{END}\n",
        (CALLED, f"All.{END}"),
        CALLING,
    ),
    GoodRow(
        "instruction",
        {"instruction": "Which?", "input": "", "output": "All."},
        f"{ASKED}All.{END}\n",
        (f"All.{END}",),
    ),
    GoodRow(
        "instruction",
        {"instruction": "Scale.", "input": "the shop", "output": "Done.", "system": "s"},
        f"<|im_start|>system\ns{END}\n<|im_start|>user\nScale.\n\nthe shop{END}\n<|im_start|>assistant\nDone.{END}\n",
        (f"Done.{END}",),
    ),
    GoodRow(
        "instruction",
        {"instruction": "Scale.", "input": "the shop", "output": "Done.", "system": "s"},
        f"s\n\nScale.\n\nthe shop\n\nDone.{END}",
        (f"Done.{END}",),
        None,
    ),
    GoodRow("prompt-completion", {"prompt": "Which?", "completion": "All."}, f"{ASKED}All.{END}\n", (f"All.{END}",)),
    GoodRow("prompt-completion", {"prompt": "get ", "completion": "pods"}, f"get pods{END}", (f" pods{END}",), None),
    GoodRow("text", {"text": "kubectl get pods"}, f"kubectl get pods{END}", (f" get pods{END}",)),
    GoodRow(
        "preference",
        {"prompt": "Which?", "chosen": "All.", "rejected": "None."},
        f"{ASKED}All.{END}\n{ASKED}None.{END}\n",
        (f"All.{END}", f"None.{END}"),
    ),
    GoodRow(
        "preference",
        {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        f"{ASKED}All.{END}\n{ASKED}None.{END}\n",
        (f"All.{END}", f"None.{END}"),
    ),
    # As OpenAI's fine-tuning has preferences.
    GoodRow(
        "preference",
        {
            "input": {"messages": [ASK, CALL, RESULT], "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [OTHER],
        },
        f"<|im_start|>assistant\nNone.{END}\n",
        (f"All.{END}", f"None.{END}"),
        CALLING,
    ),
)

WRONG_ROWS: Mapping[RowFormat, list[tuple[Mapping[str, Any], str]]] = read_table("rows.yaml")
"""By format, each with the beginning of its message, after the row's location."""
