"""Finds the columns that a user seems to mean, for messages about columns that are missing."""

import difflib
import json
import re
from collections.abc import Collection, Mapping

# Names of the fields in many data sets.
_QUESTIONS = ("question", "query", "instruction", "prompt")
_ANSWERS = ("answer", "response", "output", "completion", "reply")
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "instruction": _QUESTIONS,
    "output": _ANSWERS,
    "prompt": _QUESTIONS,
    "completion": _ANSWERS,
    "text": ("content", "document"),
    "chosen": ("preferred", "better", "accepted"),
    "rejected": ("dispreferred", "worse"),
}
_ALIKE = 0.8
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .-]*")


def near_name(name: str, present: Collection[str]) -> str | None:
    """The column whose name is the same but for case or a few letters, if any."""
    by_letters = {column.casefold(): column for column in present}
    close = difflib.get_close_matches(name.casefold(), by_letters, n=1, cutoff=_ALIKE)
    return by_letters[close[0]] if close else None


def did_you_mean(name: str, present: Collection[str]) -> str:
    """A question to follow the names of the columns, or an empty string."""
    near = near_name(name, present)
    return "" if near is None else f"; did you mean {near[:80]!r}?"


def matching_columns(needed: Mapping[str, str], present: Collection[str]) -> str | None:
    """The object that maps the fields to these columns, as YAML, or None if a field has none.

    `needed`: the names that the fields have so far. Empty if no field needs another name.
    """
    found: dict[str, str] = {}
    for field, name in needed.items():
        free = [column for column in present if column not in found.values()]
        names = (name, field, *_OTHER_NAMES.get(field, ()))
        column = next((near for each in names if (near := near_name(each, free))), None)
        if column is None:
            return None
        found[field] = column
    renamed = [
        f"{field}: {column if _PLAIN.fullmatch(column) else json.dumps(column)}"
        for field, column in found.items()
        if column != field
    ]
    return f"{{{', '.join(renamed)}}}" if renamed else ""
