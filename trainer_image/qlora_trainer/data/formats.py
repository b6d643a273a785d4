"""Turns a row into an example to learn from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from qlora_api.dataset import Columns
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.conversations import CHAT, SHAREGPT, check_turns, checked_text, read_tools, read_turns
from qlora_trainer.data.examples import Conversation, Example, Message, PlainText, PromptCompletion
from qlora_trainer.data.rows import Row, listed

Format = Literal["chat", "sharegpt", "instruction", "prompt-completion", "text"]
_PARAGRAPH = "\n\n"
_REQUIRED: Mapping[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL: Mapping[Format, tuple[str, ...]] = {
    "chat": ("tools",),
    "sharegpt": ("system", "tools"),
    "instruction": ("input", "system"),
}


@dataclass(frozen=True)
class Reading:
    """How rows are read: the format, and the columns that are and are not looked at."""

    format: Format
    columns: tuple[str, ...]
    ignored: tuple[str, ...]


class RowReader:
    """Reads the rows of one data set."""

    def __init__(self, format_: Format, columns: Columns | None) -> None:
        self.format = format_
        self._columns = columns or Columns()
        readers: Mapping[Format, Callable[[Row], Example]] = {
            "chat": self._chat,
            "sharegpt": self._sharegpt,
            "instruction": self._instruction,
            "prompt-completion": self._prompt_completion,
            "text": lambda row: PlainText(self._text(row, "text")),
        }
        self._read = readers[format_]

    def read(self, row: Row) -> Example:
        """The row's example. Raises StepFailure BAD_DATASET naming place and field."""
        return self._read(row)

    def reading(self, row: Row) -> Reading:
        """What is looked at in a row with these columns."""
        fields = (*_REQUIRED[self.format], *_OPTIONAL.get(self.format, ()))
        columns = tuple(_column(field, self._columns) for field in fields)
        return Reading(
            self.format,
            tuple(column for column in columns if column in row.values),
            tuple(column for column in row.values if column not in columns),
        )

    def _chat(self, row: Row) -> Conversation:
        column, value = self._value(row, "messages")
        messages = read_turns(value, CHAT, row.place, column, columnar=row.columnar)
        return self._conversation(row, column, messages)

    def _sharegpt(self, row: Row) -> Conversation:
        column, value = self._value(row, "conversations")
        messages = read_turns(value, SHAREGPT, row.place, column, columnar=row.columnar)
        system = self._optional_text(row, "system")
        if system and messages[0].role == "system":
            raise bad_dataset(
                f"{row.place}: both {_column('system', self._columns)!r} and '{column}[0]' are a system message: "
                "keep one"
            )
        return self._conversation(row, column, (Message("system", system), *messages) if system else messages)

    def _conversation(self, row: Row, column: str, messages: tuple[Message, ...]) -> Conversation:
        check_turns(messages, row.place, column)
        name = _column("tools", self._columns)
        if self._columns.tools is not None:
            self._value(row, "tools")
        tools = read_tools(row.values.get(name), f"{row.place}: {name!r}", columnar=row.columnar)
        if not tools and any(message.tool_calls for message in messages):
            raise bad_dataset(
                f"{row.place}: {column!r} calls tools, but {name!r} describes none: a model learns to call what it is "
                "shown; add the column, or leave such rows out"
            )
        return Conversation(messages, tools)

    def _instruction(self, row: Row) -> PromptCompletion:
        instruction = self._text(row, "instruction")
        further = self._optional_text(row, "input")
        prompt = instruction + _PARAGRAPH + further if further.strip() else instruction
        return PromptCompletion(
            prompt, self._text(row, "output"), _PARAGRAPH, self._optional_text(row, "system") or None
        )

    def _prompt_completion(self, row: Row) -> PromptCompletion:
        return PromptCompletion(self._text(row, "prompt"), self._text(row, "completion"))

    def _value(self, row: Row, field: str) -> tuple[str, object]:
        column = _column(field, self._columns)
        if column not in row.values:
            raise bad_dataset(
                f"{row.place} has no column {column!r}, which format {self.format} needs; it has "
                f"{listed(row.values)}: name it in spec.dataset.columns.{field} or choose another spec.dataset.format"
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


def detect_format(row: Row, columns: Columns | None) -> tuple[Format, Columns]:
    """The format whose columns the row has, and the columns' names.

    Data sets call their turns `messages` and `conversations` in either notation, so the turns themselves decide between
    chat and sharegpt. Raises StepFailure BAD_DATASET if it is not exactly one format.
    """
    names = columns or Columns()
    fitting = [
        format_ for format_, fields in _REQUIRED.items() if all(_column(field, names) in row.values for field in fields)
    ]
    if len(fitting) == 1:
        return _by_notation(row, fitting[0], names)
    needs = "; ".join(f"{name}: {', '.join(_column(f, names) for f in fields)}" for name, fields in _REQUIRED.items())
    found = "fits more than one format, " + " and ".join(fitting) if fitting else "fits no format"
    raise bad_dataset(
        f"{row.place} {found}; it has the columns {listed(row.values)}. Formats and what they need are {needs}: "
        "set spec.dataset.format, and spec.dataset.columns where names differ"
    )


def _by_notation(row: Row, format_: Format, names: Columns) -> tuple[Format, Columns]:
    column = _column(_REQUIRED[format_][0], names)
    turns = row.values[column]
    keys = turns[0].keys() if isinstance(turns, list) and turns and isinstance(turns[0], dict) else ()
    if format_ == "sharegpt" and {CHAT.role, CHAT.content} <= set(keys):
        return "chat", names.model_copy(update={"messages": column})
    if format_ == "chat" and {SHAREGPT.role, SHAREGPT.content} <= set(keys):
        return "sharegpt", names.model_copy(update={"conversations": column})
    return format_, names


def _column(field: str, columns: Columns) -> str:
    renamed: str | None = getattr(columns, field)
    return renamed or field
