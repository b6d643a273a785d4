"""Runs a function on untrusted input in a forked process with limits of time and memory. Loads no torch itself.

A model's configuration is untrusted: it may describe a model that takes hours, or all memory, even without data. So is
a Parquet file: a few of its bytes may become gigabytes, or crash the library that reads them.
"""

import gc
import logging
import multiprocessing
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from typing import Any, TypeVar, TypeVarTuple

from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.process import hide_gpus

logger = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")
SECONDS = 600
MEMORY_BYTES = 2 * 2**30
"""On top of what the process has."""
_SECONDS_FOR_PARENT = 5.0


class DryRunFailed(Exception):  # noqa: N818 - the dry run is what failed
    """There is no result. The message has the reason."""


class LimitReached(DryRunFailed):
    """It took more time or memory than allowed."""


def within_limits(
    function: Callable[[*Arguments], Result],
    arguments: tuple[*Arguments],
    *,
    seconds: float = SECONDS,
    memory_bytes: int = MEMORY_BYTES,
    what: str = "the dry run",
) -> Result:
    """Call the function in a forked process, and return its result. `what` names it in messages.

    Raises its StepFailure, LimitReached, DryRunFailed for any other end, RuntimeError in a process that sees a GPU.
    """

    def once() -> Iterator[Result]:
        yield function(*arguments)

    with closing(iterate_within_limits(once, (), seconds=seconds, memory_bytes=memory_bytes, what=what)) as answers:
        return next(answers)


def iterate_within_limits(
    function: Callable[[*Arguments], Iterator[Result]],
    arguments: tuple[*Arguments],
    *,
    seconds: float = SECONDS,
    memory_bytes: int = MEMORY_BYTES,
    what: str = "the dry run",
) -> Generator[Result, None, None]:
    """Yield the items of a function in a forked process, as `within_limits`."""
    _require_no_gpu(what)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_run, args=(receiver, sender, function, arguments, seconds, memory_bytes, what), daemon=True
    )
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(seconds):
                raise LimitReached(f"{what} took more than {seconds:g} seconds")
            try:
                received = receiver.recv_bytes()
            except EOFError:
                process.join()
                raise DryRunFailed(f"{what} was ended by signal or exit code {process.exitcode}") from None
            answer = _read(received, what)
            if isinstance(answer, _End):
                return
            if isinstance(answer, StepFailure | DryRunFailed):
                raise answer
            yield answer
    finally:
        process.kill()
        process.join()
        receiver.close()


def _read(answer: bytes, what: str) -> Any:
    # Its modules are imported, whose errors do not tell how the process ended.
    try:
        return pickle.loads(answer)  # noqa: S301 - as `Connection.recv` reads it
    except Exception as error:
        raise DryRunFailed(f"the answer of {what} cannot be read: {type(error).__name__}: {error}") from error


class _End:
    """Follows the last item."""


def _require_no_gpu(what: str) -> None:
    torch = sys.modules.get("torch")
    # To ask starts CUDA's driver already: there is no way to fork afterwards if the answer is yes.
    if torch is not None and torch.cuda.is_available():
        raise RuntimeError(
            f"{what} runs in a process that is forked from this one, in which PyTorch sees a GPU: CUDA does not "
            f"survive a fork. Start this program with CUDA_VISIBLE_DEVICES set to nothing; {what} needs no GPU"
        )


def _run(
    receiver: Connection,
    sender: Connection,
    function: Callable[[*Arguments], Iterator[object]],
    arguments: tuple[*Arguments],
    seconds: float,
    memory_bytes: int,
    what: str,
) -> None:
    # Otherwise sending would not fail after the parent's death.
    receiver.close()
    # A collection would write to each object of the parent, and so copy its memory.
    gc.freeze()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    # The parent may have loaded no library yet.
    hide_gpus()
    # The parent may be killed and end nothing.
    longest = seconds + _SECONDS_FOR_PARENT
    signal.setitimer(signal.ITIMER_REAL, longest)
    answer: object = _End()
    try:
        _limit_memory(memory_bytes)
        for item in function(*arguments):
            # The parent may take its time.
            signal.setitimer(signal.ITIMER_REAL, 0)
            sender.send(item)
            signal.setitimer(signal.ITIMER_REAL, longest)
    except StepFailure as failure:
        answer = failure
    except MemoryError:
        answer = LimitReached(f"{what} took more than {memory_bytes / 2**30:.1f} GiB of host memory")
    except Exception as error:
        logger.info("%s failed", what, exc_info=True)
        answer = _failure(error, memory_bytes, what)
    sender.send(answer)


def _limit_memory(memory_bytes: int) -> None:
    """Limit private, writable memory to so many bytes on top of what the process has."""
    with open("/proc/self/status") as file:
        kilobytes = next(line.split()[1] for line in file if line.startswith("VmData:"))
    most, (_, hard) = int(kilobytes) * 1024 + memory_bytes, resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _failure(error: Exception, memory_bytes: int, what: str) -> DryRunFailed:
    # A character may take six bytes in a record, which has a limit.
    text = next(iter(str(error).splitlines()), "").encode("ascii", "replace").decode()[:300]
    if is_out_of_memory(error):
        return LimitReached(f"{what} took more than {memory_bytes / 2**30:.1f} GiB of host memory ({text})")
    return DryRunFailed(f"{what} failed: {type(error).__name__}: {text}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is PyTorch's for memory that it does not get."""
    return "allocate memory" in str(error) or "bad_alloc" in str(error)
