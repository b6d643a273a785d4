"""Starts the child ranks of a run with several GPUs in the same pod, and ensures that none outlives the main process.

On several nodes, each pod starts its ranks. torchrun may have started all ranks already, on one node or several. The
environment of this process shows that.
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

from qlora_api import contract
from qlora_api.contract import ExitCode
from qlora_api.spec.training import ResourcesSpec
from qlora_trainer.core.failures import Interrupted, bad_configuration, peer_lost, unreachable

_PARENT = "QLORA_STARTED_BY"
_LOOPBACK = "127.0.0.1"
_SECONDS_TO_END = 60.0
_PR_SET_PDEATHSIG = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process among all nodes and on its node, as torchrun counts."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    """Host of the store that all ranks share, or an empty string while unknown."""
    port: int = 0
    is_launched: bool = False
    """Whether torchrun or the pod's main process has started this and its siblings."""

    @property
    def has_several_nodes(self) -> bool:
        """Whether ranks of this run are in other pods."""
        return self.local_size < self.size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that writes."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], resources: ResourcesSpec | None = None) -> "RankInfo":
        """The rank that torchrun's variables name, or without them the first of this pod.

        Raises StepFailure (BAD_CONFIGURATION) for variables that contradict each other, or that several nodes lack.
        """
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            return cls._first_of_pod(environ, resources or ResourcesSpec())
        try:
            found = cls(
                rank=int(environ["RANK"]),
                size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", "0")),
                local_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
                address=environ.get("MASTER_ADDR", _LOOPBACK),
                port=int(environ.get("MASTER_PORT", str(contract.RENDEZVOUS_PORT))),
                is_launched=True,
            )
        except ValueError as error:
            raise bad_configuration(f"RANK, WORLD_SIZE and the like are set, but not to numbers ({error})") from error
        if not (0 <= found.rank < found.size and 0 <= found.local_rank < found.local_size <= found.size):
            raise bad_configuration(
                f"RANK {found.rank} of WORLD_SIZE {found.size} and LOCAL_RANK {found.local_rank} of LOCAL_WORLD_SIZE "
                f"{found.local_size} contradict each other: start the step with torchrun, or without these variables"
            )
        return found

    @classmethod
    def _first_of_pod(cls, environ: Mapping[str, str], resources: ResourcesSpec) -> "RankInfo":
        if resources.node_count == 1:
            return cls(size=resources.gpus, local_size=resources.gpus)
        node, rendezvous = environ.get(contract.ENV_NODE, ""), environ.get(contract.ENV_RENDEZVOUS, "")
        address, _, port = rendezvous.rpartition(":")
        if not (node.isdecimal() and int(node) < resources.node_count and address and port.isdecimal()):
            raise bad_configuration(
                f"spec.resources.nodes is {resources.node_count}, and this process does not know the other nodes "
                f"({contract.ENV_NODE} is {node!r}, {contract.ENV_RENDEZVOUS} is {rendezvous!r}): start it in a "
                "cluster, with torchrun, or without nodes"
            )
        return cls(
            rank=int(node) * resources.gpus,
            size=resources.gpu_count,
            local_size=resources.gpus,
            # Not every network lets a pod reach itself by the name that others use.
            address=address if int(node) else _LOOPBACK,
            port=int(port),
        )

    def environment(self) -> dict[str, str]:
        """The variables for `of` to make this value."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def number_in(environ: Mapping[str, str], variable: str) -> int:
    """The rank or node in a variable, or 0. `RankInfo.from_environment` checks ranks."""
    value = environ.get(variable, "")
    return int(value) if value.isdecimal() else 0


class ChildRanks:
    """The ranks that this process has started."""

    def __init__(self, rank_info: RankInfo, processes: Sequence["subprocess.Popen[bytes]"] = ()) -> None:
        self.rank_info = rank_info
        """This process's own rank, with the address of the shared store."""
        self._processes = processes

    def require_alive(self) -> None:
        """Raise StepFailure UNREACHABLE for an ended rank, PEER_LOST for a lost node."""
        for rank, process in enumerate(self._processes, start=self.rank_info.rank + 1):
            status = process.poll()
            if status:
                failure = peer_lost if status == ExitCode.PEER_LOST else unreachable
                raise failure(f"{self._ending(rank, status)}. The step is retried")

    def end(self, deadline: float, expected: ExitCode | None = None) -> None:
        """Wait until all have ended, and kill those that still run at `deadline` (a time of time.monotonic).

        Logs how each ended, as a warning if its status is not `expected`.
        """
        for rank, process in enumerate(self._processes, start=self.rank_info.rank + 1):
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            level = logging.INFO if expected is None or status == expected else logging.WARNING
            logger.log(level, self._ending(rank, status))

    def _ending(self, rank: int, status: int) -> str:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"rank {rank} of {self.rank_info.size} {how}; its log is records/train.rank-{rank}.log"


@contextmanager
def start_child_ranks(rank_info: RankInfo, command: Sequence[str]) -> Iterator[ChildRanks]:
    """Start this pod's other ranks with the same `command`, unless torchrun did, and reap them.

    They end by themselves, and are killed when the body fails: only this process writes, and it has the reason.
    """
    if rank_info.local_size == 1 or rank_info.is_launched:
        yield ChildRanks(rank_info)
        return
    if not command:
        raise bad_configuration("several GPUs need the command `train`, or torchrun")
    if not rank_info.has_several_nodes:
        with socket.socket() as listener:
            listener.bind((_LOOPBACK, 0))
            rank_info = replace(rank_info, address=_LOOPBACK, port=int(listener.getsockname()[1]))
        for interface in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            # A pod's own name may not resolve, and no other interface is needed.
            os.environ.setdefault(interface, "lo")
    processes: list[subprocess.Popen[bytes]] = []
    seconds, expected = 0.0, None
    child_ranks = ChildRanks(rank_info, processes)
    try:
        for local_rank in range(1, rank_info.local_size):
            child = replace(rank_info, rank=rank_info.rank + local_rank, local_rank=local_rank)
            environment = os.environ | child.environment() | {_PARENT: str(os.getpid())}
            null = subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=environment, stdin=null, stdout=null))
        yield child_ranks
        seconds, expected = _SECONDS_TO_END, ExitCode.DONE
    except Interrupted:
        seconds, expected = _SECONDS_TO_END, ExitCode.INTERRUPTED
        raise
    finally:
        child_ranks.end(time.monotonic() + seconds, expected)


def end_with_parent(environ: Mapping[str, str] = os.environ) -> None:
    """Let the kernel kill this process, if a child rank, when its parent has ended."""
    if _PARENT not in environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(environ[_PARENT]):
        os._exit(1)
