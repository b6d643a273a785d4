"""A row's values by the columns of its format. Errors name the row and the column."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_api.spec.dataset import Columns, RowFormat
from qlora_api.spec.training import TrainOn
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.examples.column_names import did_you_mean
from qlora_trainer.data.examples.conversations import Notation, checked_text, read_tools, read_turns
from qlora_trainer.data.examples.example import Function, Message
from qlora_trainer.data.read.rows import Row, list_names


def column_name(field: str, columns: Columns) -> str:
    """The data set's name of a column of `Columns`."""
    renamed: str | None = getattr(columns, field)
    return renamed or field


@dataclass(frozen=True)
class Fields:
    """A row's values by the format's columns. Raises StepFailure BAD_DATASET."""

    row: Row
    values: Mapping[str, object]
    format: RowFormat
    columns: Columns
    setting: str
    """The job's field that has format and columns."""
    train_on: TrainOn

    def column(self, field: str) -> str:
        """The data set's name for the field."""
        return column_name(field, self.columns)

    def value(self, field: str) -> object:
        """The value of a required field."""
        column = self.column(field)
        if column not in self.values:
            raise bad_dataset(
                f"{self.row.location} has no column {column!r}, which format {self.format} needs; it has "
                f"{list_names(self.values)}: name it in {self.setting}.columns.{field} or choose another "
                f"{self.setting}.format{did_you_mean(column, self.values)}"
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

    def turns(self, field: str, notation: Notation) -> tuple[Message, ...]:
        """The messages of a required field that is a list of turns."""
        value, column, row = self.value(field), self.column(field), self.row
        return read_turns(value, notation, row.location, column, is_columnar=row.is_columnar, train_on=self.train_on)

    def tools(self) -> tuple[Function, ...]:
        """The tools of the row, which are optional in each format that has them."""
        return read_tools(self.optional_value("tools"), self.where("tools"), is_columnar=self.row.is_columnar)

    def where(self, field: str) -> str:
        """Location and column, for a message."""
        return f"{self.row.location}: {self.column(field)!r}"
