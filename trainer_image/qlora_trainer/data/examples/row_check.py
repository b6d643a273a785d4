"""The check of a row's answer for spec.gate.score: a regular expression or schema."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from qlora_api.spec.gate import MAX_PATTERN_CHARACTERS, MAX_SCHEMA_CHARACTERS
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.examples.conversations import checked_text, require_plain
from qlora_trainer.data.read.rows import Row, describe, list_names

Schema = Mapping[str, object] | bool


@dataclass(frozen=True)
class RowCheck:
    """A condition on a row's answer. Compiling it validates it."""

    source: str
    """File, line and column, for messages."""
    value: str | Schema
    """A regular expression or a schema as text, or a schema."""

    @classmethod
    def from_row(cls, row: Row, column: str, field: str) -> Self:
        """The check in the job's column `field`. Raises StepFailure BAD_DATASET without."""
        values, source = row.values(), f"{row.location}: {column!r}"
        value = values.get(column)
        if value is None:
            found = "is null" if column in values else f"is missing; the row has {list_names(values)}"
            raise bad_dataset(
                f"{source} ({field}) {found}: each row that may be held out must have the check of its answer; fill it "
                "in, or hold out rows of a separate source (spec.dataset.eval.source)"
            )
        if isinstance(value, str):
            checked_text(value, source)
        elif not isinstance(value, dict | bool):
            raise bad_dataset(
                f"{source} is {describe(value)}: must be a regular expression as text, or a JSON schema as text or "
                "object"
            )
        require_plain(value, source, columnar=row.columnar)
        check = cls(source, value)
        if len(check.text) > MAX_SCHEMA_CHARACTERS:
            raise bad_dataset(
                f"{source} has {len(check.text)} characters: at most {MAX_SCHEMA_CHARACTERS} are allowed, "
                f"{MAX_PATTERN_CHARACTERS} in a regular expression"
            )
        return check

    @property
    def text(self) -> str:
        """The regular expression, or the schema as JSON."""
        return self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)

    def dump(self) -> str:
        """The check as JSON."""
        return json.dumps([self.source, self.value])

    @classmethod
    def load(cls, text: str) -> Self:
        """The check that `dump` has written."""
        return cls(*json.loads(text))
