"""Starts the other processes of a run with several GPUs in the same pod, and sees that none outlives it.

What started this process may have done that already: torchrun, on one node or several. Then its environment says so.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import Interrupted, bad_configuration, unreachable

_PARENT = "QLORA_STARTED_BY"
_LOOPBACK = "127.0.0.1"
_SECONDS_TO_END = 60.0
_PR_SET_PDEATHSIG = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankInfo:
    """Which of a run's processes this is, counted as torchrun counts: over all nodes, and on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    """Host and port of the processes' common store; empty while it is not known."""
    port: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes."""
        return self.rank == 0

    @classmethod
    def of(cls, environ: Mapping[str, str], gpus: int = 1) -> "RankInfo":
        """The place that torchrun's variables name; without them, that of the first of `gpus` processes in this pod.

        Raises StepFailure (BAD_CONFIGURATION) for variables that contradict each other.
        """
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            return cls(size=gpus, local_size=gpus)
        try:
            place = cls(
                rank=int(environ["RANK"]),
                size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", "0")),
                local_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
                address=environ.get("MASTER_ADDR", _LOOPBACK),
                port=int(environ.get("MASTER_PORT", "29500")),
            )
        except ValueError as error:
            raise bad_configuration(f"RANK, WORLD_SIZE and the like are set, but not to numbers ({error})") from error
        if not (0 <= place.rank < place.size and 0 <= place.local_rank < place.local_size <= place.size):
            raise bad_configuration(
                f"RANK {place.rank} of WORLD_SIZE {place.size} and LOCAL_RANK {place.local_rank} of LOCAL_WORLD_SIZE "
                f"{place.local_size} contradict each other: start the step with torchrun, or without these variables"
            )
        return place

    def environment(self) -> dict[str, str]:
        """The variables from which `of` makes this place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def named_rank(environ: Mapping[str, str]) -> int:
    """The rank that the environment names, 0 without one; whether it makes sense is for `Place.of` to say."""
    rank = environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


class ChildRanks:
    """The processes that this one has started, one a rank."""

    def __init__(self, place: RankInfo, processes: Sequence["subprocess.Popen[bytes]"] = ()) -> None:
        self.place = place
        """This process's own place, now with the address of the common store."""
        self._processes = processes

    def require_alive(self) -> None:
        """Raise StepFailure (UNREACHABLE: worth another attempt) if one has been killed or has crashed."""
        for rank, process in enumerate(self._processes, start=1):
            status = process.poll()
            if status:
                raise unreachable(f"{self._ending(rank, status)}. The step is tried again")

    def end(self, deadline: float, expected: ExitCode | None = None) -> None:
        """Wait until all have ended; kill those that still run at `deadline` (a time of time.monotonic).

        How each ended is logged, as a warning where it is not with the `expected` status. Nothing is decided from it:
        the adapter or the checkpoint is written by then, or this process has a failure of its own to report.
        """
        for rank, process in enumerate(self._processes, start=1):
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            level = logging.INFO if expected is None or status == expected else logging.WARNING
            logger.log(level, self._ending(rank, status))

    def _ending(self, rank: int, status: int) -> str:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"rank {rank} of {self.place.size} {how}; its log is records/train.rank-{rank}.log"


@contextmanager
def started_others(place: RankInfo, command: Sequence[str]) -> Iterator[ChildRanks]:
    """Start the other ranks with the same `command` (none, if torchrun did or there is one process), and reap them.

    When all end alike, finished or asked to stop, they end by themselves. When the body fails they are killed: only
    this process writes, and it has the reason.
    """
    if place.size == 1 or place.address:
        yield ChildRanks(place)
        return
    if not command:
        raise bad_configuration("several GPUs need the command `train`, or torchrun")
    place = replace(place, address=_LOOPBACK, port=_free_port())
    for interface in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # A pod's own name need not resolve, and no other interface is needed.
        os.environ.setdefault(interface, "lo")
    processes: list[subprocess.Popen[bytes]] = []
    others, seconds = ChildRanks(place, processes), 0.0
    expected: ExitCode | None = None
    try:
        for rank in range(1, place.size):
            environment = replace(place, rank=rank, local_rank=rank).environment() | {_PARENT: str(os.getpid())}
            processes.append(
                subprocess.Popen(
                    command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                )
            )
        yield others
        seconds, expected = _SECONDS_TO_END, ExitCode.DONE
    except Interrupted:
        seconds, expected = _SECONDS_TO_END, ExitCode.INTERRUPTED
        raise
    finally:
        others.end(time.monotonic() + seconds, expected)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        return int(listener.getsockname()[1])


def end_with_parent(environ: Mapping[str, str] = os.environ) -> None:
    """Let the kernel kill this process when the one that started it as a rank has ended, however that happens."""
    if _PARENT not in environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(environ[_PARENT]):
        os._exit(1)
