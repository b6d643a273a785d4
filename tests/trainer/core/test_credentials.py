"""The Secrets of a job as a step sees them."""

from pathlib import Path

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure


def test_a_binary_credential_is_reported_by_field_and_key_without_its_value(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"canary\xff")
    with pytest.raises(StepFailure) as failure:
        Secret(tmp_path, "spec.output.secretRef", "store").value("token")
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert "key token of Secret 'store' (spec.output.secretRef)" in failure.value.message
    assert "canary" not in failure.value.message


def test_a_value_loses_the_line_end_that_an_editor_added(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc\n")
    assert Secret(tmp_path, "spec.output.secretRef", "store").value("token") == "abc"
    assert Secret(tmp_path, "spec.output.secretRef", None).value("token") is None
