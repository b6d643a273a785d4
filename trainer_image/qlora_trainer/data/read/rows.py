"""A row of a data file as it was read, and how its values are named in messages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.read.json_values import ONE_OBJECT_PER_LINE, parse_json


@dataclass(frozen=True)
class Row:
    """One row, unparsed: cheap to make, and to send to the process that parses it."""

    location: str
    """File and line (JSON), or file and row from 1 (CSV, Parquet), for messages."""
    content: str | Mapping[str, object]
    """The text of a JSON object, or the values by column."""
    size: int
    """About how many bytes the content takes."""
    columnar: bool = False
    """Whether the file has typed columns.

    Every object then has the keys of all rows, null where a row has none.
    """

    def values(self) -> Mapping[str, object]:
        """The values by column, parsed at each call.

        Raises StepFailure BAD_DATASET if they are not a JSON object.
        """
        if not isinstance(self.content, str):
            return self.content
        value = parse_json(self.content, self.location, ONE_OBJECT_PER_LINE)
        if not isinstance(value, dict):
            raise bad_dataset(f"{self.location} is {describe(value)}: must be a JSON object, {{…}}")
        return value


def describe(value: object) -> str:
    """Describe a value of a row for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number (NaN)" if math.isnan(value) else "an infinite number"
    if isinstance(value, (int, float)):
        return "a number"
    kinds: list[tuple[type, str]] = [(str, "text"), (list, "a list"), (dict, "an object")]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def list_names(names: Mapping[str, object]) -> str:
    """The first names, for a message."""
    return ", ".join(repr(name[:80]) for name in list(names)[:12]) or "none"
