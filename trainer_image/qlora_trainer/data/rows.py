"""What a row of a data file is, and how its values are named in messages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RawRow:
    """One row as it was read. Cheap to make and to send to another process, which parses it."""

    place: str
    """File and line (JSON), or file and row from 1 (CSV, Parquet), for messages."""
    content: str | Mapping[str, object]
    """The text of a JSON object, or the values by column."""
    size: int
    """About how many bytes the content takes."""
    columnar: bool = False
    """Whether the file has columns of one type: an object has all keys of all rows, null where a row has none."""


@dataclass(frozen=True)
class Row:
    """One row: its values by column."""

    place: str
    values: Mapping[str, object]
    columnar: bool = False


def describe(value: object) -> str:
    """What a value of a row is, for a message."""
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


def listed(names: Mapping[str, object]) -> str:
    """The first names, for a message."""
    return ", ".join(repr(name[:80]) for name in list(names)[:12]) or "none"
