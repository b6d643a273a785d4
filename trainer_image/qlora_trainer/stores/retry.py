"""Reads back what was published, a file at a time: a connection that breaks off costs that file and not the step."""

import logging
from collections.abc import Callable

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure

_TRIES = 3
logger = logging.getLogger(__name__)


def read_back(digest: Callable[[], str]) -> str:
    """What `digest` finds, asked again while its server is in trouble. Raises its StepFailure after the third time."""
    for _ in range(_TRIES - 1):
        try:
            return digest()
        except StepFailure as failure:
            if failure.exit_code is not ExitCode.UNREACHABLE:
                raise
            logger.warning("reading back broke off, the file is read again: %s", failure.message)
    return digest()
