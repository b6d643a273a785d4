"""A local run for programs: its output for a killed step, which leaves no record."""

import pytest

from qlora_cli.local.display import RecordDisplay


def test_a_step_without_a_result_is_described_by_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    RecordDisplay().end("train", None, 137)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "train has ended with exit code 137 and without a result\n"
