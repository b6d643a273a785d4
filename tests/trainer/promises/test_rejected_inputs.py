"""Wrong data, and data and models made to do harm: each is rejected by its guard, in words, and does nothing.

The cases run in the `prepare` step, which alone reads tenants' files, under a limit of memory and of time: a bomb that
goes off, or a wait for ever, is a failure of the test and not of the machine.
"""

from pathlib import Path

import pytest

from tests.support.rejected.inputs import DATA, MODELS, Rejected
from tests.support.runs.hostile import new_trial
from tests.trainer.conftest import MakeContext


@pytest.mark.parametrize("case", [*DATA, *MODELS], ids=lambda case: case.name)
def test_an_input_is_rejected_with_its_message_and_does_nothing(
    make_context: MakeContext, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, case: Rejected
) -> None:
    new_trial(tmp_path, tiny_llama, make_context, monkeypatch).require_rejection(case)
