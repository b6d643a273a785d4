"""Decides which requests to retry: the one policy of all clients in `stores`."""

import logging
from collections.abc import Callable, Sequence
from time import sleep
from typing import TypeVar

from qlora_api.contract import ExitCode
from qlora_api.printable import one_line
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.records import redact

RETRYABLE_STATUS = frozenset({408, 425, 429})
"""HTTP statuses below 500 that are temporary: timeout, too early, too many."""
CONFLICT_STATUS = frozenset({409, 412})
"""Another client has written in between, in a hub or bucket (not a registry)."""
_Answer = TypeVar("_Answer")
logger = logging.getLogger(__name__)


def is_retryable(status: int, *, conflicts: bool = False) -> bool:
    """Whether the request may succeed later. `conflicts`: also after other writers."""
    return status >= 500 or status in RETRYABLE_STATUS or (conflicts and status in CONFLICT_STATUS)


def retry(ask: Callable[[], _Answer], *, waits: Sequence[float], retryable: Callable[[Exception], bool]) -> _Answer:
    """The answer of `ask`, called again after each of `waits`, in seconds, while it raises what is `retryable`.

    `ask` must be safe to repeat. Raises what its last call raises: a longer outage is for the step's next attempt.
    """
    for wait in waits:
        try:
            return ask()
        except Exception as error:
            if not retryable(error):
                raise
            logger.warning("retrying in %g s: %s", wait, redact(one_line(str(error))))
        sleep(wait)
    return ask()


def read_back(digest: Callable[[], str]) -> str:
    """The digest of a published file, read up to three times, because a lost connection must not cost the step.

    Raises the StepFailure of `digest`: immediately if it is permanent, else that of the third time.
    """

    def can_retry(error: Exception) -> bool:
        return isinstance(error, StepFailure) and error.exit_code is ExitCode.UNREACHABLE

    return retry(digest, waits=(0.0, 0.0), retryable=can_retry)
