"""Turns a row into an example to train on. Each format is one entry of `_FORMATS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qlora_api.schema import replace
from qlora_api.spec.dataset import Columns, RowFormat
from qlora_trainer.core.failures import bad_configuration, bad_dataset
from qlora_trainer.data.examples.conversations import CHAT, SHAREGPT, check_turns, checked_text, read_tools, read_turns
from qlora_trainer.data.examples.example import Conversation, Example, Message, PlainText, Preference, PromptCompletion
from qlora_trainer.data.examples.preferences import PreferenceColumns
from qlora_trainer.data.examples.row_check import RowCheck
from qlora_trainer.data.read.rows import Row, list_names

DATASET = "spec.dataset"
PAIRS: frozenset[RowFormat] = frozenset({"preference"})
"""Formats whose rows are pairs of answers, for objectives that compare them."""
# Unpaired preferences, as for KTO, have this column besides prompt and completion.
_LABEL = "label"
_PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Reading:
    """How rows are read: the format, and the columns that it uses and ignores."""

    format: RowFormat
    columns: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def remark(self) -> str:
        """A remark for the user on an unused column, or an empty string."""
        if _LABEL not in self.ignored or self.format == "text" or self.format in PAIRS:
            return ""
        return (
            f"the column {_LABEL!r} is not used: if it marks answers as good or bad, the bad ones are trained on like "
            "the others; leave them out, or make pairs of good and bad answers for spec.training.objective dpo or orpo"
        )


class RowReader:
    """Reads the rows of one data set, whose format and column names are known."""

    def __init__(
        self, format_: RowFormat, columns: Columns | None, field: str = DATASET, *, marked: bool = False
    ) -> None:
        """`field`: the job's field that has format and columns, for messages. `marked`: rows mark what to train on.

        Raises StepFailure BAD_CONFIGURATION if rows of the format can mark nothing.
        """
        if marked and format_ not in ("chat", "sharegpt"):
            raise bad_configuration(
                f"spec.training.trainOn is marked, and rows of format {format_} mark nothing: choose another trainOn, "
                "or use rows of format chat or sharegpt"
            )
        self._format, self._columns, self._field, self._marked = format_, columns or Columns(), field, marked

    def read(self, row: Row) -> Example | Preference:
        """The row's example. Raises StepFailure BAD_DATASET naming location and field."""
        fields = _Fields(row, row.values(), self._format, self._columns, self._field, self._marked)
        return _FORMATS[self._format].read(fields)

    def check(self, row: Row) -> RowCheck | None:
        """The row's check, if it has a column. Raises StepFailure BAD_DATASET if missing."""
        column = self._columns.check
        return None if column is None else RowCheck.from_row(row, column, f"{self._field}.columns.check")

    def reading(self, row: Row) -> Reading:
        """Which of the row's columns are used."""
        definition, values = _FORMATS[self._format], row.values()
        named = (*definition.required, *definition.optional, *(["check"] if self._columns.check else []))
        columns = tuple(_column(field, self._columns) for field in named)
        return Reading(
            self._format,
            tuple(column for column in columns if column in values),
            tuple(column for column in values if column not in columns),
        )


def detect_format(
    row: Row, columns: Columns | None, field: str = DATASET, *, pairs: bool = False
) -> tuple[RowFormat, Columns]:
    """The format whose columns the row has, and the columns' names. `field`: the job's field that sets them.

    Data sets call their turns `messages` and `conversations` in either notation, so the turns themselves decide between
    chat and sharegpt. `pairs`: whether the objective compares two answers, which only one format has. Raises
    StepFailure BAD_DATASET if it is not exactly one format, or one that the objective cannot use.
    """
    names, values = columns or Columns(), row.values()
    needed = {
        format_: [_column(field, names) for field in definition.required]
        for format_, definition in _FORMATS.items()
        if pairs == (format_ in PAIRS)
    }
    fitting = [format_ for format_, required in needed.items() if all(column in values for column in required)]
    if not fitting:
        _require_no_pairs(row, names, field, pairs=pairs)
    if len(fitting) == 1:
        return _by_notation(values, fitting[0], names)
    needs = "; ".join(f"{format_}: {', '.join(required)}" for format_, required in needed.items())
    found = "fits more than one format, " + " and ".join(fitting) if fitting else "fits no format"
    raise bad_dataset(
        f"{row.location} {found}; it has the columns {list_names(values)}. Formats and the columns that they need are "
        f"{needs}: set {field}.format, and {field}.columns where names differ"
    )


def _require_no_pairs(row: Row, names: Columns, field: str, *, pairs: bool) -> None:
    """Reject pairs that the objective cannot use, or data without pairs it needs."""
    values = row.values()
    chosen, rejected = (_column(field, names) for field in _FORMATS["preference"].required)
    if not pairs and chosen in values and rejected in values:
        raise bad_dataset(
            f"{row.location} is of format preference ({chosen!r} and {rejected!r}), whose answers only an objective "
            "that compares them can use: set spec.training.objective to dpo or orpo"
        )
    if pairs:
        raise bad_dataset(
            f"{row.location} has no {chosen!r} and {rejected!r}, which spec.training.objective compares; it has the "
            f"columns {list_names(values)}: name them in {field}.columns.chosen and rejected, or set objective to "
            "supervised"
        )


def _by_notation(values: Mapping[str, object], format_: RowFormat, names: Columns) -> tuple[RowFormat, Columns]:
    column = _column(_FORMATS[format_].required[0], names)
    turns = values[column]
    keys = turns[0].keys() if isinstance(turns, list) and turns and isinstance(turns[0], dict) else ()
    if format_ == "sharegpt" and {CHAT.role, CHAT.content} <= set(keys):
        return "chat", replace(names, messages=column)
    if format_ == "chat" and {SHAREGPT.role, SHAREGPT.content} <= set(keys):
        return "sharegpt", replace(names, conversations=column)
    return format_, names


def _column(field: str, columns: Columns) -> str:
    renamed: str | None = getattr(columns, field)
    return renamed or field


@dataclass(frozen=True)
class _Fields:
    """A row's values by the format's columns. Raises StepFailure BAD_DATASET."""

    row: Row
    values: Mapping[str, object]
    format: RowFormat
    columns: Columns
    field: str
    """The job's field that has format and columns."""
    marked: bool

    def column(self, field: str) -> str:
        """The data set's name for the field."""
        return _column(field, self.columns)

    def value(self, field: str) -> object:
        """The value of a required field."""
        column = self.column(field)
        if column not in self.values:
            raise bad_dataset(
                f"{self.row.location} has no column {column!r}, which format {self.format} needs; it has "
                f"{list_names(self.values)}: name it in {self.field}.columns.{field} or choose another "
                f"{self.field}.format"
            )
        return self.values[column]

    def optional_value(self, field: str) -> object:
        """The value, or None. Columns named by spec.dataset.columns are required."""
        named = getattr(self.columns, field) is not None
        return self.value(field) if named else self.values.get(field)

    def text(self, field: str) -> str:
        """The text of a required field."""
        return checked_text(self.value(field), self.where(field))

    def optional_text(self, field: str) -> str:
        """The text, or an empty one without it."""
        value = self.optional_value(field)
        return "" if value is None or value == "" else checked_text(value, self.where(field))

    def where(self, field: str) -> str:
        """Location and column, for a message."""
        return f"{self.row.location}: {self.column(field)!r}"


def _chat(fields: _Fields) -> Conversation:
    value, row = fields.value("messages"), fields.row
    messages = read_turns(
        value, CHAT, row.location, fields.column("messages"), columnar=row.columnar, marked=fields.marked
    )
    return _conversation(fields, "messages", messages)


def _sharegpt(fields: _Fields) -> Conversation:
    value, row, column = fields.value("conversations"), fields.row, fields.column("conversations")
    messages = read_turns(value, SHAREGPT, row.location, column, columnar=row.columnar, marked=fields.marked)
    system = fields.optional_text("system")
    if system and messages[0].role == "system":
        raise bad_dataset(
            f"{row.location}: both {fields.column('system')!r} and '{column}[0]' are a system message: keep one"
        )
    return _conversation(fields, "conversations", (Message("system", system), *messages) if system else messages)


def _conversation(fields: _Fields, turns: str, messages: tuple[Message, ...]) -> Conversation:
    row = fields.row
    check_turns(messages, row.location, fields.column(turns))
    tools = read_tools(fields.optional_value("tools"), fields.where("tools"), columnar=row.columnar)
    if not tools and any(message.tool_calls for message in messages):
        raise bad_dataset(
            f"{fields.where(turns)} calls tools, but {fields.column('tools')!r} describes none: a model learns to call "
            "the tools it is shown; add the column, or leave such rows out"
        )
    return Conversation(messages, tools)


def _instruction(fields: _Fields) -> PromptCompletion:
    instruction, further = fields.text("instruction"), fields.optional_text("input")
    prompt = instruction + _PARAGRAPH + further if further.strip() else instruction
    output, system = fields.text("output"), fields.optional_text("system")
    return PromptCompletion(prompt, output, _PARAGRAPH, system or None)


def _prompt_completion(fields: _Fields) -> PromptCompletion:
    return PromptCompletion(fields.text("prompt"), fields.text("completion"))


def _text(fields: _Fields) -> PlainText:
    return PlainText(fields.text("text"))


def _preference(fields: _Fields) -> Preference:
    tools = read_tools(fields.optional_value("tools"), fields.where("tools"), columnar=fields.row.columnar)
    return PreferenceColumns(
        location=fields.row.location,
        prompt=fields.optional_value("prompt"),
        chosen=fields.value("chosen"),
        rejected=fields.value("rejected"),
        prompt_name=fields.column("prompt"),
        chosen_name=fields.column("chosen"),
        rejected_name=fields.column("rejected"),
        columnar=fields.row.columnar,
        field=fields.field,
    ).read(tools)


@dataclass(frozen=True)
class _Definition:
    """A format: the fields of `Columns` that it reads, and how they become an example."""

    required: tuple[str, ...]
    """A row that has all of these is of this format."""
    optional: tuple[str, ...]
    read: Callable[[_Fields], Example | Preference]


_FORMATS: Mapping[RowFormat, _Definition] = {
    "chat": _Definition(("messages",), ("tools",), _chat),
    "sharegpt": _Definition(("conversations",), ("system", "tools"), _sharegpt),
    "instruction": _Definition(("instruction", "output"), ("input", "system"), _instruction),
    "prompt-completion": _Definition(("prompt", "completion"), (), _prompt_completion),
    "text": _Definition(("text",), (), _text),
    "preference": _Definition(("chosen", "rejected"), ("prompt", "tools"), _preference),
}
