"""Several processes that train one adapter: asked to stop, killed or failed, they end together."""

import os
import re
import select
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.context import StepContext
from tests.support.commands.command import Files
from tests.support.manifests import merged
from tests.support.ranks import (
    SHARDED,
    TWO,
    beginning_with,
    other,
    runs,
    succeeded,
    until,
    workspace,
)
from tests.support.training import adapter_bytes, history

MANY_STEPS: dict[str, Any] = {"training": {"maxSteps": 60, "saveEverySteps": 5, "evalEverySteps": 50}}
LONG = merged(TWO, MANY_STEPS)
LONG_SHARDED = merged(SHARDED, MANY_STEPS)


@pytest.fixture
def long_job(tmp_path: Path, tiny_llama: Path) -> tuple[Files, StepContext]:
    """A job of many steps for two processes, which can be disturbed in their midst."""
    return workspace(tmp_path / "job", tiny_llama, LONG)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], StepContext]:
    """Ending of an undisturbed job, by its spec.training.sharding."""

    @cache
    def make(sharding: str) -> StepContext:
        spec = LONG_SHARDED if sharding == "full" else LONG
        files, context = workspace(tmp_path_factory.mktemp(sharding) / "job", tiny_llama, spec)
        succeeded(files.run("train"))
        return context

    return make


def logs(files: Files) -> list[str]:
    """Logs of the two processes of the latest attempt, the main one's first."""
    return [(files.workspace / "records" / name).read_text() for name in ("train.log", "train.rank-1.log")]


def saves(log: str, step: int) -> int:
    """The number of reports in a log that the checkpoint of this step was saved."""
    return len(re.findall(rf"saved \S+/step-{step}$", log, re.MULTILINE))


@pytest.mark.parametrize(
    ("sharding", "signalled"),
    [
        pytest.param("none", {"main"}, id="main", marks=pytest.mark.slow),
        pytest.param("none", {"child"}, id="child"),
        pytest.param("none", {"main", "child"}, id="both", marks=pytest.mark.slow),
        pytest.param("full", {"child"}, id="sharded"),
    ],
)
def test_sigterm_on_any_process_saves_once_and_ends_both_and_the_resume_is_exact(
    tmp_path: Path,
    tiny_llama: Path,
    undisturbed: Callable[[str], StepContext],
    sharding: str,
    signalled: set[str],
) -> None:
    spec = LONG_SHARDED if sharding == "full" else LONG
    files, context = workspace(tmp_path / "job", tiny_llama, spec)

    process = files.start("train")
    said = until(process, 5)
    child = other(process)
    for name in signalled:
        os.kill(process.pid if name == "main" else child, signal.SIGTERM)
    interrupted = files.finish(process, said)

    assert interrupted.exit_code == ExitCode.INTERRUPTED, interrupted.stderr
    assert not runs(child)
    step = interrupted.result.training_step
    assert step is not None
    assert 5 <= step < 60
    assert f"the checkpoint of step {step} is saved" in interrupted.result.message
    main_log, child_log = logs(files)
    assert "INFO qlora_trainer.training.distributed.launch: rank 1 of 2 ended with status 143" in main_log
    assert [saves(log, step) for log in (main_log, child_log)] == [1, 0]
    succeeded(files.run("train"))
    assert adapter_bytes(context) == adapter_bytes(undisturbed(sharding))
    assert history(context) == history(undisturbed(sharding))


CRASH_AT_THE_END = """
import os
if os.environ.get("RANK") == "1":
    from qlora_trainer.core import process
    process.ignore_termination = lambda: os._exit(99)
"""


def test_a_process_that_crashes_after_the_save_changes_no_ending_and_is_logged(
    tmp_path: Path, long_job: tuple[Files, StepContext]
) -> None:
    files, _ = long_job

    process = files.start("train", **beginning_with(tmp_path / "code", CRASH_AT_THE_END))
    said = until(process, 5)
    process.terminate()
    done = files.finish(process, said)

    assert done.exit_code == ExitCode.INTERRUPTED, done.stderr
    assert f"the checkpoint of step {done.result.training_step} is saved" in done.result.message
    assert (
        "WARNING qlora_trainer.training.distributed.launch: rank 1 of 2 ended with status 99; its log is records/"
        in logs(files)[0]
    )


def test_a_killed_process_ends_the_other_for_another_attempt(long_job: tuple[Files, StepContext]) -> None:
    files, _ = long_job
    process = files.start("train")
    said = until(process, 5)
    os.kill(other(process), signal.SIGKILL)

    done = files.finish(process, said)

    assert done.exit_code == ExitCode.UNREACHABLE, done.stderr
    assert "rank 1 of 2 was killed by SIGKILL" in done.result.message


def test_no_process_outlives_the_main_one(long_job: tuple[Files, StepContext]) -> None:
    files, _ = long_job
    process = files.start("train")
    until(process, 5)
    child = os.pidfd_open(other(process))
    process.kill()
    process.communicate()

    # It becomes readable when that process ends.
    assert select.select([child], [], [], 60)[0]
    os.close(child)


FULL_SECOND_GPU = """
from tests.support.ranks import limit_second_gpu
limit_second_gpu(0)
"""


def test_a_failure_of_one_process_ends_both_with_its_exit_code(tmp_path: Path, tiny_llama: Path) -> None:
    files, _ = workspace(tmp_path / "job", tiny_llama, TWO)

    done = files.run("train", **beginning_with(tmp_path / "card", FULL_SECOND_GPU))

    assert done.exit_code == ExitCode.GPU_OUT_OF_MEMORY, done.stderr
    assert "rank 1: the GPU is out of memory at a measured peak" in done.result.message
    assert "spec.training.maxSequenceLength" in done.result.message


SUM_WITHOUT_ANSWER = """
import os
if os.environ.get("RANK") != "1":
    import torch.distributed
    torch.distributed.all_reduce = lambda *_: os._exit(99)
"""


def test_no_process_starts_a_sum_that_a_failed_process_will_never_join(tmp_path: Path, tiny_llama: Path) -> None:
    """NCCL, other than gloo, would wait for half an hour."""
    files, _ = workspace(tmp_path / "job", tiny_llama, merged(TWO, {"dataset": {"eval": None}}))

    done = files.run("train", **beginning_with(tmp_path / "card", FULL_SECOND_GPU + SUM_WITHOUT_ANSWER))

    assert done.exit_code == ExitCode.GPU_OUT_OF_MEMORY, done.stderr
