"""Limits of one rendering: a chat template is a program, which a stranger or a tenant has written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 10
"""Of the processor, not of the clock: a busy machine changes nothing."""
CHARACTERS = 2**26
"""Four times the longest row. All that a template adds to one is far less."""
# A template cannot catch the exception, but what it calls may: the timer goes off again.
_AGAIN_SECONDS = 1


class LimitExceeded(Exception):  # noqa: N818 - the limit is what was exceeded
    """The template takes more than it is allowed; the message says of what."""


@contextmanager
def limited_time() -> Iterator[None]:
    """Raise LimitExceeded in the body after SECONDS of computing. Without effect outside of the main thread.

    One operation of the interpreter itself, such as the power of a large number, is not interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _exceeded)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _exceeded(_signal: int, _frame: object) -> None:
    raise LimitExceeded(f"takes more than {SECONDS} seconds")


def within_characters(text: str) -> str:
    """The text. Raises LimitExceeded if it is too long."""
    if len(text) > CHARACTERS:
        raise LimitExceeded(f"writes {len(text)} characters, at most {CHARACTERS} are allowed")
    return text
