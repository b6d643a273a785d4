"""Checks the base's bytes while training has begun on them: a GPU does not wait for a sum."""

import threading
from pathlib import Path

from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.base_artifact import require_sha256


class _ClosedError(Exception):
    """Nobody waits for the result any more."""


class BaseCheck:
    """Reads the files of a base in a thread of its own, and compares their sum with what prepare recorded."""

    def __init__(self, folder: Path, sha256: str) -> None:
        self._failure: StepFailure | OSError | None = None
        self._closed = threading.Event()
        # A daemon: a step that fails ends without it.
        self._thread = threading.Thread(target=self._check, args=(folder, sha256), daemon=True)
        self._thread.start()

    def raise_failure(self) -> None:
        """Raise what the check has found so far: StepFailure UNSAFE_ARTIFACT, or OSError. Waits for nothing."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Wait until everything is checked. Raises like `raise_failure`."""
        self._thread.join()
        self.raise_failure()

    def close(self) -> None:
        """End the check, whatever it has found."""
        self._closed.set()
        self._thread.join()

    def _check(self, folder: Path, sha256: str) -> None:
        try:
            require_sha256(folder, sha256, self._require_open)
        except (StepFailure, OSError) as error:
            self._failure = error
        except _ClosedError:
            pass

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise _ClosedError
