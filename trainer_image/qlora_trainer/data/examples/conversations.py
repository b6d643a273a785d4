"""Reads conversations in the notation of OpenAI or ShareGPT, with tool calls."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast, get_args

from qlora_api.spec.training import TrainOn
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.examples.example import Function, Message, Role, ToolCall
from qlora_trainer.data.read.rows import describe, list_names, parse_json
from qlora_trainer.data.read.text import MAX_LINE_BYTES

_ROLES = get_args(Role)
# Names of the roles in data sets on the hub, in the notation of ShareGPT.
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_CALL_ROLE = "function_call"
# Keys of an answer's reasoning in data sets, besides the content.
_REASONING = ("reasoning_content", "reasoning", "thinking")
# OpenAI's format for fine-tuning marks answers by weight, and trains on those without.
_MARK, _WEIGHT = "train", "weight"
MARKING: frozenset[TrainOn] = frozenset({"weighted", "marked"})
"""Values of `spec.training.trainOn` that count the rows' marks."""


@dataclass(frozen=True)
class Notation:
    """How a turn is written."""

    role: str
    content: str
    roles: Mapping[str, Role]


CHAT = Notation("role", "content", {role: role for role in _ROLES})
SHAREGPT = Notation("from", "value", _SHAREGPT_ROLES)


def checked_text(value: object, name: str) -> str:
    """The text to train on. Raises StepFailure BAD_DATASET beginning with `name`."""
    if not isinstance(value, str):
        raise bad_dataset(f"{name} is {describe(value)}: must be text")
    if not value.strip():
        raise bad_dataset(f"{name} is empty: must be text; leave the row out, or fill it in")
    if len(value) > MAX_LINE_BYTES:
        raise bad_dataset(f"{name} has {len(value)} characters: at most {MAX_LINE_BYTES} are allowed")
    require_unicode(value, name)
    return value


def require_unicode(value: str, name: str) -> None:
    """Raise StepFailure BAD_DATASET, naming `name`, if text cannot be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_dataset(f"{name} has an unpaired surrogate at character {error.start}: not valid Unicode") from error


def read_turns(
    value: object,
    notation: Notation,
    location: str,
    column: str,
    *,
    is_columnar: bool,
    train_on: TrainOn = "completion",
) -> tuple[Message, ...]:
    """The messages in a list of turns. Raises StepFailure BAD_DATASET naming location and field.

    `is_columnar`: null may stand for a missing key (see Row).
    """
    keys = f"{{{notation.role}, {notation.content}}}"
    if not isinstance(value, list):
        raise bad_dataset(f"{location}: {column!r} is {describe(value)}: must be a list of {keys}")
    if not value:
        raise bad_dataset(f"{location}: {column!r} is empty: must have a user's message and an answer")
    messages = []
    for index, entry in enumerate(value):
        reader = _TurnReader(notation, location, f"{column}[{index}]", is_columnar)
        messages.append(reader.read(entry, has_marks=train_on in MARKING))
    return _with_all_marks(messages, value, location, column) if train_on == "marked" else tuple(messages)


def _with_all_marks(
    messages: list[Message], turns: list[Mapping[str, object]], location: str, column: str
) -> tuple[Message, ...]:
    """The messages, each answer with a mark. Raises StepFailure BAD_DATASET if none."""
    if all(message.trained is None for message in messages):
        raise bad_dataset(
            f"{location}: {column!r} has no mark, and spec.training.trainOn is marked: set train: true (or weight: 1) "
            "in the assistant messages to train on, or choose another trainOn"
        )
    unmarked = not any(turn.get(_MARK) is not None for turn in turns)
    return tuple(
        replace(message, trained=unmarked) if message.role == "assistant" and message.trained is None else message
        for message in messages
    )


@dataclass(frozen=True)
class _TurnReader:
    """Reads one turn."""

    notation: Notation
    location: str
    name: str
    is_columnar: bool

    def read(self, value: object, *, has_marks: bool) -> Message:
        notation = self.notation
        if not isinstance(value, dict):
            raise bad_dataset(
                f"{self.location}: {self.name!r} is {describe(value)}: must be an object with {notation.role} and "
                f"{notation.content}"
            )
        calls = () if value.get("tool_calls") is None else self._calls(value["tool_calls"])
        needed = (notation.role,) if calls else (notation.role, notation.content)
        missing = [field for field in needed if field not in value]
        if missing:
            raise bad_dataset(
                f"{self.location}: {self.name!r} has no {' and no '.join(missing)}; it has {list_names(value)}"
            )
        if value.get("function_call"):
            raise bad_dataset(f"{self._field('function_call')} is set: write it as a list of tool_calls")
        role = self._role(value[notation.role])
        if calls and role != "assistant":
            raise bad_dataset(f"{self._field('tool_calls')} is set in a {role} message: only an assistant calls tools")
        text = value.get(notation.content)
        if value[notation.role] == _CALL_ROLE and notation is SHAREGPT:
            content, calls = "", self._calls(self._json(text, notation.content))
        else:
            content = self._content(role, text, called=bool(calls))
        return Message(
            role,
            content,
            calls,
            self._optional(value, "name") if role == "tool" else None,
            self._optional(value, "tool_call_id") if role == "tool" else None,
            self._reasoning(value, role, content),
            self._mark(value, role) if has_marks else None,
        )

    def _reasoning(self, value: Mapping[str, object], role: Role, content: str) -> str | None:
        """The model's reasoning before its answer, or None."""
        found = [key for key in _REASONING if value.get(key) not in (None, "")]
        if not found:
            return None
        if role != "assistant":
            raise bad_dataset(f"{self._field(found[0])} is set in a {role} message: only an assistant's has reasoning")
        if len(found) > 1:
            raise bad_dataset(f"{self._field(found[0])} and {found[1]!r} are both set: keep one")
        reasoning = checked_text(value[found[0]], self._field(found[0]))
        if "<think>" in content:
            raise bad_dataset(
                f"{self._field(found[0])} is set, and the {self.notation.content} has <think> too: keep the reasoning "
                "in one of them"
            )
        return reasoning

    def _mark(self, value: Mapping[str, object], role: Role) -> bool | None:
        """Whether the message is marked for training, or None without a mark."""
        train, weight = value.get(_MARK), value.get(_WEIGHT)
        if train is not None and not isinstance(train, bool):
            raise bad_dataset(f"{self._field(_MARK)} is {describe(train)}: must be true or false")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            shown = weight if isinstance(weight, int | float) else describe(weight)
            raise bad_dataset(f"{self._field(_WEIGHT)} is {shown}: must be 0 or 1")
        if None not in (train, weight) and train != bool(weight):
            raise bad_dataset(f"{self._field(_MARK)} and {_WEIGHT!r} contradict each other: keep one")
        mark = train if train is not None else None if weight is None else bool(weight)
        if mark and role != "assistant":
            key = _MARK if train else _WEIGHT
            raise bad_dataset(f"{self._field(key)} marks a {role} message: only an assistant's is trained on")
        return mark if role == "assistant" else None

    def _role(self, found: object) -> Role:
        role = self.notation.roles.get(found) if isinstance(found, str) else None
        if role is None:
            shown = repr(found[:40]) if isinstance(found, str) else describe(found)
            raise bad_dataset(
                f"{self._field(self.notation.role)} is {shown}: must be one of {', '.join(self.notation.roles)}"
            )
        return role

    def _content(self, role: Role, content: object, *, called: bool) -> str:
        # An empty system message switches off the template's own; a call needs no words, a tool no output.
        if content == "" and (role in ("system", "tool") or called):
            return ""
        if content is None and called:
            return ""
        return checked_text(content, self._field(self.notation.content))

    def _calls(self, value: object) -> tuple[ToolCall, ...]:
        calls = [value] if isinstance(value, dict) else value
        if not isinstance(calls, list):
            raise bad_dataset(f"{self._field('tool_calls')} is {describe(calls)}: must be a list of calls")
        return tuple(self._call(call, f"tool_calls[{index}]") for index, call in enumerate(calls))

    def _call(self, value: object, field: str) -> ToolCall:
        function = value.get("function", value) if isinstance(value, dict) else value
        if not isinstance(value, dict) or not isinstance(function, dict):
            raise bad_dataset(
                f"{self._field(field)} is {describe(function)}: must be {{function: {{name, arguments}}}}"
            )
        name = checked_text(function.get("name"), self._field(f"{field}.name"))
        arguments = self._arguments(function.get("arguments"), f"{field}.arguments")
        return ToolCall(name, arguments, self._optional(value, "id"))

    def _arguments(self, value: object, field: str) -> dict[str, object]:
        arguments = self._json(value, field) if isinstance(value, str) else value
        if not isinstance(arguments, dict):
            raise bad_dataset(f"{self._field(field)} is {describe(arguments)}: must be an object, or its JSON as text")
        if arguments is value:
            require_plain(arguments, self._field(field), is_columnar=self.is_columnar)
        return arguments

    def _json(self, value: object, field: str) -> object:
        text = checked_text(value, self._field(field))
        parsed = parse_json(text, self._field(field))
        require_plain(parsed, self._field(field), is_columnar=False)
        return parsed

    def _optional(self, value: Mapping[str, object], field: str) -> str | None:
        found = value.get(field)
        return None if found is None else checked_text(found, self._field(field))

    def _field(self, field: str) -> str:
        return f"{self.location}: '{self.name}.{field}'"


def read_tools(value: object, name: str, *, is_columnar: bool) -> tuple[Function, ...]:
    """The tools of a row, or none for null. Raises StepFailure BAD_DATASET."""
    if value is None or value == "":
        return ()
    tools = parse_json(checked_text(value, name), name) if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise bad_dataset(f"{name} is {describe(tools)}: must be a list of tools, or its JSON as text")
    require_plain(tools, name, is_columnar=is_columnar and tools is value)
    return tuple(_tool(tool, f"{name}, tool {index}") for index, tool in enumerate(tools))


def _tool(value: object, name: str) -> Function:
    function = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise bad_dataset(f"{name} is not a function with a name: must be {{type: function, function: {{name, …}}}}")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise bad_dataset(f"{name}: parameters is {describe(parameters)}: must be a JSON schema, an object")
    return value if isinstance(value, dict) and "function" in value else {"type": "function", "function": function}


def require_plain(value: object, name: str, *, is_columnar: bool) -> None:
    """Raise StepFailure unless the value is JSON, in columnar files without null."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise bad_dataset(f"{name} cannot be written as JSON ({error})") from error
    require_unicode(text, name)
    if is_columnar and _has_null(value):
        raise bad_dataset(
            f"{name} has null, which Parquet also writes for a key that a row does not have: store it as JSON text"
        )


def _has_null(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_null, value.values()))
    return any(map(_has_null, value)) if isinstance(value, list) else value is None


def check_turns(
    messages: tuple[Message, ...], location: str, column: str, before: int = 0, first_column: str = ""
) -> None:
    """Raise StepFailure BAD_DATASET unless the roles alternate as in a Conversation.

    `before`: how many messages are of the column `first_column`; those after them are of `column`.
    """
    expected: tuple[Role, ...] = ("system", "user")
    for index, message in enumerate(messages):
        if message.role not in expected:
            after = f"after {messages[index - 1].role!r} " if index and messages[index - 1].role != "system" else ""
            name = f"{first_column}[{index}]" if index < before else f"{column}[{index - before}]"
            needed = expected[-1] if "system" in expected else " or ".join(expected)
            raise bad_dataset(
                f"{location}: '{name}.role' is {message.role!r} {after}where {needed!r} is expected: "
                "after an optional system message, user and assistant take turns; results of tools follow their call"
            )
        expected = _FOLLOWERS[message.role](message)
    if not any(message.role == "assistant" for message in messages):
        raise bad_dataset(f"{location}: {column!r} has no assistant message: there is nothing to train on")


_FOLLOWERS: Mapping[Role, Callable[[Message], tuple[Role, ...]]] = {
    "system": lambda _message: ("user",),
    "user": lambda _message: ("assistant",),
    "assistant": lambda message: ("tool",) if message.tool_calls else ("user",),
    "tool": lambda _message: cast("tuple[Role, ...]", ("tool", "assistant")),
}
