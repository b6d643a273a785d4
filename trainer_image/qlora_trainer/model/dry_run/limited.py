"""Runs what a stranger's configuration decides in a process of its own, with limits. Loads no torch itself.

A configuration comes from strangers: it may describe a model that takes hours, or all memory, even without data.
"""

import importlib
import importlib.util
import logging
import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qlora_api.memory.estimate import ActivationBytes
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.core.process import hide_gpus

logger = logging.getLogger(__name__)
INSTALL = "run `pip install '.[cli,trainer]'` in a checkout of the repository"
"""What to do where the trainer, or its client of the Hub, is not installed."""
SECONDS = 600
MEMORY_BYTES = 2 * 2**30
"""On top of what the process has."""
_SECONDS_FOR_PARENT = 5.0
_MEASURE = "qlora_trainer.model.dry_run.measure"


class DryRunFailed(Exception):  # noqa: N818 - the dry run is what failed
    """There is no result; the message says why."""


class LimitReached(DryRunFailed):
    """It took more time or memory than allowed."""


@dataclass(frozen=True)
class StepSize:
    """A micro batch to measure."""

    sequences: int
    sequence_tokens: int
    gradient_checkpointing: bool


def measure_within_limits(
    config: Path, spec: QLoRAJobSpec, sizes: Sequence[StepSize], digest: str, family: Any = None
) -> MeasuredMemory:
    """`measure.measure` in at most ten minutes and 2 GiB. `family` is what is known of the model from an inspection.

    Raises StepFailure for a model that cannot be trained, RuntimeError in a process that sees a GPU, and DryRunFailed
    for whatever else there is.
    """
    _require_trainer()
    found: MeasuredMemory = within_limits(_call, (config, spec, tuple(sizes), digest, family))
    return found


def measure_together_within_limits(
    config: Path, specs: Sequence[QLoRAJobSpec], passes: Sequence[tuple[int, ...]], family: Any = None
) -> tuple[ActivationBytes, ...]:
    """`measure.measure_together`, with the same limits and `family`. Raises as `measure_within_limits` does."""
    _require_trainer()
    found: tuple[ActivationBytes, ...] = within_limits(_call_together, (config, tuple(specs), tuple(passes), family))
    return found


def _require_trainer() -> None:
    if importlib.util.find_spec("torch") is None:
        raise DryRunFailed(f"the trainer is not installed: {INSTALL}")


# By its name: whoever imports this module does not load torch.


def _call(*arguments: Any) -> Any:
    return importlib.import_module(_MEASURE).measure(*arguments)


def _call_together(*arguments: Any) -> Any:
    return importlib.import_module(_MEASURE).measure_together(*arguments)


def within_limits(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    seconds: float = SECONDS,
    memory_bytes: int = MEMORY_BYTES,
    what: str = "the dry run",
) -> Any:
    """What the function returns, which is called in a forked process.

    `what` is what a message calls the function. Raises its StepFailure, LimitReached, or DryRunFailed for any other
    end; RuntimeError in a process that sees a GPU, from which none can be forked that computes.
    """
    _require_no_gpu(what)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, arguments, seconds, memory_bytes, what), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise LimitReached(f"{what} took more than {seconds:g} seconds")
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise DryRunFailed(f"{what} was ended by signal or exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(answer, StepFailure | DryRunFailed):
        raise answer
    return answer


def _require_no_gpu(what: str) -> None:
    torch = sys.modules.get("torch")
    # To ask starts CUDA's driver already: there is no way to fork afterwards if the answer is yes.
    if torch is not None and torch.cuda.is_available():
        raise RuntimeError(
            f"{what} runs in a process that is forked from this one, in which PyTorch sees a GPU: CUDA does not "
            f"survive a fork. Start this program with CUDA_VISIBLE_DEVICES set to nothing; {what} needs no GPU"
        )


def _run(
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    seconds: float,
    memory_bytes: int,
    what: str,
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    # The parent may have loaded no library yet.
    hide_gpus()
    # The parent may be killed and end nothing.
    signal.setitimer(signal.ITIMER_REAL, seconds + _SECONDS_FOR_PARENT)
    try:
        _limit_memory(memory_bytes)
        answer = function(*arguments)
    except StepFailure as failure:
        answer = failure
    except MemoryError:
        answer = LimitReached(f"{what} took more than {memory_bytes / 2**30:.1f} GiB of host memory")
    except Exception as error:
        logger.info("%s failed", what, exc_info=True)
        answer = _failure(error, memory_bytes, what)
    sender.send(answer)


def _limit_memory(memory_bytes: int) -> None:
    most, (_, hard) = _private_bytes() + memory_bytes, resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _failure(error: Exception, memory_bytes: int, what: str) -> DryRunFailed:
    # A character may take six bytes in a record, which has a limit.
    text = next(iter(str(error).splitlines()), "").encode("ascii", "replace").decode()[:300]
    if is_out_of_memory(error):
        return LimitReached(f"{what} took more than {memory_bytes / 2**30:.1f} GiB of host memory ({text})")
    return DryRunFailed(f"{what} failed: {type(error).__name__}: {text}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is PyTorch's for memory that it does not get."""
    return "allocate memory" in str(error) or "bad_alloc" in str(error)


def _private_bytes() -> int:
    """What counts for the limit: the process's private, writable memory."""
    with open("/proc/self/status") as file:
        size = next(line.split()[1] for line in file if line.startswith("VmData:"))
    return int(size) * 1024
