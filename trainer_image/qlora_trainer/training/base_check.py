"""Verifies the base's checksum in the background, to not keep the GPU waiting."""

import threading
from concurrent.futures import Future
from pathlib import Path

from qlora_trainer.model.base.artifact import require_files, require_sha256

_SECONDS_TO_END = 5.0


class _ClosedError(Exception):
    """The result is no longer needed."""


class BaseCheck:
    """Reads the files of a base in a thread, and compares their recorded sum."""

    def __init__(self, folder: Path, sha256: str) -> None:
        """Begin. Raises StepFailure immediately, as `require_files` does."""
        require_files(folder)
        self._result: Future[None] = Future()
        self._closed = threading.Event()
        # A daemon: a step that fails ends without it.
        self._thread = threading.Thread(target=self._check, args=(folder, sha256), daemon=True)
        self._thread.start()

    def raise_failure(self) -> None:
        """Raise StepFailure of `require_sha256`, or a bug, if found. Waits for nothing."""
        if self._result.done():
            self._result.result()

    def wait(self) -> None:
        """Wait until everything is checked. Raises like `raise_failure`."""
        self._result.result()

    def close(self) -> None:
        """End the check, whatever its result, without waiting for a pending read."""
        self._closed.set()
        self._thread.join(_SECONDS_TO_END)

    def _check(self, folder: Path, sha256: str) -> None:
        try:
            require_sha256(folder, sha256, self._require_open)
            self._result.set_result(None)
        except Exception as error:  # noqa: BLE001 - raised in the thread that waits
            self._result.set_exception(error)

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise _ClosedError
