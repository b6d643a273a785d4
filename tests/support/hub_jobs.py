"""Jobs over the fake hub and how they are rejected."""

from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.prepare import prepare
from tests.support.tiny import Recorded
from tests.trainer.conftest import MakeContext

MODEL: dict[str, Any] = {"model": {"source": "hf://acme/tiny"}}


def rejection(make_context: MakeContext, records: Recorded, code: ExitCode, spec: dict[str, Any] | None = None) -> str:
    """The message with which prepare ends with `code`; what cannot be mended leaves nothing behind."""
    context = make_context({**MODEL, **(spec or {})})
    with pytest.raises(StepFailure) as failure:
        prepare(context, records)
    assert failure.value.exit_code is code, failure.value.message
    if code.permanent:
        assert not [*context.workspace.root.rglob("*")]
    return failure.value.message
