"""Parses JSON strictly: finite numbers, no repeated key, errors with location."""

import json
from typing import NoReturn

from qlora_trainer.core.failures import StepFailure, bad_dataset

ONE_OBJECT_PER_LINE = "a .jsonl file has one whole JSON object per line"


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
