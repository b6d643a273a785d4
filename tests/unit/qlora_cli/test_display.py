"""A local run as a person or a program reads it: one line, records, and its end."""

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_api.contract import ProgressRecord
from qlora_cli.local.display import ConsoleDisplay, RecordDisplay, describe
from qlora_cli.output import ended_by_signals

COMMON = {"jobUid": "job", "podUid": "pod", "step": "train", "time": "2026-01-02T03:04:05Z"}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "train"),
        ({"activity": "loading the base model in 4 bit"}, "loading the base model in 4 bit"),
        ({"activity": "training", "totalSteps": 1000}, "training 0/1000"),
        (
            {
                "activity": "training",
                "trainingStep": 420,
                "totalSteps": 1000,
                "loss": 1.23449,
                "tokensPerSecond": 849.6,
                "remainingSeconds": 4320.4,
            },
            "training 420/1000, loss 1.234, 850 tokens/s, 1h12m left",
        ),
        (
            {"activity": "training", "trainingStep": 2, "totalSteps": 4, "loss": 2, "evalLoss": 2.5},
            "training 2/4, loss 2.000, held-out 2.500",
        ),
        # Finished work leaves no trace.
        (
            {"activity": "training", "trainingStep": 4, "totalSteps": 4, "remainingSeconds": 0, "tokensPerSecond": 0},
            "training 4/4, 0 tokens/s",
        ),
        # Nor of a run that has stopped early.
        (
            {"activity": "stopped early", "trainingStep": 120, "totalSteps": 400, "remainingSeconds": 0},
            "stopped early 120/400",
        ),
    ],
)
def test_a_record_becomes_a_line_of_its_fields(fields: dict[str, Any], line: str) -> None:
    assert describe(ProgressRecord.model_validate(COMMON | fields)) == line


def test_a_line_is_not_repeated_where_no_terminal_is(tmp_path: Path) -> None:
    out = io.StringIO()
    display = ConsoleDisplay(Console(file=out, width=100), tmp_path)
    for step in (1, 1, 2, 1):
        display.progress(ProgressRecord.model_validate(COMMON | {"trainingStep": step, "totalSteps": 9}))
    assert out.getvalue().splitlines() == ["train: train 1/9", "train: train 2/9", "train: train 1/9"]


def test_a_step_without_a_result_is_described_by_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    RecordDisplay().end("train", None, 137)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "train has ended with exit code 137 and without a result\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_body_with_its_exit_code_and_its_handler_is_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, ended_by_signals():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before
