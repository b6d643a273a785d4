"""Acts on a train step after a number of optimizer steps, or holds it there for a test, however fast the machine is.

A process imports this before PyTorch, which the trainer's modules here do not load.
"""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

from qlora_api.contract import ENV_NODE, ProgressRecord
from qlora_trainer.core.records import RecordWriter

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def wait_at(step: int, *ranks: int, folder: str) -> None:
    """Let this process report that many steps, and wait there for a signal if it is one of these ranks or nodes.

    One that waits leaves the file `waits-RANK` in the folder.
    """
    own = int(os.environ.get("RANK", os.environ.get(ENV_NODE, "0")))
    mark = Path(folder) / f"waits-{own}"
    _at(step, partial(_wait, mark) if own in ranks else lambda report: report())


def stop_at(step: int, rank: int) -> None:
    """Let this process, if it is that rank, get SIGTERM after that many steps."""

    def stop(report: Callable[[], None]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        report()

    if int(os.environ["RANK"]) == rank:
        _at(step, stop)


def _wait(mark: Path, report: Callable[[], None]) -> None:
    caught: list[int] = []
    parent = os.getppid()
    handlers = [signal.signal(number, lambda number, _frame: caught.append(number)) for number in _SIGNALS]
    report()
    mark.touch()
    while not caught:
        time.sleep(0.01)
        if os.getppid() != parent:
            # The test has failed, and its process has ended.
            os._exit(1)
    for signal_number, handler in zip(_SIGNALS, handlers, strict=True):
        signal.signal(signal_number, handler)
    os.kill(os.getpid(), caught[0])


def _at(step: int, act: Callable[[Callable[[], None]], None]) -> None:
    """Call `act` once that many steps are done, with what reports them."""
    report = RecordWriter.progress

    def progress(writer: RecordWriter, record: ProgressRecord, *, force: bool = False) -> None:
        if record.training_step < step:
            report(writer, record, force=force)
            return
        patched.stop()
        act(lambda: report(writer, record, force=True))

    patched = patch.object(RecordWriter, "progress", progress)
    patched.start()
