"""Rows that are JSON but not a conversation, completion or text."""

import json
from typing import Any

from tests.support.bad_data.case import GOOD, BadData, one_file, second_line


def chat(*roles: str, content: Any = "some text") -> str:
    """A line of format chat with these roles."""
    return json.dumps({"messages": [{"role": role, "content": content} for role in roles]}) + "\n"


def talk(*turns: dict[str, Any], **columns: Any) -> str:
    """A line of format chat with these messages and further columns."""
    return json.dumps({"messages": list(turns), **columns}) + "\n"


ASK = {"role": "user", "content": "Which?"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "pods", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "web"}
ANSWER = {"role": "assistant", "content": "web"}
TOOLS = [{"type": "function", "function": {"name": "pods", "parameters": {}}}]


def calling(call: Any) -> str:
    """A line whose assistant makes this call."""
    return talk(ASK, {"role": "assistant", "tool_calls": [call]}, RESULT, ANSWER, tools=TOOLS)


def sharegpt(name: str, row: dict[str, Any], message: str) -> BadData:
    """A JSONL file of one wrong row of format sharegpt."""
    return one_file(name, "train.jsonl", json.dumps(row), f"pvc://data/train.jsonl line 1{message}")


CONVERSATIONS = (
    second_line(
        "no column",
        '{"chat": []}\n',
        " has no column 'messages', which format chat needs; it has 'chat': name it in spec.dataset.columns.messages",
    ),
    second_line("text as messages", '{"messages": "hi"}\n', ": 'messages' is text: must be a list of {role, content}"),
    second_line("null as messages", '{"messages": null}\n', ": 'messages' is null: must be a list"),
    second_line("no messages", '{"messages": []}\n', ": 'messages' is empty: must have a user's message and an answer"),
    second_line("list of text", '{"messages": ["hi"]}\n', ": 'messages[0]' is text: must be an object with role and"),
    second_line(
        "other keys",
        '{"messages": [{"from": "human", "value": "hi"}]}\n',
        ": 'messages[0]' has no role and no content; it has 'from', 'value'",
    ),
    second_line(
        "unknown role",
        chat("human", "assistant"),
        ": 'messages[0].role' is 'human': must be one of system, user, assistant, tool",
    ),
    second_line("number as role", '{"messages": [{"role": 1, "content": "a"}]}\n', ": 'messages[0].role' is a number"),
    second_line(
        "two users in a row",
        chat("user", "user", "assistant"),
        ": 'messages[1].role' is 'user' after 'user' where 'assistant' is expected: after an optional system message",
    ),
    second_line("answer first", chat("assistant", "user"), ": 'messages[0].role' is 'assistant' where 'user' is"),
    second_line(
        "late system", chat("user", "system"), ": 'messages[1].role' is 'system' after 'user' where 'assistant'"
    ),
    second_line(
        "no answer", chat("system", "user"), ": 'messages' has no assistant message: there is nothing to train on"
    ),
    second_line("only system", chat("system"), ": 'messages' has no assistant message: there is nothing to train on"),
    second_line("number", chat("user", "assistant", content=3), ": 'messages[0].content' is a number: must be text"),
    second_line(
        "null content", chat("user", "assistant", content=None), ": 'messages[0].content' is null: must be text"
    ),
    second_line("parts", chat("user", "assistant", content=[{}]), ": 'messages[0].content' is a list: must be text"),
    second_line(
        "empty content", chat("user", "assistant", content=" "), ": 'messages[0].content' is empty: must be text"
    ),
    second_line(
        "an unpaired surrogate",
        chat("user", "assistant", content="\ud800"),
        ": 'messages[0].content' has an unpaired surrogate at character 0: not valid Unicode",
    ),
    second_line(
        "call without tools",
        talk(ASK, CALL, RESULT, ANSWER),
        ": 'messages' calls tools, but 'tools' describes none: a model learns to call the tools it is shown; add",
    ),
    second_line(
        "call without its result",
        talk(ASK, CALL, ASK, tools=TOOLS),
        ": 'messages[2].role' is 'user' after 'assistant' where 'tool' is expected",
    ),
    second_line(
        "result without a call",
        talk(ASK, ANSWER, RESULT),
        ": 'messages[2].role' is 'tool' after 'assistant' where 'user'",
    ),
    second_line(
        "call by a user", talk({**CALL, "role": "user"}), ": 'messages[0].tool_calls' is set in a user message: only an"
    ),
    second_line(
        "call of no function", calling(3), ": 'messages[1].tool_calls[0]' is a number: must be {function: {name"
    ),
    second_line(
        "call without a name", calling({"arguments": {}}), ": 'messages[1].tool_calls[0].name' is null: must be"
    ),
    second_line(
        "arguments as a list",
        calling({"name": "pods", "arguments": [1]}),
        ": 'messages[1].tool_calls[0].arguments' is a list: must be an object, or its JSON as text",
    ),
    second_line(
        "arguments that are no JSON",
        calling({"name": "pods", "arguments": "{a}"}),
        ": 'messages[1].tool_calls[0].arguments' column 2: not valid JSON (Expecting property name",
    ),
    second_line(
        "arguments out of range",
        calling({"name": "pods", "arguments": {"n": 0}}).replace('"n": 0', '"n": 1e999'),
        ": 'messages[1].tool_calls[0].arguments' cannot be written as JSON (Out of range float values",
    ),
    second_line(
        "older notation of a call",
        talk(ASK, {"role": "assistant", "content": "a", "function_call": {"name": "pods"}}),
        ": 'messages[1].function_call' is set: write it as a list of tool_calls",
    ),
    second_line(
        "tools as a number", talk(ASK, ANSWER, tools=3), ": 'tools' is a number: must be a list of tools, or its"
    ),
    second_line(
        "tool without a name", talk(ASK, ANSWER, tools=[{}]), ": 'tools', tool 0 is not a function with a name"
    ),
    second_line(
        "template without tools",
        talk(ASK, CALL, RESULT, ANSWER, tools=TOOLS),
        ": the conversation uses tools, but the model's chat template leaves out tools, calls or their results",
    ),
    sharegpt(
        "unknown side",
        {"conversations": [{"from": "me", "value": "a"}]},
        ": 'conversations[0].from' is 'me': must be one of system, human, user, gpt, assistant, model, function_call,",
    ),
    sharegpt(
        "answer first in sharegpt",
        {"conversations": [{"from": "gpt", "value": "a"}]},
        ": 'conversations[0].role' is 'assistant' where 'user' is expected",
    ),
    sharegpt(
        "two system messages",
        {"system": "a", "conversations": [{"from": "system", "value": "b"}]},
        ": both 'system' and 'conversations[0]' are a system message: keep one",
    ),
    sharegpt(
        "call that is no JSON",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "pods()"}]},
        ": 'conversations[1].value' column 1: not valid JSON (Expecting value): write it as one JSON value",
    ),
    one_file(
        "no format",
        "train.jsonl",
        '{"question": "a", "answer": "b"}\n',
        "pvc://data/train.jsonl line 1 fits no format; it has the columns 'question', 'answer'. Formats and the "
        "columns that they need are chat: messages; ",
    ),
    one_file(
        "two formats",
        "train.jsonl",
        '{"prompt": "a", "completion": "b", "text": "c"}\n',
        "pvc://data/train.jsonl line 1 fits more than one format, prompt-completion and text; it has the columns 'pro",
    ),
    one_file(
        "column that is missing later",
        "train.jsonl",
        '{"text": "a"}\n{"txt": "b"}\n',
        "pvc://data/train.jsonl line 2 has no column 'text', which format text needs; it has 'txt'",
    ),
    one_file("empty text", "train.jsonl", '{"text": "a"}\n{"text": ""}\n', "line 2: 'text' is empty: must be text"),
    one_file(
        "number as text", "train.jsonl", '{"text": "a"}\n{"text": 1.5}\n', "line 2: 'text' is a number: must be text"
    ),
    one_file(
        "true as text", "train.jsonl", '{"prompt": "a", "completion": true}\n', "line 1: 'completion' is true: must"
    ),
    one_file(
        "object as text",
        "train.jsonl",
        '{"instruction": "a", "input": {}, "output": "b"}\n',
        "line 1: 'input' is an object: must be text",
    ),
    one_file(
        "wrong column name",
        "train.jsonl",
        GOOD,
        "pvc://data/train.jsonl line 1 fits no format; it has the columns 'messages'. Formats and the "
        "columns that they need",
        columns={"messages": "turns"},
    ),
    one_file(
        "another format",
        "train.jsonl",
        GOOD,
        "pvc://data/train.jsonl line 1 has no column 'text', which format text needs; it has 'messages': name it in",
        format="text",
    ),
    one_file(
        "tools column that is not there",
        "train.jsonl",
        GOOD,
        "line 1 has no column 'functions', which format chat needs; it has 'messages'",
        columns={"tools": "functions"},
    ),
    one_file(
        "all too long",
        "train.jsonl",
        GOOD.replace("pods?", "pods? " * 99),
        "pvc://data/train.jsonl: all 1 rows are longer than spec.training.maxSequenceLength (64), the longest has",
    ),
)
