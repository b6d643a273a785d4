"""A base is verified to be prepare's before an adapter trained on it is kept."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.core.failures import StepFailure, unsafe_artifact
from qlora_trainer.training import base_check
from qlora_trainer.training.base_check import BaseCheck


def checked(monkeypatch: pytest.MonkeyPatch, check: Callable[..., object]) -> BaseCheck:
    monkeypatch.setattr(base_check, "require_files", lambda *_: [])
    monkeypatch.setattr(base_check, "require_sha256", check)
    return BaseCheck(Path("base"), "0" * 64)


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError("input/output error"), unsafe_artifact("changed")])
def test_a_check_that_fails_for_any_reason_has_not_passed(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object) -> None:
        raise error

    check = checked(monkeypatch, fails)
    with pytest.raises(type(error), match=str(error)):
        check.wait()
    with pytest.raises(type(error)):
        check.raise_failure()


def test_a_check_is_awaited_only_before_files_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    read = threading.Event()

    def slow(*_: object) -> None:
        read.wait()
        raise unsafe_artifact("changed")

    check = checked(monkeypatch, slow)
    check.raise_failure()
    read.set()
    with pytest.raises(StepFailure):
        check.wait()


def test_a_hanging_read_does_not_block_a_cancelled_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(base_check, "_SECONDS_TO_END", 0.1)
    check = checked(monkeypatch, lambda *_: bool(never.wait()))
    check.close()
    never.set()
