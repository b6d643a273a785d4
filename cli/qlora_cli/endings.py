"""Ends a command after its clean-up: with an error, or after Ctrl-C and other signals."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

# Sent by `kill`, and by a closed terminal; Windows has no such signal.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def fail(message: str, exit_code: int = 1) -> NoReturn:
    """Print the message to standard error and exit."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(exit_code)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn these signals into SystemExit with 128 + their number during the body, so that `finally` is reached."""
    before = {number: signal.signal(number, _end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
