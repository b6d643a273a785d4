"""Turns a row into an example to learn from; changes with the formats of rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from qlora_api.dataset import Columns
from qlora_trainer.data import MAX_LINE_BYTES, Row, describe
from qlora_trainer.failures import bad_dataset

Role = Literal["system", "user", "assistant"]
Format = Literal["chat", "sharegpt", "instruction", "prompt-completion", "text"]

_PARAGRAPH = "\n\n"
_ROLES = get_args(Role)
_UNSUPPORTED_IN_MESSAGES = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn, with at least one answer."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it."""

    prompt: str
    completion: str
    separator: str = ""
    """Between the two where they are one plain text."""

    def as_conversation(self) -> Conversation:
        """The same as a question and its answer, for a model with a chat template."""
        return Conversation((Message("user", self.prompt), Message("assistant", self.completion)))


@dataclass(frozen=True)
class PlainText:
    """Text to continue; all of it is learnt."""

    text: str


Example = Conversation | Completion | PlainText

_REQUIRED: Mapping[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}


class RowReader:
    """Reads the rows of one data set."""

    def __init__(self, format_: Format, columns: Columns | None) -> None:
        self.format = format_
        self._columns = columns or Columns()
        readers: Mapping[Format, Callable[[Row], Example]] = {
            "chat": self._chat,
            "instruction": self._instruction,
            "prompt-completion": self._prompt_completion,
            "text": lambda row: PlainText(self._text(row, "text")),
        }
        self._read = readers[format_]

    def read(self, row: Row) -> Example:
        """The row's example. Raises StepFailure BAD_DATASET naming place and field."""
        return self._read(row)

    def _chat(self, row: Row) -> Conversation:
        column, value = self._value(row, "messages")
        if not isinstance(value, list):
            raise bad_dataset(f"{row.place}: {column!r} is {describe(value)}: must be a list of {{role, content}}")
        if not value:
            raise bad_dataset(f"{row.place}: {column!r} is empty: must have a user's message and an answer")
        messages = tuple(_message(entry, row.place, f"{column}[{index}]") for index, entry in enumerate(value))
        _check_turns(messages, row.place, column)
        return Conversation(messages)

    def _instruction(self, row: Row) -> Completion:
        instruction = self._text(row, "instruction")
        further = self._optional_text(row, "input")
        prompt = instruction + _PARAGRAPH + further if further.strip() else instruction
        return Completion(prompt, self._text(row, "output"), _PARAGRAPH)

    def _prompt_completion(self, row: Row) -> Completion:
        return Completion(self._text(row, "prompt"), self._text(row, "completion"))

    def _value(self, row: Row, field: str) -> tuple[str, object]:
        column = _column(field, self._columns)
        if column not in row.values:
            raise bad_dataset(
                f"{row.place} has no column {column!r}, which format {self.format} needs; it has "
                f"{_listed(row.values)}: name it in spec.dataset.columns.{field} or choose another spec.dataset.format"
            )
        return column, row.values[column]

    def _text(self, row: Row, field: str) -> str:
        column, value = self._value(row, field)
        return checked_text(value, f"{row.place}: {column!r}")

    def _optional_text(self, row: Row, field: str) -> str:
        column = _column(field, self._columns)
        named = getattr(self._columns, field) is not None
        if named:
            self._value(row, field)
        value = row.values.get(column)
        if value is None or value == "":
            return ""
        return checked_text(value, f"{row.place}: {column!r}")


def detect_format(row: Row, columns: Columns | None) -> Format:
    """The format whose columns the row has. Raises StepFailure BAD_DATASET if it is not exactly one."""
    names = columns or Columns()
    fitting = [
        format_ for format_, fields in _REQUIRED.items() if all(_column(field, names) in row.values for field in fields)
    ]
    if len(fitting) == 1:
        return fitting[0]
    needs = "; ".join(f"{name}: {', '.join(_column(f, names) for f in fields)}" for name, fields in _REQUIRED.items())
    found = "fits more than one format, " + " and ".join(fitting) if fitting else "fits no format"
    raise bad_dataset(
        f"{row.place} {found}; it has the columns {_listed(row.values)}. Formats and what they need are {needs}: "
        "set spec.dataset.format, and spec.dataset.columns where names differ"
    )


def checked_text(value: object, name: str) -> str:
    """The value if it is text that can be learnt from. Raises StepFailure BAD_DATASET beginning with `name`."""
    if not isinstance(value, str):
        raise bad_dataset(f"{name} is {describe(value)}: must be text")
    if not value.strip():
        raise bad_dataset(f"{name} is empty: must be text; leave the row out, or fill it in")
    if len(value) > MAX_LINE_BYTES:
        raise bad_dataset(f"{name} has {len(value)} characters: at most {MAX_LINE_BYTES} are allowed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_dataset(
            f"{name} has half of a surrogate pair at character {error.start}: not valid Unicode"
        ) from error
    return value


def _message(value: object, place: str, name: str) -> Message:
    if not isinstance(value, dict):
        raise bad_dataset(f"{place}: {name!r} is {describe(value)}: must be an object with role and content")
    missing = [field for field in ("role", "content") if field not in value]
    if missing:
        raise bad_dataset(f"{place}: {name!r} has no {' and no '.join(missing)}; it has {_listed(value)}")
    for field in _UNSUPPORTED_IN_MESSAGES:
        if value.get(field):
            raise bad_dataset(f"{place}: '{name}.{field}' is set: tool calls are not supported, leave such rows out")
    role = value["role"]
    if role not in _ROLES:
        found = repr(role[:40]) if isinstance(role, str) else describe(role)
        raise bad_dataset(f"{place}: '{name}.role' is {found}: must be one of {', '.join(_ROLES)}")
    # An empty system message is a way to switch off a template's own.
    content = value["content"]
    if not (role == "system" and content == ""):
        content = checked_text(content, f"{place}: '{name}.content'")
    return Message(cast("Role", role), content)


def _check_turns(messages: tuple[Message, ...], place: str, column: str) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    first = len(messages) - len(turns)
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            after = f"after {turns[index - 1].role!r} " if index else ""
            raise bad_dataset(
                f"{place}: '{column}[{first + index}].role' is {message.role!r} {after}where {expected!r} is expected: "
                "after an optional system message, user and assistant take turns"
            )
    if len(turns) < 2:
        raise bad_dataset(f"{place}: {column!r} has no assistant message: there is nothing to learn")


def _column(field: str, columns: Columns) -> str:
    renamed: str | None = getattr(columns, field)
    return renamed or field


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in list(names)[:12]) or "none"
