"""Waits for a condition instead of an amount of time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = 120.0
"""The shortest timeout. It delays failures only, and on a busy machine everything takes long."""


def eventually(probe: Callable[[], T], *, seconds: float = _PATIENCE, every: float = 0.5, what: str = "") -> T:
    """The first truthy answer of `probe`. Raises AssertionError after a timeout."""
    seconds = max(seconds, _PATIENCE)
    deadline = time.monotonic() + seconds
    while True:
        failure: Exception | None = None
        answer: T | None = None
        try:
            answer = probe()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is shown if it does not go away
            failure = error
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(
                f"{what or 'the condition'} did not come true in {seconds:.0f} s: {failure or answer!r}"
            )
        time.sleep(every)
