"""Communication between the ranks of one run. Each trains on its share of every step (data parallel).

The base is frozen, so only the adapter's gradient is summed, once per optimizer step. That needs no wrapper such as
DistributedDataParallel, whose `no_sync` over all micro batches but the last does the same. Decisions are exchanged in
main memory (gloo), so that nothing waits for a GPU and a lost rank is noticed immediately.

At an equal global batch, several ranks compute what one does except for the order of additions: losses
and gradient norms are equal within 1e-4 of their size, each tensor of the adapter within 1e-3 of its norm. Sharding
the base over as many ranks changes losses and gradient norms by 1e-5 at most. All this holds without dropout, which
each rank draws for itself.
"""

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from qlora_api.contract import ExitCode
from qlora_api.printable import first_line
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import Interrupted, StepFailure, is_out_of_gpu_memory, peer_lost, unreachable
from qlora_trainer.core.outcome import classify
from qlora_trainer.training.distributed.device import require_gpu
from qlora_trainer.training.distributed.launch import ChildRanks, RankInfo
from qlora_trainer.training.distributed.nccl import ended_with_the_others

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in an exchange: loading a large model, or saving on a slow volume.

NCCL's watchdog has the same limit. It exists only without TORCH_NCCL_BLOCKING_WAIT.
"""
TO_CONNECT = timedelta(minutes=2)
"""How long a rank waits for the address of another one once all have met."""
GLOO_CONNECTS_FOR = 5
"""For how many times as long gloo then waits for that rank itself."""
SECONDS_TO_ANSWER = 60.0
"""How long the shared store may be silent. Its client would wait forever."""
BUCKET_BYTES = 25 * 2**20
"""Bytes of the buckets for sums of gradients, as in DDP (arXiv 2006.15704)."""
_FAILURE = "failure"
_JOINED = "joined"
_SECONDS_BETWEEN_LOOKS = 0.1
_LOOKS = 50
# A node that does not answer is tried again after this time, so that a signal is noticed in between.
_SECONDS_TO_CONNECT = timedelta(seconds=5)
_SECONDS_BETWEEN_CONNECTS = 1.0
_SECONDS_TO_TELL = 1.0
# Reports of gloo and NCCL outside of the explicit exchanges, as in the passes of a sharded base. They have no type.
_CONNECTION = re.compile(
    r"gloo/|Connection (closed|reset|refused)|Broken pipe|ncclRemoteError|collective operation timeout|NCCL timeout"
)
# Their reports of this machine: an interface that is missing, shared memory that is full, a broken GPU.
_OWN_ERROR = re.compile(r"enforce fail at|CUDA error|ncclSystemError|ncclUnhandledCudaError|ncclInvalid")
logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run. Every rank must call every method, in the same order."""

    rank_info: RankInfo = field(default_factory=RankInfo)
    store: Any = None
    """A torch.distributed.Store of names and texts for all ranks, or None for one."""
    sharded: bool = False
    """Whether the ranks share the base, so that all take part in every pass."""
    lost: Callable[[Exception], StepFailure] | None = None
    """Why an exchange failed: what another rank reported about its end, if it did."""

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only rank that writes."""
        return self.rank_info.main

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

    def from_main(self, name: str, text: str) -> str:
        """The text that the main process passes under this name. Use each name once."""
        if self.store is None:
            return text
        with self._exchange():
            if self.main:
                self.store.set(name, text)
            return str(_answer(lambda: self.store.get(name), TIMEOUT.total_seconds()).decode())

    def wait(self) -> None:
        """Wait until every rank has come here."""
        self.gather(0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], means: Tensor) -> None:
        """Replace each gradient, and the rank's part of the means, by the sum over the ranks, the same bits in each.

        A parameter without a gradient, in a rank that had no micro batch, counts as 0. Sums are in float32.
        """
        if self.rank_info.size == 1:
            return
        gradients = [means]
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
        """Copy rank 0's parameters to every rank, so that all begin alike."""
        if self.rank_info.size == 1:
            return
        # One that was lost while the model was loaded is noticed here; NCCL would wait for it without end.
        self.wait()
        with self._exchange():
            for parameter in parameters:
                torch.distributed.broadcast(parameter.data, src=0)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if self.lost is None or _is_own_error(error):
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
        """Put this rank's failure into the shared store, unless it has another rank's."""
        ending = classify(error)
        text = json.dumps({"rank": self._own.rank, "code": int(ending.exit_code), "message": ending.message})
        try:
            _answer(lambda: self._store.compare_set(_FAILURE, "", text))
        except RuntimeError:
            logger.warning("the other ranks were not informed of this failure: the store of the main process is gone")

    def __call__(self, error: Exception) -> StepFailure:
        """The failure for an exchange's `error`. Waits a moment to find a lost rank."""
        for _ in range(_LOOKS):
            try:
                self.require_none()
            except StepFailure as failure:
                return failure
            except RuntimeError:
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        lost = peer_lost if self._own.several_nodes else unreachable
        return lost(
            f"rank {self._own.rank} of {self._own.size} lost another process of this run "
            f"({first_line(error)}); the step is retried"
        )

    def require_none(self) -> None:
        """Raise the StepFailure of the first rank that failed, or of a killed child."""
        if _answer(lambda: self._store.check([_FAILURE])):
            said = json.loads(_answer(lambda: self._store.get(_FAILURE)))
            own = said["rank"] in (self._own.rank, None)
            raise StepFailure(
                ExitCode(said["code"]), said["message"] if own else f"rank {said['rank']}: {said['message']}"
            )
        self._child_ranks.require_alive()


def _answer(ask: Callable[[], T], waits: float = 0.0) -> T:
    """The shared store's answer. It waits for at most `waits` seconds.

    Raises RuntimeError if it is gone, or silent for SECONDS_TO_ANSWER more, and whatever else `ask` raises.
    """
    answers: list[T] = []
    errors: list[Exception] = []

    def wait() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            errors.append(error)

    # The client can be interrupted by nothing, not even by a signal. A thread that it holds ends with the process.
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(waits + SECONDS_TO_ANSWER)
    if errors:
        raise errors[0]
    if not answers:
        silent = f"the store of the main process has not answered for {waits + SECONDS_TO_ANSWER:.0f} seconds"
        raise torch.distributed.DistNetworkError(silent)
    return answers[0]


@dataclass(frozen=True)
class Meeting:
    """How this rank meets the others."""

    seconds: float = TIMEOUT.total_seconds()
    """For how long it waits for them."""
    incarnation: str = ""
    """The UID of its pod: a pod that replaces another one must not join what that one had joined. Empty if no pod is
    replaced."""
    stopped: Callable[[], bool] = lambda: False
    """Whether it has been asked to stop."""
    report: Callable[[str], None] = lambda _activity: None
    """Reports what it waits for."""


@contextmanager
def joined(
    child_ranks: ChildRanks, device: Device, sharding: Literal["none", "full"], meeting: Meeting | None = None
) -> Iterator[Ranks]:
    """The ranks of this run, once all have joined. They shard the base if `sharding` is full.

    A failure of this rank is published before it ends, so that every rank ends with the same exit code. Raises
    StepFailure: UNREACHABLE if a rank does not join, or is lost later without a reason; if that can be one of another
    node, PEERS_MISSING and PEER_LOST. Raises Interrupted if it is asked to stop before all have joined.
    """
    rank_info, meeting = child_ranks.rank_info, meeting or Meeting()
    if rank_info.size == 1:
        yield Ranks()
        return
    store = _store(rank_info, meeting, child_ranks)
    endings = _Endings(_second_connection(store, child_ranks), child_ranks)
    try:
        _wait_for_all(store, rank_info, endings, meeting)
        # It asks the store too, and would wait without end for one whose node stops now.
        _answer(lambda: _connect_all(store, rank_info, device), GLOO_CONNECTS_FOR * TO_CONNECT.total_seconds())
        torch.distributed.set_timeout(TIMEOUT)
        with ended_with_the_others(endings, endings.require_none) if device == "cuda" else nullcontext():
            yield Ranks(rank_info, store, sharding == "full", endings)
    except Interrupted:
        raise
    except Exception as error:
        if rank_info.several_nodes and is_lost_connection(error):
            if meeting.stopped() and not torch.distributed.is_initialized():
                # Node 0 has been stopped too, as when a queue suspends the job, and was the first to end.
                raise Interrupted(0, 0, 0) from error
            lost = endings(error)
            endings.publish(lost)
            raise lost from error
        endings.publish(error)
        raise
    torch.distributed.destroy_process_group()


def _second_connection(store: Any, child_ranks: ChildRanks) -> Any:
    """Connect again to the store, for failures.

    An exchange may keep the first connection for half an hour.
    """
    try:
        return store.clone()
    except torch.distributed.DistNetworkError as error:
        # The node that serves it may stop between the two.
        raise _Endings(store, child_ranks)(error) from error


def _connect_all(store: Any, rank_info: RankInfo, device: Device) -> None:
    if device == "cuda":
        # Else NCCL only reports a missing GPU, and takes the one with the rank's number among all nodes.
        require_gpu(rank_info.local_rank)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=torch.distributed.PrefixStore("group", store),
        rank=rank_info.rank,
        world_size=rank_info.size,
        timeout=TO_CONNECT,
        device_id=torch.device(device, rank_info.local_rank) if device == "cuda" else None,
    )


def is_lost_connection(error: Exception) -> bool:
    """Whether torch.distributed or a library below it has lost a rank or its network."""
    if isinstance(error, (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)):
        # The connection to the store is broken; or a rank did not leave there in time what the others need to reach it.
        return True
    lost = isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None
    return lost and not _is_own_error(error)


def _is_own_error(error: Exception) -> bool:
    return is_out_of_gpu_memory(error) or _OWN_ERROR.search(str(error)) is not None


def _store(rank_info: RankInfo, meeting: Meeting, child_ranks: ChildRanks) -> Any:
    """The store that the ranks share, served by torchrun's agent or the main process."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank_info.main and not by_agent
    deadline = time.monotonic() + meeting.seconds
    while True:
        try:
            store = _connected(rank_info, serves=serves)
            # torchrun may restart all ranks over the same store.
            own = torch.distributed.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            if _is_of_this_round(own, rank_info, meeting):
                store.set_timeout(TIMEOUT)
                return own
            reason = f"{rank_info.address} still serves pods that end"
        except (RuntimeError, OSError) as error:
            if serves:
                raise unreachable(f"port {rank_info.port} cannot be served: {first_line(error)}") from error
            reason = first_line(error)
        if meeting.stopped():
            raise Interrupted(0, 0, 0)
        child_ranks.require_alive()
        if time.monotonic() > deadline:
            raise _missing(rank_info, f"does not reach {rank_info.address}:{rank_info.port} ({reason})", meeting)
        time.sleep(_SECONDS_BETWEEN_CONNECTS)


def _connected(rank_info: RankInfo, *, serves: bool) -> Any:
    """Serve or connect to the store.

    Raises RuntimeError, or OSError if nothing listens there yet.
    """
    is_remote = rank_info.several_nodes and not serves
    if is_remote:
        # PyTorch's own tries end after ten seconds and more, notice no signal, and log a page each.
        socket.create_connection((rank_info.address, rank_info.port), _SECONDS_TO_CONNECT.total_seconds()).close()
    return torch.distributed.TCPStore(
        rank_info.address,
        rank_info.port,
        rank_info.size,
        serves,
        timeout=_SECONDS_TO_CONNECT if is_remote else TIMEOUT,
        wait_for_workers=False,
    )


def _is_of_this_round(store: Any, rank_info: RankInfo, meeting: Meeting) -> bool:
    """Whether no earlier pod of this rank, with peers about to end, has joined."""
    if not meeting.incarnation:
        return True
    joined_as = _answer(lambda: store.compare_set(f"rank-{rank_info.rank}", "", meeting.incarnation))
    return bool(joined_as.decode() == meeting.incarnation)


def _wait_for_all(store: Any, rank_info: RankInfo, endings: _Endings, meeting: Meeting) -> None:
    deadline = time.monotonic() + meeting.seconds
    _answer(lambda: store.add(_JOINED, 1))
    while (joined_ranks := _answer(lambda: store.add(_JOINED, 0))) < rank_info.size:
        endings.require_none()
        if meeting.stopped():
            _leave(store, rank_info)
            raise Interrupted(0, 0, 0)
        if time.monotonic() > deadline:
            raise _missing(rank_info, f"has met {joined_ranks} of {rank_info.size} processes", meeting)
        meeting.report(f"waiting for the other nodes: {joined_ranks} of {rank_info.size} processes have started")
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _leave(store: Any, rank_info: RankInfo) -> None:
    """Free the joined ranks from this one, which stops. They meet its successor."""
    message = "stopped before all nodes had started"
    text = json.dumps({"rank": None, "code": int(ExitCode.INTERRUPTED), "message": message})
    _answer(lambda: store.compare_set(_FAILURE, "", text))
    if rank_info.main:
        # The store ends with this process.
        time.sleep(_SECONDS_TO_TELL)


def _missing(rank_info: RankInfo, found: str, meeting: Meeting) -> StepFailure:
    text = f"rank {rank_info.rank} {found} within {meeting.seconds:.0f} seconds"
    if not rank_info.several_nodes:
        return unreachable(f"{text}; the step is retried")
    return StepFailure(
        ExitCode.PEERS_MISSING,
        f"{text}: not all nodes of the job have started. The GPUs are freed, and all nodes try again after a pause; "
        "see why the other train pods wait with `kubectl describe pod`, or lower spec.resources.nodes in a new job",
    )
