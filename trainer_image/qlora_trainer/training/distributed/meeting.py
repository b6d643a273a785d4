"""How the ranks of a run meet, watch each other, and end with the same exit code.

They share a store of names and texts, which torchrun's agent or the main process serves.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed

from qlora_api.contract import ExitCode
from qlora_api.printable import first_line
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import Interrupted, StepFailure, peer_lost, unreachable
from qlora_trainer.core.outcome import classify
from qlora_trainer.training.distributed import ranks
from qlora_trainer.training.distributed.device import require_gpu
from qlora_trainer.training.distributed.launch import ChildRanks, RankInfo
from qlora_trainer.training.distributed.nccl import end_with_the_others
from qlora_trainer.training.distributed.ranks import Ranks, ask_store, is_lost_connection

TO_CONNECT = timedelta(minutes=2)
"""How long a rank waits for the address of another one once all have met."""
GLOO_CONNECTS_FOR = 5
"""For how many times as long gloo then waits for that rank itself."""
_FAILURE = "failure"
_JOINED = "joined"
_SECONDS_BETWEEN_LOOKS = 0.1
_LOOKS = 50
# A node that does not answer is tried again after this time, so that a signal is noticed in between.
_SECONDS_TO_CONNECT = timedelta(seconds=5)
_SECONDS_BETWEEN_CONNECTS = 1.0
_SECONDS_TO_PUBLISH = 1.0
logger = logging.getLogger(__name__)


class _Endings:
    """Why ranks of this run have ended, as far as they could report it."""

    def __init__(self, store: torch.distributed.Store, child_ranks: ChildRanks) -> None:
        self._store, self._child_ranks, self._own = store, child_ranks, child_ranks.rank_info

    def publish(self, error: Exception) -> None:
        """Put this rank's failure into the shared store, unless it has another rank's."""
        ending = classify(error)
        try:
            _publish_end(self._store, self._own.rank, ending.exit_code, ending.message)
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
        lost = peer_lost if self._own.has_several_nodes else unreachable
        return lost(
            f"rank {self._own.rank} of {self._own.size} lost another process of this run "
            f"({first_line(error)}); the step is retried"
        )

    def require_none(self) -> None:
        """Raise the StepFailure of the first rank that failed, or of a killed child."""
        if ask_store(lambda: self._store.check([_FAILURE])):
            found = json.loads(ask_store(lambda: self._store.get(_FAILURE)))
            prefix = "" if found["rank"] in (self._own.rank, None) else f"rank {found['rank']}: "
            raise StepFailure(ExitCode(found["code"]), f"{prefix}{found['message']}")
        self._child_ranks.require_alive()


def _publish_end(store: torch.distributed.Store, rank: int | None, code: ExitCode, message: str) -> None:
    text = json.dumps({"rank": rank, "code": int(code), "message": message})
    ask_store(lambda: store.compare_set(_FAILURE, "", text))


@dataclass(frozen=True)
class Meeting:
    """How this rank meets the others."""

    seconds: float = ranks.TIMEOUT.total_seconds()
    """For how long it waits for them."""
    incarnation: str = ""
    """The UID of its pod, which must not join what a replaced one had joined, or an empty string."""
    stopped: Callable[[], bool] = lambda: False
    """Whether it has been asked to stop."""
    report: Callable[[str], None] = lambda _activity: None
    """Reports what it waits for."""


@contextmanager
def join_ranks(
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
    try:
        # An exchange may keep the first connection for half an hour.
        endings = _Endings(store.clone(), child_ranks)
    except torch.distributed.DistNetworkError as error:
        # The node that serves it may stop between the two.
        raise _Endings(store, child_ranks)(error) from error
    try:
        _wait_for_all(store, rank_info, endings, meeting)
        # It asks the store too, and would wait without end for one whose node stops now.
        ask_store(lambda: _connect_all(store, rank_info, device), GLOO_CONNECTS_FOR * TO_CONNECT.total_seconds())
        torch.distributed.set_timeout(ranks.TIMEOUT)
        with end_with_the_others(endings, endings.require_none) if device == "cuda" else nullcontext():
            yield Ranks(rank_info, store, sharding == "full", endings)
    except Interrupted:
        raise
    except Exception as error:
        if rank_info.has_several_nodes and is_lost_connection(error):
            if meeting.stopped() and not torch.distributed.is_initialized():
                # Node 0 has been stopped too, as when a queue suspends the job, and was the first to end.
                raise Interrupted(0, 0, 0) from error
            lost = endings(error)
            endings.publish(lost)
            raise lost from error
        endings.publish(error)
        raise
    torch.distributed.destroy_process_group()


def _connect_all(store: torch.distributed.Store, rank_info: RankInfo, device: Device) -> None:
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


def _store(rank_info: RankInfo, meeting: Meeting, child_ranks: ChildRanks) -> torch.distributed.Store:
    """The store that the ranks share, served by torchrun's agent or the main process."""
    serves = rank_info.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + meeting.seconds
    while True:
        try:
            store = _connect(rank_info, serves=serves)
            # torchrun may restart all ranks over the same store.
            own = torch.distributed.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            if _is_of_this_round(own, rank_info, meeting):
                store.set_timeout(ranks.TIMEOUT)
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


def _connect(rank_info: RankInfo, *, serves: bool) -> torch.distributed.Store:
    """Serve or connect to the store. Raises RuntimeError or OSError."""
    is_remote = rank_info.has_several_nodes and not serves
    if is_remote:
        # PyTorch's own tries end after ten seconds and more, notice no signal, and log a page each.
        socket.create_connection((rank_info.address, rank_info.port), _SECONDS_TO_CONNECT.total_seconds()).close()
    return torch.distributed.TCPStore(
        rank_info.address,
        rank_info.port,
        rank_info.size,
        serves,
        timeout=_SECONDS_TO_CONNECT if is_remote else ranks.TIMEOUT,
        wait_for_workers=False,
    )


def _is_of_this_round(store: torch.distributed.Store, rank_info: RankInfo, meeting: Meeting) -> bool:
    """Whether no earlier pod of this rank, with peers about to end, has joined."""
    if not meeting.incarnation:
        return True
    joined_as = ask_store(lambda: store.compare_set(f"rank-{rank_info.rank}", "", meeting.incarnation))
    return bool(joined_as.decode() == meeting.incarnation)


def _wait_for_all(store: torch.distributed.Store, rank_info: RankInfo, endings: _Endings, meeting: Meeting) -> None:
    deadline = time.monotonic() + meeting.seconds
    ask_store(lambda: store.add(_JOINED, 1))
    while (joined_ranks := ask_store(lambda: store.add(_JOINED, 0))) < rank_info.size:
        endings.require_none()
        if meeting.stopped():
            # Free the joined ranks from this one. They meet its successor.
            _publish_end(store, None, ExitCode.INTERRUPTED, "stopped before all nodes had started")
            if rank_info.is_main:
                # The store ends with this process.
                time.sleep(_SECONDS_TO_PUBLISH)
            raise Interrupted(0, 0, 0)
        if time.monotonic() > deadline:
            raise _missing(rank_info, f"has met {joined_ranks} of {rank_info.size} processes", meeting)
        meeting.report(f"waiting for the other nodes: {joined_ranks} of {rank_info.size} processes have started")
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _missing(rank_info: RankInfo, found: str, meeting: Meeting) -> StepFailure:
    text = f"rank {rank_info.rank} {found} within {meeting.seconds:.0f} seconds"
    if not rank_info.has_several_nodes:
        return unreachable(f"{text}; the step is retried")
    return StepFailure(
        ExitCode.PEERS_MISSING,
        f"{text}: not all nodes of the job have started. The GPUs are freed, and all nodes try again after a pause; "
        "see why the other train pods wait with `kubectl describe pod`, or lower spec.resources.nodes in a new job",
    )
