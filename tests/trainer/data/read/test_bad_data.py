"""Bad data sets: each file of the corpus is rejected with its message."""

from pathlib import Path

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.prepare import prepare
from tests.support.data_files import CORPUS, BadData
from tests.support.models.tiny import Recorded
from tests.trainer.conftest import MakeContext


@pytest.mark.parametrize("case", CORPUS, ids=[case.name for case in CORPUS])
def test_it_is_rejected_with_its_message(
    make_context: MakeContext, records: Recorded, tmp_path: Path, case: BadData
) -> None:
    """The message is short enough to be read, and no data is left in the workspace."""
    context = make_context({"dataset": case.write(tmp_path / "data")})
    with pytest.raises(StepFailure) as failure:
        prepare(context, records)
    found = failure.value.message
    assert failure.value.exit_code is ExitCode.BAD_DATASET, found
    assert found.startswith(case.message) if case.message.startswith("pvc://") else case.message in found, found
    assert len(found) < 700
    assert not [*context.workspace.root.rglob("*")]
