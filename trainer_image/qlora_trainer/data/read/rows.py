"""A row of a data file as it was read, its values in JSON, and how messages name them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from qlora_trainer.core.failures import StepFailure, bad_dataset

ONE_OBJECT_PER_LINE = "a .jsonl file has one whole JSON object per line"


@dataclass(frozen=True)
class Row:
    """One row, unparsed: cheap to make, and to send to the process that parses it."""

    location: str
    """File and line (JSON), or file and row from 1 (CSV, Parquet), for messages."""
    content: str | Mapping[str, object] | StepFailure
    """The text of a JSON object, the values by column, or why it has none: the rows after it can be read."""
    size: int
    is_columnar: bool = False
    """Whether the file has typed columns.

    Every object then has the keys of all rows, null where a row has none.
    """

    def values(self) -> Mapping[str, object]:
        """The values by column, parsed at each call. Raises StepFailure BAD_DATASET."""
        if isinstance(self.content, StepFailure):
            raise self.content
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


def parse_json(text: str, location: str, advice: str = "write it as one JSON value") -> object:
    """Parse JSON. Raises StepFailure BAD_DATASET beginning with `location`."""

    def reject_number(found: str) -> NoReturn:
        raise bad_dataset(f"{location}: {found} is not a JSON value: only finite numbers are allowed")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields: dict[str, object] = {}
        for key, value in pairs:
            if key in fields:
                raise bad_dataset(f"{location}: field {key[:80]!r} appears twice: keep one")
            fields[key] = value
        return fields

    try:
        return json.loads(text, parse_constant=reject_number, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        cut = advice == ONE_OBJECT_PER_LINE and not text.endswith("\n")
        raise invalid_json(f"{location} column {error.pos + 1}", error.msg, advice, cut=cut) from error
    except (ValueError, RecursionError) as error:
        raise oversized_json(location, error) from error


def invalid_json(location: str, message: str, advice: str, *, cut: bool) -> StepFailure:
    """BAD_DATASET for text that is not JSON. `cut`: the file ends inside a value."""
    seems = "; the file seems to be cut off here" if cut else ""
    return bad_dataset(f"{location}: not valid JSON ({message}){seems}: {advice}")


def oversized_json(location: str, error: Exception) -> StepFailure:
    """BAD_DATASET for JSON beyond the parser's limits of digits or nesting."""
    return bad_dataset(f"{location}: not valid JSON ({error}): a number is too long or the nesting too deep")
