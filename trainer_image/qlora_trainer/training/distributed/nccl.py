"""Ends a process that waits for others in NCCL, where its main thread waits for the GPU and can raise nothing.

With `TORCH_NCCL_BLOCKING_WAIT` PyTorch starts no watchdog and nothing ends the wait, so it is not set.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed

from qlora_trainer.core.failures import StepFailure

SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_TO_NOTICE = 60.0
"""How long the main thread may take to find that another process has failed."""
WATCH = "qlora-watch"
"""Name of the thread that looks for it."""
_ABORT_HOOK = 1
logger = logging.getLogger(__name__)


@contextmanager
def end_with_the_others(
    failure_of: Callable[[Exception], StepFailure], require_none: Callable[[], None]
) -> Iterator[None]:
    """While the body runs, end this process with the exit code of one that has failed, or with one that is retried.

    `require_none` raises the StepFailure of another process that has failed, RuntimeError if that cannot be found out;
    `failure_of` gives the reason of an exchange that failed with an error. Both are called in other threads.
    """
    over = threading.Event()
    threading.Thread(target=_watch, name=WATCH, args=(over, require_none), daemon=True).start()
    try:
        # The watchdog calls hooks before it aborts the process, in a separate thread. PyTorch's older implementation
        # (TORCH_DIST_USE_NCCL2=0) has none.
        world = cast("torch.distributed.ProcessGroup", torch.distributed.group.WORLD)
        nccl = world._get_backend(torch.device("cuda"))
        given_up = torch.distributed.DistBackendError("NCCL has given up an exchange")
        if nccl.supports_abort_hooks:
            nccl.register_abort_hook(_ABORT_HOOK, lambda: _end_now(failure_of(given_up)))
        yield
        # NCCL's reports while it is taken down do not change the end of a finished run. One that fails keeps it.
        if nccl.supports_abort_hooks:
            nccl.unregister_abort_hook(_ABORT_HOOK)
    finally:
        over.set()


def _watch(over: threading.Event, require_none: Callable[[], None]) -> None:
    """End this process if another one has failed and the main thread does not notice: it waits for that one in NCCL.

    NCCL reports a connection that is lost. It does not report a process that has failed and is kept by its pod, or
    by its other threads, so that the GPUs would wait until the watchdog gives up.
    """
    while not over.wait(SECONDS_BETWEEN_LOOKS):
        try:
            require_none()
        except StepFailure as failure:
            if not over.wait(SECONDS_TO_NOTICE):
                _end_now(failure)
            return
        except RuntimeError as unknown:
            logger.warning("whether another process has failed is not known now: %s", unknown)


def _end_now(failure: StepFailure) -> None:
    logger.error(failure.message)
    # The operator maps the exit code to a reason. No result record can be written outside the main thread.
    os._exit(failure.exit_code)
