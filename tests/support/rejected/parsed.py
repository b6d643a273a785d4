"""Checks inputs that a parser rejects, by the parser's target in `tests/fuzz`."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.core.failures import StepFailure
from tests.fuzz.target import Target
from tests.support.rejected.inputs import read_table
from tests.support.rejected.made import as_bytes, made

_TABLE = read_table("parsed.yaml")
ADDRESSES: tuple[str, ...] = tuple(made(_TABLE["addresses"]))
"""Addresses that mean another place, which no field of a job may have."""


@dataclass(frozen=True)
class Parsed:
    """An input, the parser that rejects it, and how."""

    target: str
    given: Any
    words: str
    code: str | None = None
    """The name of the exit code, if the parser ends a step."""

    def __str__(self) -> str:
        return f"{self.target}: {self.words}"

    def require_rejection(self, targets: Mapping[str, Target]) -> None:
        """Check that the input is rejected with these words, and as the target documents it."""
        target = targets[self.target]
        changed = json.dumps(json.loads(target.seeds[0]) | self.given) if isinstance(self.given, dict) else self.given
        content = as_bytes(made(changed))
        with tempfile.TemporaryDirectory() as folder:
            target.check(content, Path(folder))
            rejection = target.rejection(content, Path(folder))
        assert self.words in str(rejection), rejection
        assert (rejection.exit_code.name if isinstance(rejection, StepFailure) else None) == self.code


def parsed(suite: str) -> list[Parsed]:
    """The cases of a suite of targets: documents, files or answers."""
    return [Parsed(target, *case) for target, cases in _TABLE[suite].items() for case in cases]
