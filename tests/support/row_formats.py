"""Rows of each format: what a model learns from the good ones, and the messages about the wrong ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_api.spec.dataset import RowFormat
from tests.support.models.tiny import CHATML

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
)


def _chat(*roles: str, content: Any = "some text") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role in roles]}


def _calling(call: Any) -> dict[str, Any]:
    return {"messages": [ASK, {"role": "assistant", "tool_calls": [call]}, RESULT, ANSWER], "tools": TOOLS}


WRONG_ROWS: Mapping[RowFormat, tuple[tuple[Mapping[str, Any], str], ...]] = {
    "chat": (
        (
            {"chat": []},
            " has no column 'messages', which format chat needs; it has 'chat': name it in spec.dataset.",
        ),
        ({"messages": "hi"}, ": 'messages' is text: must be a list of {role, content}"),
        ({"messages": None}, ": 'messages' is null: must be a list"),
        ({"messages": []}, ": 'messages' is empty: must have a user's message and an answer"),
        ({"messages": ["hi"]}, ": 'messages[0]' is text: must be an object with role and"),
        (
            {"messages": [{"from": "human", "value": "hi"}]},
            ": 'messages[0]' has no role and no content; it has 'from', 'value'",
        ),
        (_chat("human", "assistant"), ": 'messages[0].role' is 'human': must be one of system, user, assistant, tool"),
        ({"messages": [{"role": 1, "content": "a"}]}, ": 'messages[0].role' is a number"),
        (
            _chat("user", "user", "assistant"),
            ": 'messages[1].role' is 'user' after 'user' where 'assistant' is expected: after an optional system mess",
        ),
        (_chat("assistant", "user"), ": 'messages[0].role' is 'assistant' where 'user' is"),
        (_chat("user", "system"), ": 'messages[1].role' is 'system' after 'user' where 'assistant'"),
        (_chat("system", "user"), ": 'messages' has no assistant message: there is nothing to train on"),
        (_chat("system"), ": 'messages' has no assistant message: there is nothing to train on"),
        (_chat("user", "assistant", content=3), ": 'messages[0].content' is a number: must be text"),
        (_chat("user", "assistant", content=None), ": 'messages[0].content' is null: must be text"),
        (_chat("user", "assistant", content=[{}]), ": 'messages[0].content' is a list: must be text"),
        (_chat("user", "assistant", content=" "), ": 'messages[0].content' is empty: must be text"),
        (
            _chat("user", "assistant", content="\ud800"),
            ": 'messages[0].content' has an unpaired surrogate at character 0: not valid Unicode",
        ),
        (
            {"messages": CALLS},
            ": 'messages' calls tools, but 'tools' describes none: a model learns to call the tools it is shown; add",
        ),
        (
            {"messages": [ASK, CALL, ASK], "tools": TOOLS},
            ": 'messages[2].role' is 'user' after 'assistant' where 'tool' is expected",
        ),
        ({"messages": [ASK, ANSWER, RESULT]}, ": 'messages[2].role' is 'tool' after 'assistant' where 'user'"),
        ({"messages": [CALL | {"role": "user"}]}, ": 'messages[0].tool_calls' is set in a user message: only an"),
        (_calling(3), ": 'messages[1].tool_calls[0]' is a number: must be {function: {name"),
        (_calling({"arguments": {}}), ": 'messages[1].tool_calls[0].name' is null: must be"),
        (
            _calling({"name": "pods", "arguments": [1]}),
            ": 'messages[1].tool_calls[0].arguments' is a list: must be an object, or its JSON as text",
        ),
        (
            _calling({"name": "pods", "arguments": "{a}"}),
            ": 'messages[1].tool_calls[0].arguments' column 2: not valid JSON (Expecting property name",
        ),
        (
            _calling({"name": "pods", "arguments": {"n": float("inf")}}),
            ": 'messages[1].tool_calls[0].arguments' cannot be written as JSON (Out of range float values",
        ),
        (
            {"messages": [ASK, ANSWER | {"function_call": {"name": "pods"}}]},
            ": 'messages[1].function_call' is set: write it as a list of tool_calls",
        ),
        ({"messages": [ASK, ANSWER], "tools": 3}, ": 'tools' is a number: must be a list of tools, or its"),
        ({"messages": [ASK, ANSWER], "tools": [{}]}, ": 'tools', tool 0 is not a function with a name"),
        (
            {"messages": [ASK, ANSWER], "tools": [{"function": {"name": "pods", "parameters": "{}"}}]},
            ": 'tools', tool 0: parameters is text: must be a JSON schema, an object",
        ),
        ({"messages": [ASK, ANSWER | {"reasoning": 3}]}, ": 'messages[1].reasoning' is a number: must be text"),
        (
            {"messages": [ASK, ANSWER | {"reasoning": "a", "thinking": "b"}]},
            ": 'messages[1].reasoning' and 'thinking' are both set: keep one",
        ),
        (
            {"messages": [ASK, ANSWER | {"reasoning": "a", "content": "<think>b</think>c"}]},
            ": 'messages[1].reasoning' is set, and the content has <think> too",
        ),
        (
            {"messages": [ASK | {"reasoning": "hm"}, ANSWER]},
            ": 'messages[0].reasoning' is set in a user message: only an assistant's has reasoning",
        ),
    ),
    "sharegpt": (
        (
            {"conversations": [{"from": "me", "value": "a"}]},
            ": 'conversations[0].from' is 'me': must be one of system, human, user, gpt, assistant, model, function",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "a"}]},
            ": 'conversations[0].role' is 'assistant' where 'user' is expected",
        ),
        (
            {"system": "a", "conversations": [{"from": "system", "value": "b"}]},
            ": both 'system' and 'conversations[0]' are a system message: keep one",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "pods()"}]},
            ": 'conversations[1].value' column 1: not valid JSON (Expecting value): write it as one JSON value",
        ),
    ),
    "instruction": (({"instruction": "a", "input": {}, "output": "b"}, ": 'input' is an object: must be text"),),
    "prompt-completion": (({"prompt": "a", "completion": True}, ": 'completion' is true: must be text"),),
    "text": (
        ({"txt": "b"}, " has no column 'text', which format text needs; it has 'txt'"),
        ({"text": ""}, ": 'text' is empty: must be text"),
        ({"text": 1.5}, ": 'text' is a number: must be text"),
    ),
    "preference": (
        ({"chosen": "a", "rejected": "b"}, " has no 'prompt': 'chosen' and 'rejected' are texts, which need one"),
        (
            {"prompt": "p", "chosen": "a", "rejected": [OTHER]},
            ": 'chosen' is text: must be text, or a list of {role, content}; 'chosen' and 'rejected' must be of the sa",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, ": 'rejected' is empty: must be text"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, ": 'chosen' is null: must be text, or a list of"),
        (
            {"chosen": [ASK, ANSWER], "rejected": [AGAIN, OTHER]},
            ": 'chosen' and 'rejected' do not begin with the same prompt",
        ),
        (
            {"chosen": [ASK, ANSWER, AGAIN], "rejected": [ASK, OTHER]},
            ": 'chosen' ends with a message of role 'user': must end with an answer in words",
        ),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, ": 'chosen[0].role' is 'assistant' where 'user' is"),
        ({"prompt": "p", "chosen": "a"}, " has no column 'rejected', which format preference needs"),
        ({"prompt": "p", "chosen": 1}, " has no column 'rejected', which format preference needs"),
    ),
}
"""By format, each with the beginning of its message, after the row's location."""
