"""The run's metrics on disk: one JSON line per optimizer step and one per evaluation."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Self

from qlora_trainer.core.file_names import HISTORY_FILE
from qlora_trainer.report.trackers import Tracker


class History:
    """`report/metrics.jsonl`: a line for each optimizer step and one for each evaluation."""

    def __init__(self, folder: Path, length: int, trackers: Sequence[Tracker] = ()) -> None:
        """Open the file and cut it to `length` bytes: what a lost attempt wrote after its checkpoint happens again.

        Each line goes to the `trackers` too.
        """
        self._trackers = trackers
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = (folder / HISTORY_FILE).open("ab")
        self._file.truncate(min(length, self._file.tell()))

    def append(self, entry: Mapping[str, float]) -> None:
        """Add a line. Raises ValueError for a number that JSON does not have."""
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(int(entry["step"]), entry)

    def sync(self) -> int:
        """Make the lines so far durable; returns the file's length in bytes, for the checkpoint."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """No more lines from this process. The trackers write what they hold back; a failure leaves them unfinished."""
        try:
            self._file.close()
        finally:
            for tracker in self._trackers:
                tracker.close(finished=failure is None)
