"""The failure that a step must end with."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure


@contextmanager
def failing(code: ExitCode, *words: str, match: str = "") -> Iterator[pytest.ExceptionInfo[StepFailure]]:
    """Check that the body raises StepFailure with this code, these words and pattern."""
    with pytest.raises(StepFailure) as failure:
        yield failure
    message = failure.value.message
    assert failure.value.exit_code is code, message
    assert [word for word in words if word not in message] == [], message
    assert re.search(match, message), message
