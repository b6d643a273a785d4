"""Several processes that train one adapter: asked to stop, killed or failed, they end together."""

import os
import re
import select
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from qlora_api.contract import ExitCode
from qlora_trainer.core.context import StepContext
from qlora_trainer.training.distributed import gradient_sums
from tests.support.commands.command import Files
from tests.support.manifests import merged
from tests.support.ranks import (
    SHARDED,
    TWO,
    beginning_with,
    limit_second_gpu,
    other,
    runs,
    until,
    until_waiting,
    waiting_at,
    workspace,
)
from tests.support.runs.forks import logs, train_ranks
from tests.support.runs.waiting_step import stop_at
from tests.support.training import adapter_bytes, history, prepared

SHORT: dict[str, Any] = {"training": {"maxSteps": 8, "saveEverySteps": 3, "evalEverySteps": 50}}
PLAIN, SPREAD = merged(TWO, SHORT), merged(SHARDED, SHORT)


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path) -> tuple[Files, StepContext]:
    """A job for two processes."""
    return workspace(tmp_path / "job", tiny_llama, PLAIN)


def require_undisturbed(context: StepContext, root: Path, model: Path) -> None:
    """Resume the job, which ends as a job that is not disturbed."""
    undisturbed = prepared(root / "undisturbed", model, context.spec.dump())
    for each in (undisturbed, context):
        train_ranks(each)
    assert adapter_bytes(context) == adapter_bytes(undisturbed)
    assert history(context) == history(undisturbed)


def saves(log: str, step: int) -> int:
    """The number of reports in a log that the checkpoint of this step was saved."""
    return len(re.findall(rf"saved \S+/step-{step}$", log, re.MULTILINE))


@pytest.mark.parametrize(
    "signalled",
    [pytest.param((0,), marks=pytest.mark.slow), (1,), pytest.param((0, 1), marks=pytest.mark.slow)],
    ids=["main", "child", "both"],
)
def test_sigterm_on_any_process_saves_once_and_ends_both_and_the_resume_is_exact(
    tmp_path: Path, tiny_llama: Path, job: tuple[Files, StepContext], signalled: tuple[int, ...]
) -> None:
    files, context = job
    process = files.start("train", **waiting_at(tmp_path / "code", 5, *signalled))
    said = until(process, 5)
    until_waiting(tmp_path / "code", *signalled)
    child = other(process)
    for rank in signalled:
        os.kill((process.pid, child)[rank], signal.SIGTERM)
    interrupted = files.finish(process, said)

    assert interrupted.exit_code == ExitCode.INTERRUPTED, interrupted.stderr
    assert not runs(child)
    assert interrupted.result.training_step == 5
    assert "the checkpoint of step 5 is saved" in interrupted.result.message
    main_log, child_log = logs(context)
    assert "INFO qlora_trainer.training.distributed.launch: rank 1 of 2 ended with status 143" in main_log
    assert [saves(log, 5) for log in (main_log, child_log)] == [1, 0]
    require_undisturbed(context, tmp_path, tiny_llama)


def test_ranks_of_a_sharded_base_save_the_same_step(tmp_path: Path, tiny_llama: Path) -> None:
    context = prepared(tmp_path / "job", tiny_llama, SPREAD)
    train_ranks(context, partial(stop_at, 5, 1), ends=ExitCode.INTERRUPTED)
    assert [saves(log, 5) for log in logs(context)] == [1, 0]
    require_undisturbed(context, tmp_path, tiny_llama)


CRASH_AT_THE_END = """
import os
if os.environ.get("RANK") == "1":
    from qlora_trainer.core import process
    process.ignore_termination = lambda: os._exit(99)
"""


def test_a_process_that_crashes_after_the_save_changes_no_ending_and_is_logged(
    tmp_path: Path, job: tuple[Files, StepContext]
) -> None:
    files, context = job

    process = files.start("train", **waiting_at(tmp_path / "code", 5, 0, code=CRASH_AT_THE_END))
    said = until(process, 5)
    process.terminate()
    done = files.finish(process, said)

    assert done.exit_code == ExitCode.INTERRUPTED, done.stderr
    assert "the checkpoint of step 5 is saved" in done.result.message
    assert (
        "WARNING qlora_trainer.training.distributed.launch: rank 1 of 2 ended with status 99; its log is records/"
        in logs(context)[0]
    )


def test_a_killed_process_ends_the_other_for_another_attempt(tmp_path: Path, job: tuple[Files, StepContext]) -> None:
    files, _ = job
    process = files.start("train", **waiting_at(tmp_path / "code", 5, 1))
    said = until(process, 5)
    os.kill(other(process), signal.SIGKILL)

    done = files.finish(process, said)

    assert done.exit_code == ExitCode.UNREACHABLE, done.stderr
    assert "rank 1 of 2 was killed by SIGKILL" in done.result.message


def test_no_process_outlives_the_main_one(tmp_path: Path, job: tuple[Files, StepContext]) -> None:
    files, _ = job
    process = files.start("train", **waiting_at(tmp_path / "code", 5, 0))
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


def fail_as_the_second_and_sum_as_the_first() -> None:
    limit_second_gpu(0)
    # All sums follow the pass, as those of trained embeddings do. One that starts in it is not waited for by the host.
    vars(gradient_sums)["_BLOCK"] = re.compile(r"(?!)")
    if os.environ["RANK"] == "0":
        torch.distributed.all_reduce = lambda *_, **__: os._exit(99)


def test_no_process_starts_a_sum_after_the_pass_that_a_failed_process_will_never_join(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """NCCL, other than gloo, would wait for half an hour."""
    context = prepared(tmp_path, tiny_llama, merged(TWO, {"dataset": {"eval": None}}))

    train_ranks(context, fail_as_the_second_and_sum_as_the_first, ends=ExitCode.GPU_OUT_OF_MEMORY)
