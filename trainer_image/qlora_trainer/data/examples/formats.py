"""Turns a row into an example to train on. Each format is one entry of `_FORMATS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qlora_api.schema import replace
from qlora_api.spec.dataset import Columns, DatasetSpec, RowFormat
from qlora_api.spec.training import TrainOn
from qlora_trainer.core.failures import bad_configuration, bad_dataset
from qlora_trainer.data.examples.column_names import did_you_mean, matching_columns
from qlora_trainer.data.examples.conversations import CHAT, MARKING, SHAREGPT, check_turns
from qlora_trainer.data.examples.example import Conversation, Example, Message, PlainText, Preference, PromptCompletion
from qlora_trainer.data.examples.fields import Fields, column_name
from qlora_trainer.data.examples.preferences import pair_columns, read_preference
from qlora_trainer.data.examples.row_check import RowCheck
from qlora_trainer.data.read.rows import Row, list_names

DATASET = "spec.dataset"
# Unpaired preferences, as for KTO, have this column besides prompt and completion.
_LABEL = "label"
_PARAGRAPH = "\n\n"


def _chat(fields: Fields) -> Conversation:
    return _conversation(fields, "messages", fields.turns("messages", CHAT))


def _sharegpt(fields: Fields) -> Conversation:
    messages, system = fields.turns("conversations", SHAREGPT), fields.optional_text("system")
    if system and messages[0].role == "system":
        raise bad_dataset(
            f"{fields.row.location}: both {fields.column('system')!r} and '{fields.column('conversations')}[0]' are a "
            "system message: keep one"
        )
    first = (Message("system", system),) if system else ()
    return _conversation(fields, "conversations", (*first, *messages), len(first))


def _conversation(fields: Fields, turns: str, messages: tuple[Message, ...], before: int = 0) -> Conversation:
    check_turns(messages, fields.row.location, fields.column(turns), before)
    tools = fields.tools()
    if not tools and any(message.tool_calls for message in messages):
        raise bad_dataset(
            f"{fields.where(turns)} calls tools, but {fields.column('tools')!r} describes none: a model learns to call "
            "the tools it is shown; add the column, or leave such rows out"
        )
    return Conversation(messages, tools)


def _instruction(fields: Fields) -> PromptCompletion:
    instruction, further = fields.text("instruction"), fields.optional_text("input")
    prompt = instruction + _PARAGRAPH + further if further.strip() else instruction
    output, system = fields.text("output"), fields.optional_text("system")
    return PromptCompletion(prompt, output, _PARAGRAPH, system or None)


def _prompt_completion(fields: Fields) -> PromptCompletion:
    return PromptCompletion(fields.text("prompt"), fields.text("completion"))


def _text(fields: Fields) -> PlainText:
    return PlainText(fields.text("text"))


@dataclass(frozen=True)
class _Definition:
    """A format: the columns of `Columns` that it has, and the example from them."""

    example: type[Example | Preference]
    read: Callable[[Fields], Example | Preference]
    required: tuple[str, ...]
    """A row that has all of these is of this format."""
    optional: tuple[str, ...] = ()


_FORMATS: Mapping[RowFormat, _Definition] = {
    "chat": _Definition(Conversation, _chat, ("messages",), ("tools",)),
    "sharegpt": _Definition(Conversation, _sharegpt, ("conversations",), ("system", "tools")),
    "instruction": _Definition(PromptCompletion, _instruction, ("instruction", "output"), ("input", "system")),
    "prompt-completion": _Definition(PromptCompletion, _prompt_completion, ("prompt", "completion")),
    "text": _Definition(PlainText, _text, ("text",)),
    "preference": _Definition(Preference, read_preference, ("chosen", "rejected"), ("prompt", "tools")),
}


def _formats_of(example: type[Example | Preference]) -> frozenset[str]:
    return frozenset(name for name, definition in _FORMATS.items() if definition.example is example)


CONVERSATIONS = _formats_of(Conversation)
"""Formats whose rows may mark the answers to train on."""
PAIRS = _formats_of(Preference)
"""Formats whose rows are pairs of answers, for objectives that compare them."""
PLAIN = _formats_of(PlainText)
"""Formats whose rows have no turns, and so no prompt."""


@dataclass(frozen=True)
class Reading:
    """How rows are read: the format, and the columns that it uses and ignores."""

    format: RowFormat
    columns: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def remark(self) -> str:
        """A remark for the user on an unused column, or an empty string."""
        if _LABEL not in self.ignored or self.format in PLAIN | PAIRS:
            return ""
        return (
            f"the column {_LABEL!r} is not used: if it marks answers as good or bad, the bad ones are trained on like "
            "the others; leave them out, or make pairs of good and bad answers for spec.training.objective dpo or orpo"
        )


class RowReader:
    """Reads the rows of one data set, whose format and column names are known."""

    def __init__(
        self, format_: RowFormat, columns: Columns | None, field: str = DATASET, train_on: TrainOn = "completion"
    ) -> None:
        """`field`: the job's field that has format and columns, for messages.

        Raises StepFailure BAD_CONFIGURATION if marks count, and rows of the format can mark nothing.
        """
        if train_on in MARKING and format_ not in CONVERSATIONS:
            raise bad_configuration(
                f"spec.training.trainOn is {train_on}, and rows of format {format_} mark nothing: choose another "
                f"trainOn, or use rows of format {' or '.join(name for name in _FORMATS if name in CONVERSATIONS)}"
            )
        self._format, self._columns, self._field, self._train_on = format_, columns or Columns(), field, train_on

    def read(self, row: Row) -> Example | Preference:
        """The row's example. Raises StepFailure BAD_DATASET naming location and field."""
        values = row.values()
        columns = pair_columns(values, self._columns)
        fields = Fields(row, values, self._format, columns, self._field, self._train_on)
        return _FORMATS[self._format].read(fields)

    def check(self, row: Row) -> RowCheck | None:
        """The row's check, if it has a column. Raises StepFailure BAD_DATASET if missing."""
        column = self._columns.check
        return None if column is None else RowCheck.from_row(row, column, f"{self._field}.columns.check")

    def reading(self, row: Row) -> Reading:
        """Which of the row's columns are used."""
        definition, values = _FORMATS[self._format], row.values()
        named = (*definition.required, *definition.optional, *(["check"] if self._columns.check else []))
        names = pair_columns(values, self._columns)
        columns = tuple(column_name(field, names) for field in named)
        return Reading(
            self._format,
            tuple(column for column in columns if column in values),
            tuple(column for column in values if column not in columns),
        )


def source_format(first: Row, spec: DatasetSpec, field: str, *, pairs: bool) -> tuple[RowFormat, Columns]:
    """Format and columns of the training source of the job's `field`."""
    source = spec.training_sources[field]
    if source.format == "auto":
        format_, columns = detect_format(first, source.columns, field, pairs=pairs)
    else:
        format_, columns = source.format, source.columns or Columns()
    return format_, replace(columns, check=spec.check_column(field))


def detect_format(
    row: Row, columns: Columns | None, field: str = DATASET, *, pairs: bool = False
) -> tuple[RowFormat, Columns]:
    """The format whose columns the row has, and the columns' names. `field`: the job's field that sets them.

    Data sets call their turns `messages` and `conversations` in either notation, so the turns themselves decide between
    chat and sharegpt. `pairs`: whether the objective compares two answers, which only one format has. Raises
    StepFailure BAD_DATASET if it is not exactly one format, or one that the objective cannot use.
    """
    values = row.values()
    names = pair_columns(values, columns or Columns())
    needed = {
        format_: [column_name(field, names) for field in definition.required]
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
    advice = "" if fitting else _advice(needed, names, values)
    raise bad_dataset(
        f"{row.location} {found}; it has the columns {list_names(values)}. Formats and the columns that they need are "
        f"{needs}: set {field}.format, and {field}.columns where names differ{advice}"
    )


def _advice(needed: Mapping[RowFormat, list[str]], names: Columns, values: Mapping[str, object]) -> str:
    """The columns that are meant, and the setting to write, for a message; empty if unknown."""
    named = (column for _, column in names if column not in (None, *values))
    meant = "".join(did_you_mean(column, values) for column in named)
    for format_, required in needed.items():
        by_field = dict(zip(_FORMATS[format_].required, required, strict=True))
        if (columns := matching_columns(by_field, values)) is not None:
            remedy = f"write `columns: {columns}`" if columns else "leave columns out"
            return f"{meant} For format {format_}, {remedy}" if meant else f"; for format {format_}, {remedy}"
    return meant


def has_pairs(row: Row) -> bool:
    """Whether the row has the columns of a pair of answers."""
    values = row.values()
    names = pair_columns(values, Columns())
    return all(column_name(field, names) in values for field in _FORMATS["preference"].required)


def _require_no_pairs(row: Row, names: Columns, field: str, *, pairs: bool) -> None:
    """Reject pairs that the objective cannot use, or data without pairs it needs."""
    values = row.values()
    chosen, rejected = (column_name(field, names) for field in _FORMATS["preference"].required)
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
    column = column_name(_FORMATS[format_].required[0], names)
    turns = values[column]
    keys = turns[0].keys() if isinstance(turns, list) and turns and isinstance(turns[0], dict) else ()
    if format_ == "sharegpt" and {CHAT.role, CHAT.content} <= set(keys):
        return "chat", replace(names, messages=column)
    if format_ == "chat" and {SHAREGPT.role, SHAREGPT.content} <= set(keys):
        return "sharegpt", replace(names, conversations=column)
    return format_, names
