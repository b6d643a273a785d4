"""Saves checkpoints in a thread, while the run trains on."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from qlora_trainer.training.checkpoints.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves one checkpoint at a time, which counts once the run's thread has collected it.

    As a context manager it waits for the save that is under way, and so does the process, unless a lost rank ends it.
    """

    def __init__(self) -> None:
        # Starts its thread with the first save.
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[Future[Checkpoint], Callable[[Checkpoint], None]] | None = None

    def start(self, save: Callable[[], Checkpoint], then: Callable[[Checkpoint], None]) -> None:
        """Begin to save, after the save before it. Raises what that one has raised.

        `then` runs in the thread that collects the checkpoint, once it has been read back.
        """
        self.wait()
        self._saving = self._executor.submit(save), then

    def collect(self) -> None:
        """Collect the checkpoint if it is complete. Raises what its save has raised. Waits for nothing."""
        if self._saving is not None and self._saving[0].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way, and collect its checkpoint. Raises what the save has raised."""
        if self._saving is None:
            return
        (future, then), self._saving = self._saving, None
        then(future.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Wait for the save. An exception of the body takes precedence over its own."""
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
            logger.exception("saving the checkpoint that was under way at the failure has failed too")
        finally:
            self._executor.shutdown()
