"""A dry run ends at its time or memory limit with a message, without torch."""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_api.spec.job import QLoRAJobSpec
from qlora_trainer.core import sandbox as limited
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.sandbox import DryRunFailed, LimitReached, iterate_within_limits, within_limits
from qlora_trainer.model.memory.dry_run import measure_within_limits
from tests.support.resolved import resolved_spec


def _filled(size: int) -> int:
    return len(bytes(size))


def _rejected() -> None:
    raise bad_configuration("spec.lora.targetModules names 'c_attn'")


def _unknown_to_pytorch() -> None:
    raise NotImplementedError("aten::odd\nhas no fake kernel")


def test_a_result_within_the_limits_is_returned() -> None:
    assert within_limits(_filled, (2**20,)) == 2**20


def test_more_time_than_allowed_ends_it_with_a_message() -> None:
    with pytest.raises(DryRunFailed, match=r"the dry run took more than 0\.2 seconds"):
        within_limits(time.sleep, (60,), seconds=0.2)


def test_more_memory_than_allowed_ends_it_with_a_message() -> None:
    assert within_limits(_filled, (2**28,), memory_bytes=2**29) == 2**28
    with pytest.raises(DryRunFailed, match=r"the dry run took more than 0\.5 GiB of host memory"):
        within_limits(_filled, (2**30,), memory_bytes=2**29)


def test_a_process_that_is_killed_is_reported() -> None:
    with pytest.raises(DryRunFailed, match="ended by signal or exit code -9"):
        within_limits(_killed, ())


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_items_arrive_before_the_limit_ends_them() -> None:
    items = iterate_within_limits(_each_filled, (2**20, 2**30), memory_bytes=2**29)
    assert next(items) == 2**20
    with pytest.raises(LimitReached, match=r"the dry run took more than 0\.5 GiB of host memory"):
        next(items)


def test_the_time_of_the_reader_of_items_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 2
    monkeypatch.setattr(limited, "_SECONDS_FOR_PARENT", seconds - limited.SECONDS)
    # More than a pipe takes.
    items = iterate_within_limits(map, (bytes, [2**20] * 3))
    sizes = [len(next(items))]
    time.sleep(seconds)
    assert sizes + [len(item) for item in items] == [2**20] * 3


def test_unread_items_are_not_waited_for() -> None:
    items = iterate_within_limits(map, (time.sleep, [0, 600]), seconds=600)
    next(items)
    items.close()
    assert multiprocessing.active_children() == []


def _each_filled(*sizes: int) -> Iterator[int]:
    yield from map(_filled, sizes)


def test_a_lower_limit_of_the_machine_holds() -> None:
    program = (
        "import resource; from qlora_trainer.core.sandbox import within_limits\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))\n"
        "print(within_limits(len, ('four',), memory_bytes=2**40))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "4\n"


def test_a_dry_run_outlives_a_killed_parent_no_longer_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "_SECONDS_FOR_PARENT", 0.5)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    # As if its caller had gone.
    orphan = context.Process(
        target=limited._run, args=(receiver, sender, time.sleep, (60,), 0.1, 2**30, "the dry run"), daemon=True
    )
    orphan.start()
    orphan.join()
    assert orphan.exitcode == -signal.SIGALRM
    receiver.close()


def test_it_sees_no_gpu_and_hides_none_from_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert within_limits(os.environ.get, ("CUDA_VISIBLE_DEVICES",)) == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_process_that_sees_a_gpu_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for PyTorch; `tests/gpu/test_cards.py` has the real one."""
    seeing = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", seeing)
    with pytest.raises(RuntimeError, match="Start this program with CUDA_VISIBLE_DEVICES set to nothing"):
        within_limits(len, ("four",))


def test_a_rejection_arrives_unchanged() -> None:
    with pytest.raises(StepFailure, match="c_attn"):
        within_limits(_rejected, ())


def test_any_exception_of_a_library_is_reported_in_one_line() -> None:
    with pytest.raises(DryRunFailed, match=r"the dry run failed: NotImplementedError: aten::odd$"):
        within_limits(_unknown_to_pytorch, ())


def test_without_the_trainer_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    sources = {"model": {"source": "hf://acme/model"}, "dataset": {"source": "hf://acme/rows"}}
    with pytest.raises(DryRunFailed, match=r"run `pip install '\.\[cli,trainer\]'` in a checkout"):
        measure_within_limits(Path("config.json"), resolved_spec(QLoRAJobSpec.model_validate(sources)), [], "")
