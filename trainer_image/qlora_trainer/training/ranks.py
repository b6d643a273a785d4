"""What the processes of one run agree on and sum up: each trains on its share of every step (data parallel).

The base is frozen, so what has to travel is the adapter's gradient alone, once an optimizer step: no wrapper such as
DistributedDataParallel is needed, whose `no_sync` over all micro batches but the last comes to the same. Decisions go
over a second way, in main memory (gloo), so that no GPU is waited for and a lost process is noticed at once.

At an equal global batch, several processes compute what one does but for the order in which numbers are added: losses
and gradient norms are equal within 1e-4 of their size, each tensor of the adapter within 1e-3 of its norm. A base that
is spread over as many processes changes losses and gradient norms by 1e-5 at most. That is without dropout, of which
each process draws its own.
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
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import Interrupted, StepFailure, unreachable
from qlora_trainer.core.outcome import classify
from qlora_trainer.training.launch import ChildRanks, RankInfo

TIMEOUT = timedelta(minutes=30)
"""For which a process waits for the others: loading a large model and saving on a slow volume take minutes."""
BUCKET_BYTES = 25 * 2**20
"""Gradients are summed in parts of this size, as in PyTorch's DDP (arXiv 2006.15704): so much memory it costs."""
_FAILURE = "failure"
_JOINED = "joined"
_SECONDS_BETWEEN_LOOKS = 0.1
_LOOKS = 50
logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that train together. Every method must be called by all of them, in the same order."""

    place: RankInfo = field(default_factory=RankInfo)
    store: Any = None
    """Names and texts that all processes see, a torch.distributed.Store; None where there is one process."""
    sharded: bool = False
    """Whether the base is spread over the processes, so that all must take part in every pass through the model."""
    lost: Callable[[Exception], StepFailure] | None = None
    """Why an exchange failed: what another process has said about its end, if it has."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.place.main

    def rounds(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """This process's item in each round, in which all take the next ones; every item counts in exactly one process.

        In the last round there may be too few. A process without one gets the first item, which then does not count.
        """
        rank, size = self.place.rank, self.place.size
        firsts = range(0, len(items), size)
        return [(items[first + rank], True) if first + rank < len(items) else (items[0], False) for first in firsts]

    def gather(self, *numbers: int) -> list[tuple[int, ...]]:
        """What each process has passed, by rank."""
        if self.place.size == 1:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.int64)
        everybody = [torch.empty_like(own) for _ in range(self.place.size)]
        with self._exchange():
            torch.distributed.all_gather(everybody, own)
        return [tuple(row.tolist()) for row in everybody]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set anywhere."""
        return any(there for (there,) in self.gather(int(flag)))

    def from_main(self, name: str, text: str) -> str:
        """The text that the main process passes under this name, which is used once."""
        if self.store is None:
            return text
        with self._exchange():
            if self.main:
                self.store.set(name, text)
            return str(self.store.get(name).decode())

    def wait(self) -> None:
        """Until all are here."""
        self.gather(0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> None:
        """Replace each gradient, and the loss, by the sum over the processes, the same bits in each.

        A parameter without a gradient, in a process that had no micro batch, counts as 0. Sums are in float32.
        """
        if self.place.size == 1:
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
        """The sum over the processes, of the same shape and type."""
        if self.place.size > 1:
            # A process that is lost is noticed here; NCCL's sum would wait for it.
            self.wait()
            with self._exchange():
                torch.distributed.all_reduce(value)
        return value

    def copy_from_main(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the main one's parameters, so that they begin alike whatever drew them."""
        if self.place.size == 1:
            return
        with self._exchange():
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, src=0)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise (error if self.lost is None else self.lost(error)) from error


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
    """Why processes of this run have ended, as far as they could say."""

    def __init__(self, store: Any, others: ChildRanks) -> None:
        self._store, self._others = store, others

    def tell(self, error: Exception) -> None:
        """Leave word of this process's failure, unless another one was first."""
        ending = classify(error)
        text = json.dumps({"rank": self._others.place.rank, "code": int(ending.exit_code), "message": ending.message})
        try:
            self._store.compare_set(_FAILURE, "", text)
        except RuntimeError:
            logger.warning("the others could not be told, the main process is gone")

    def __call__(self, error: Exception) -> StepFailure:
        """What must be raised when an exchange failed with `error`. A lost process is given a moment to be found."""
        for _ in range(_LOOKS):
            try:
                self.require_none()
            except StepFailure as failure:
                return failure
            except RuntimeError:
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        first_line = str(error).strip().partition("\n")[0][:200]
        return unreachable(
            f"rank {self._others.place.rank} of {self._others.place.size} lost another process of this run "
            f"({first_line}); the step is tried again"
        )

    def require_none(self) -> None:
        """Raise the StepFailure of the first process that failed, or of one that has been killed."""
        if self._store.check([_FAILURE]):
            said = json.loads(self._store.get(_FAILURE))
            own = said["rank"] == self._others.place.rank
            raise StepFailure(
                ExitCode(said["code"]), said["message"] if own else f"rank {said['rank']}: {said['message']}"
            )
        self._others.require_alive()


@contextmanager
def joined(others: ChildRanks, device: Device, sharding: Literal["none", "full"]) -> Iterator[Ranks]:
    """The processes of this run, once all are there, and whether they spread the base.

    A failure of this process is told to the others before it ends, so that each ends with the same exit code. Raises
    StepFailure (UNREACHABLE) if one does not come, or is lost later, without having said why.
    """
    place = others.place
    if place.size == 1:
        yield Ranks()
        return
    store = _store(place)
    endings = _Endings(store, others)
    try:
        _wait_for_all(store, place, endings)
        # An exchange over NCCL then ends with an exception after the timeout, and not with the process.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=torch.distributed.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=TIMEOUT,
        )
        yield Ranks(place, store, sharding == "full", endings)
    except Interrupted:
        raise
    except Exception as error:
        endings.tell(error)
        raise
    torch.distributed.destroy_process_group()


def _store(place: RankInfo) -> Any:
    """The processes' common store. torchrun's agent keeps it itself; else the main process does."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = torch.distributed.TCPStore(
            place.address, place.port, place.size, place.main and not by_agent, timeout=TIMEOUT, wait_for_workers=False
        )
    except RuntimeError as error:
        raise unreachable(f"rank {place.rank} does not reach {place.address}:{place.port}: {error}") from error
    # torchrun may start all processes again over the same store.
    return torch.distributed.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_all(store: Any, place: RankInfo, endings: _Endings) -> None:
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    store.add(_JOINED, 1)
    while (there := store.add(_JOINED, 0)) < place.size:
        endings.require_none()
        if time.monotonic() > deadline:
            raise unreachable(f"{there} of {place.size} processes came within {TIMEOUT}; the step is tried again")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
