"""Lets a command clean up when it is told to end: by Ctrl-C, as Python does anyway, and by other signals."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What `kill` sends, and what a terminal sends that is closed; Windows has no such signal.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While the body runs, these signals raise SystemExit with 128 + their number, so that `finally` is reached."""
    before = {number: signal.signal(number, _end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
