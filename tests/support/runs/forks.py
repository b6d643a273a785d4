"""Forks of a process that has loaded the trainer, which takes each process seconds; ranks that train together."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from devcluster.addresses import free_port
from qlora_api.contract import ExitCode
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StopRequest
from qlora_trainer.core.outcome import classify
from qlora_trainer.core.process import log_to, on_termination
from qlora_trainer.training.distributed.launch import RankInfo
from tests.support.runs import checkpoints
from tests.support.training import run

TIMEOUT_S = 300
Change = Callable[[], object]
"""Changes a process, whose environment has its rank, before it trains. It is pickled."""


def server() -> multiprocessing.context.ForkServerContext:
    """Forks processes of one that has loaded PyTorch and the trainer, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, checkpoints.__name__])
    return context


@contextmanager
def forked(action: Callable[..., object], *arguments: object) -> Iterator[multiprocessing.context.ForkProcess]:
    """Call it in a fork of the tests' process, whose threads it lacks, and kill that at the end."""
    process = multiprocessing.get_context("fork").Process(target=action, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def train_ranks(context: StepContext, change: Change | None = None, *, ends: ExitCode = ExitCode.DONE) -> None:
    """Train the job in a process for each GPU, as torchrun starts them. Each has its log."""
    size, port = context.spec.resources.gpus, free_port()
    ranks = [RankInfo(rank, size, rank, size, "127.0.0.1", port) for rank in range(size)]
    # The server has the environment of the test that started it.
    given = dict(os.environ) | {"GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        server().Process(target=_train, args=(context, rank, change, given | rank.environment())) for rank in ranks
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    exit_codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert exit_codes == [ends] * size, logs(context)


def logs(context: StepContext) -> list[str]:
    """The logs of the ranks, the main one's first."""
    found = [_log(context, rank) for rank in range(context.spec.resources.gpus)]
    return [log.read_text() if log.exists() else "" for log in found]


def _log(context: StepContext, rank: int) -> Path:
    return context.workspace.records / ("train.log" if rank == 0 else f"train.rank-{rank}.log")


def _train(context: StepContext, rank: RankInfo, change: Change | None, environment: dict[str, str]) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    log_to(_log(context, rank.rank), "")
    # As in a step's process: another number of threads adds in another order.
    torch.set_num_threads(1)
    stop = StopRequest()
    on_termination(stop.set)
    try:
        if change is not None:
            change()
        run(context, stop=stop)
    except BaseException as error:  # noqa: BLE001 - it is in the log, which the test shows
        traceback.print_exc()
        os._exit(classify(error).exit_code)
    os._exit(ExitCode.DONE)
