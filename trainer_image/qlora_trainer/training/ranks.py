"""Communication between the ranks of one run, each of which trains on its share of every step (data parallel).

The base is frozen, so only the adapter's gradient is summed, once per optimizer step. That needs no wrapper such as
DistributedDataParallel, whose `no_sync` over all micro batches but the last does the same. Decisions are exchanged in
main memory (gloo), so that nothing waits for a GPU and a lost rank is noticed at once.

At an equal global batch, several ranks compute what one does except for the order in which numbers are added: losses
and gradient norms are equal within 1e-4 of their size, each tensor of the adapter within 1e-3 of its norm. Sharding
the base over as many ranks changes losses and gradient norms by 1e-5 at most. All this holds without dropout, which
each rank draws for itself.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from qlora_api.contract import ExitCode
from qlora_api.printable import first_line
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import Interrupted, StepFailure, is_out_of_gpu_memory, unreachable
from qlora_trainer.core.outcome import classify
from qlora_trainer.training.launch import ChildRanks, RankInfo

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: loading a large model and saving on a slow volume take minutes."""
BUCKET_BYTES = 25 * 2**20
"""Gradients are summed in buckets of this size, as in PyTorch's DDP (arXiv 2006.15704): the memory that it costs."""
_FAILURE = "failure"
_JOINED = "joined"
_SECONDS_BETWEEN_LOOKS = 0.1
_LOOKS = 50
logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run. Every rank must call every method, in the same order."""

    rank_info: RankInfo = field(default_factory=RankInfo)
    store: Any = None
    """Names and texts that all ranks see, a torch.distributed.Store; None if there is one rank."""
    sharded: bool = False
    """Whether the base is sharded over the ranks, so that all must take part in every pass through the model."""
    lost: Callable[[Exception], StepFailure] | None = None
    """Why an exchange failed: what another rank reported about its end, if it did."""

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only rank that writes."""
        return self.rank_info.main

    def rounds(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's item of each round, with whether it counts; every item counts in exactly one rank.

        In each round all ranks take the next items. In the last there may be too few: a rank without one gets the first
        item, which does not count.
        """
        rank, size = self.rank_info.rank, self.rank_info.size
        firsts = range(0, len(items), size)
        return [(items[first + rank], True) if first + rank < len(items) else (items[0], False) for first in firsts]

    def gather(self, *numbers: int) -> list[tuple[int, ...]]:
        """What each rank has passed, in the order of the ranks."""
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

    def from_main(self, name: str, text: str) -> str:
        """The text that the main process passes under this name. Use each name once."""
        if self.store is None:
            return text
        with self._exchange():
            if self.main:
                self.store.set(name, text)
            return str(self.store.get(name).decode())

    def wait(self) -> None:
        """Wait until every rank has come here."""
        self.gather(0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> None:
        """Replace each gradient, and the loss, by the sum over the ranks, the same bits in each.

        A parameter without a gradient, in a rank that had no micro batch, counts as 0. Sums are in float32.
        """
        if self.rank_info.size == 1:
            return
        gradients = [loss.unsqueeze(0)]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        with self._exchange(), torch.no_grad():
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.flatten().float() for gradient in bucket])
                torch.distributed.all_reduce(flat)
                parts = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, of the same shape and type."""
        if self.rank_info.size > 1:
            # A lost rank is noticed here; NCCL's sum would wait for it.
            self.wait()
            with self._exchange():
                torch.distributed.all_reduce(value)
        return value

    def copy_from_main(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every rank the parameters of rank 0, so that all begin alike however they were initialized."""
        if self.rank_info.size == 1:
            return
        with self._exchange():
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, src=0)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if self.lost is None or is_out_of_gpu_memory(error):
                raise
            raise self.lost(error) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + 4 * tensor.numel() > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += 4 * tensor.numel()
    yield bucket


class _Endings:
    """Why ranks of this run have ended, as far as they could report it."""

    def __init__(self, store: Any, child_ranks: ChildRanks) -> None:
        self._store, self._child_ranks, self._own = store, child_ranks, child_ranks.rank_info

    def publish(self, error: Exception) -> None:
        """Put this rank's failure into the shared store, unless another rank's is there."""
        ending = classify(error)
        text = json.dumps({"rank": self._own.rank, "code": int(ending.exit_code), "message": ending.message})
        try:
            self._store.compare_set(_FAILURE, "", text)
        except RuntimeError:
            logger.warning("the other ranks were not informed of this failure: the store of the main process is gone")

    def __call__(self, error: Exception) -> StepFailure:
        """What to raise when an exchange failed with `error`, after a moment in which a lost rank can be found."""
        for _ in range(_LOOKS):
            try:
                self.require_none()
            except StepFailure as failure:
                return failure
            except RuntimeError:
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return unreachable(
            f"rank {self._own.rank} of {self._own.size} lost another process of this run "
            f"({first_line(error)}); the step is retried"
        )

    def require_none(self) -> None:
        """Raise the StepFailure of the first rank that failed, or of a child rank that has been killed."""
        if self._store.check([_FAILURE]):
            said = json.loads(self._store.get(_FAILURE))
            own = said["rank"] == self._own.rank
            raise StepFailure(
                ExitCode(said["code"]), said["message"] if own else f"rank {said['rank']}: {said['message']}"
            )
        self._child_ranks.require_alive()


@contextmanager
def joined(child_ranks: ChildRanks, device: Device, sharding: Literal["none", "full"]) -> Iterator[Ranks]:
    """The ranks of this run, once all have joined; they shard the base if `sharding` is full.

    A failure of this rank is published before it ends, so that every rank ends with the same exit code. Raises
    StepFailure (UNREACHABLE) if a rank does not join, or is lost later without a reason.
    """
    rank_info = child_ranks.rank_info
    if rank_info.size == 1:
        yield Ranks()
        return
    store = _store(rank_info)
    endings = _Endings(store, child_ranks)
    try:
        _wait_for_all(store, rank_info, endings)
        # Then an exchange over NCCL that times out raises an exception instead of ending the process.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=torch.distributed.PrefixStore("group", store),
            rank=rank_info.rank,
            world_size=rank_info.size,
            timeout=TIMEOUT,
        )
        yield Ranks(rank_info, store, sharding == "full", endings)
    except Interrupted:
        raise
    except Exception as error:
        endings.publish(error)
        raise
    torch.distributed.destroy_process_group()


def _store(rank_info: RankInfo) -> Any:
    """The store that the ranks share. It is torchrun's agent that serves it, or else the main process."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = torch.distributed.TCPStore(
            rank_info.address,
            rank_info.port,
            rank_info.size,
            rank_info.main and not by_agent,
            timeout=TIMEOUT,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise unreachable(
            f"rank {rank_info.rank} does not reach {rank_info.address}:{rank_info.port}: {error}"
        ) from error
    # torchrun may restart all ranks over the same store.
    return torch.distributed.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_all(store: Any, rank_info: RankInfo, endings: _Endings) -> None:
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    store.add(_JOINED, 1)
    while (joined_ranks := store.add(_JOINED, 0)) < rank_info.size:
        endings.require_none()
        if time.monotonic() > deadline:
            raise unreachable(f"{joined_ranks} of {rank_info.size} ranks joined within {TIMEOUT}; the step is retried")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
