"""Collects the wrong rows of a data set, so that its owner can correct them at once."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_api.contract import ExitCode
from qlora_api.printable import shortened
from qlora_api.status import MAX_MESSAGE_LENGTH
from qlora_trainer.core.failures import StepFailure, bad_dataset

_MOST_MESSAGES = 20
_MOST_KINDS = 20
_KIND_LENGTH = 160


class WrongRows:
    """Messages of the first wrong rows, and the number of all by kind."""

    def __init__(self) -> None:
        self._messages: list[str] = []
        self._kinds: Counter[str] = Counter()

    @contextmanager
    def collecting(self, location: str = "") -> Iterator[None]:
        """Collect a failure that the row at the location causes. Others are raised."""
        try:
            yield
        except StepFailure as failure:
            if failure.exit_code != ExitCode.BAD_DATASET:
                raise
            if len(self._messages) < _MOST_MESSAGES:
                self._messages.append(failure.message)
            # Rows differ in the numbers of their lines and turns: without them equal mistakes have equal messages.
            kind = re.sub(r"\d+", "…", failure.message.removeprefix(location).lstrip(": "))
            self._kinds[shortened(kind, _KIND_LENGTH)] += 1

    @property
    def count(self) -> int:
        """Wrong rows."""
        return self._kinds.total()

    def require_none(self, rows: int) -> None:
        """Raise StepFailure BAD_DATASET with as many messages as a step's record holds.

        `rows`: those that were checked together.
        """
        if self.count < 2:
            self._require_no_single()
            return
        first, *others = self._messages
        message = f"{first}; in all, {self.count:,} of the {rows:,} rows around it are wrong"
        for number, other in enumerate(others):
            longer = f"{message}{'; ' if number else ': '}{other}"
            if len(longer) > MAX_MESSAGE_LENGTH:
                break
            message = longer
        raise bad_dataset(message)

    def require_none_of(self, rows: int) -> None:
        """Raise StepFailure BAD_DATASET with a line for each message, and totals by kind.

        `rows`: those that were read.
        """
        self._require_no_single()
        if not self.count:
            return
        lines = [f"{self.count:,} of the {rows:,} rows that were read are wrong:", *self._messages]
        if self.count > len(self._messages):
            lines.append(f"… and {self.count - len(self._messages):,} more")
        if self.count > len(self._kinds):
            lines += ["Wrong rows by kind:", *self._totals()]
        raise bad_dataset("\n".join(lines))

    def _totals(self) -> list[str]:
        totals = [f"{count:,}: {kind}" for kind, count in self._kinds.most_common(_MOST_KINDS)]
        more = len(self._kinds) - len(totals)
        return [*totals, f"… and {more:,} more kinds"] if more else totals

    def _require_no_single(self) -> None:
        if self.count == 1:
            raise bad_dataset(self._messages[0])
