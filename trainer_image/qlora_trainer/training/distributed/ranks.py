"""Communication between the ranks of one run. Each trains on its share of every step (data parallel).

The base is frozen, so only the adapter's gradient is summed, once per optimizer step (`gradient_sums`). Decisions are
exchanged in main memory (gloo), so that nothing waits for a GPU and a lost rank is noticed immediately.

At an equal global batch, several ranks compute what one does except for the order of additions: losses
and gradient norms are equal within 1e-4 of their size, each tensor of the adapter within 1e-3 of its norm. Sharding
the base over as many ranks changes losses by 5e-4 and gradient norms by 2e-3 at most, as the gradients of the states
are sums over parts of the vocabulary, rounded to 16 bit. All this holds without dropout, which each rank draws for
itself.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from qlora_trainer.core.failures import StepFailure, is_out_of_gpu_memory
from qlora_trainer.training.distributed.gradient_sums import GradientSums
from qlora_trainer.training.distributed.launch import RankInfo

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in an exchange: loading a large model, or saving on a slow volume.

NCCL's watchdog has the same limit. It exists only without TORCH_NCCL_BLOCKING_WAIT.
"""
SECONDS_TO_ANSWER = 60.0
"""How long the shared store may be silent. Its client would wait forever."""
# Reports of gloo and NCCL outside of the explicit exchanges, as in the passes of a sharded base. They have no type.
_CONNECTION = re.compile(
    r"gloo/|Connection (closed|reset|refused)|Broken pipe|ncclRemoteError|collective operation timeout|NCCL timeout"
)
# Their reports of this machine: an interface that is missing, shared memory that is full, a broken GPU.
_OWN_ERROR = re.compile(r"enforce fail at|CUDA error|ncclSystemError|ncclUnhandledCudaError|ncclInvalid")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run. Every rank must call every method, in the same order."""

    rank_info: RankInfo = field(default_factory=RankInfo)
    store: torch.distributed.Store | None = None
    """Names and texts for all ranks, or None for one rank."""
    is_sharded: bool = False
    """Whether the ranks share the base, so that all take part in every pass."""
    lost: Callable[[Exception], StepFailure] | None = None
    """Why an exchange failed: what another rank reported about its end, if it did."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that writes."""
        return self.rank_info.is_main

    def rounds(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's item of each round, with whether it counts. Every item counts in exactly one rank.

        In each round all ranks take the next items. In the last there may be too few: a rank without one gets the first
        item, which does not count.
        """
        rank, size = self.rank_info.rank, self.rank_info.size
        firsts = range(0, len(items), size)
        return [(items[first + rank], True) if first + rank < len(items) else (items[0], False) for first in firsts]

    def gather(self, *numbers: int) -> list[tuple[int, ...]]:
        """The values that each rank has passed, in the order of the ranks."""
        if self.rank_info.size == 1:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.int64)
        of_ranks = [torch.empty_like(own) for _ in range(self.rank_info.size)]
        with self._exchange():
            torch.distributed.all_gather(of_ranks, own)
        return [tuple(row.tolist()) for row in of_ranks]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any rank."""
        return any(is_set for (is_set,) in self.gather(int(flag)))

    def broadcast_text(self, name: str, text: str) -> str:
        """The text that the main process passes under this name. Use each name once."""
        store = self.store
        if store is None:
            return text
        with self._exchange():
            if self.is_main:
                store.set(name, text)
            return str(ask_store(lambda: store.get(name), TIMEOUT.total_seconds()).decode())

    def wait(self) -> None:
        """Wait until every rank has come here."""
        self.gather(0)

    def gradient_sums(self, parameters: Mapping[str, nn.Parameter], means: Tensor) -> GradientSums:
        """The sums of the next step's gradients and means over the ranks."""
        if self.rank_info.size == 1:
            return GradientSums([], [], self._exchange)
        # In a pass over a sharded base, the same communicator gathers its blocks, in an order that all ranks must keep.
        return GradientSums.of(parameters, means, self._exchange, overlaps=not self.is_sharded)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, of the same shape and type."""
        if self.rank_info.size > 1:
            # A lost rank is noticed here; NCCL's sum would wait for it.
            self.wait()
            with self._exchange():
                torch.distributed.all_reduce(value)
        return value

    def copy_from_main(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy rank 0's parameters to every rank, so that all begin alike."""
        if self.rank_info.size == 1:
            return
        # One that was lost while the model was loaded is noticed here; NCCL would wait for it without end.
        self.wait()
        with self._exchange():
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, src=0)
                # PyTorch does not count writes to `data`, and copies of the weights rely on the count.
                increment_version(parameter)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if self.lost is None or _is_own_error(error):
                raise
            raise self.lost(error) from error


def ask_store(ask: Callable[[], T], waits: float = 0.0) -> T:
    """The shared store's answer. It waits for at most `waits` seconds.

    Raises RuntimeError if it is gone, or silent for SECONDS_TO_ANSWER more, and whatever else `ask` raises.
    """
    answer: Future[T] = Future()

    def request() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            answer.set_exception(error)

    # The client can be interrupted by nothing, not even by a signal. A thread that it holds ends with the process.
    threading.Thread(target=request, daemon=True).start()
    seconds = waits + SECONDS_TO_ANSWER
    if not wait([answer], seconds).done:
        silent = f"the store of the main process has not answered for {seconds:.0f} seconds"
        raise torch.distributed.DistNetworkError(silent)
    return answer.result()


def is_lost_connection(error: Exception) -> bool:
    """Whether torch.distributed or a library below it has lost a rank or its network."""
    if isinstance(error, (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)):
        # The connection to the store is broken; or a rank did not leave there in time what the others need to reach it.
        return True
    lost = isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None
    return lost and not _is_own_error(error)


def _is_own_error(error: Exception) -> bool:
    return is_out_of_gpu_memory(error) or _OWN_ERROR.search(str(error)) is not None
