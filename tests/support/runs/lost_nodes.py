"""Two nodes that meet and exchange as in a train step; one is lost at some point. How does the other one end?

As a program it loads torch once and forks the nodes of the cases; a few run at the same time.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any, Literal, NamedTuple

from devcluster.addresses import free_port

_SLOW_S = 8.0
"""How late a slow node is: later than nodes may be that connect to one another."""
_HURRIED_S = 4.0
"""How long it takes for a loss to be noticed that only a timeout shows. Two busy cores may delay a node that long."""
_LONGEST_S = 600.0
_AT_A_TIME = 6

Point = Literal["waiting", "connecting", "start", "loading", "pass", "saving", "end", "over"]
How = Literal["killed", "killed behind a network", "killed as both stop", "silent", "slow", "stopped"]


class Case(NamedTuple):
    """The lost node, its point and its fault; or a slow node, which is no loss."""

    at: Point
    node: int
    how: How = "killed"


@dataclass(frozen=True)
class Ended:
    """How the other node has ended."""

    exit_code: int
    message: str


def endings(cases: Iterable[Case]) -> dict[Case, Ended]:
    """How the other node ends in each of the cases; a node that hangs is missing."""
    cases = tuple(cases)
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(cases)], stdout=subprocess.PIPE, check=True, text=True
    )
    found = dict(zip(cases, json.loads(done.stdout), strict=True))
    return {case: Ended(**ended) for case, ended in found.items() if ended is not None}


def _perform(case: Case, node: int, port: int, first: int | None) -> None:
    """The part of one node. `first`: process id of node 0, in node 1."""
    import torch.distributed

    from qlora_trainer.training.distributed import meeting as meetings
    from qlora_trainer.training.distributed import ranks as module
    from qlora_trainer.training.distributed.launch import ChildRanks, RankInfo
    from qlora_trainer.training.distributed.meeting import Meeting, join_ranks

    # A case that only a timeout detects must be short, and no other case may depend on a timeout.
    hurried = case.how == "silent" or case.at == "connecting"
    module.TIMEOUT = timedelta(seconds=_HURRIED_S if hurried else 30)
    module.SECONDS_TO_ANSWER = _HURRIED_S if hurried else 30.0
    meetings.TO_CONNECT = timedelta(seconds=_HURRIED_S if hurried else _SLOW_S - 1)
    meetings.GLOO_CONNECTS_FOR = 1

    def come(point: Point) -> None:
        if (point, node) != (case.at, case.node):
            return
        if case.how == "slow":
            time.sleep(_SLOW_S)
        else:
            os.kill(os.getpid(), signal.SIGSTOP if case.how == "silent" else signal.SIGKILL)

    init: Callable[..., None] = torch.distributed.init_process_group

    def connect(*arguments: Any, **settings: Any) -> None:
        come("connecting")
        init(*arguments, **settings)

    torch.distributed.init_process_group = connect
    both_wait = threading.Event()

    def report(activity: str) -> None:
        if "2 of 3" in activity:
            both_wait.set()
            if case.how != "stopped":
                come("waiting")

    def stopped() -> bool:
        if case.how == "stopped":
            return node == case.node and both_wait.is_set()
        return case.how == "killed as both stop" and node == 1 and _is_dead(first)

    if case.how == "killed behind a network" and node == 1:
        port = _network(port)
    # There is a third node, which never comes, where they wait.
    rank_info = RankInfo(rank=node, size=3 if case.at == "waiting" else 2, address="127.0.0.1", port=port)
    meeting = Meeting(seconds=60, incarnation="pod", stopped=stopped, report=report)
    with join_ranks(ChildRanks(rank_info), "cpu", "full", meeting) as ranks:
        come("start")
        ranks.broadcast_text("start", "")
        come("loading")
        ranks.copy_from_main([torch.nn.Parameter(torch.zeros(8))])
        ranks.sum(torch.zeros(()))
        come("pass")
        # As FSDP, which has no part in our exchanges.
        torch.distributed.all_gather_into_tensor(torch.zeros(16), torch.ones(8))
        come("saving")
        ranks.gather(0)
        come("end")
        ranks.broadcast_text("trained", "")
        ranks.wait()
    come("over")


def _is_dead(process: int | None) -> bool:
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(") ")[2][0] in "ZX"


def _network(port: int) -> int:
    """Return a port that forwards to `port`, and delays its end by a round trip."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, *, ends: bool) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass  # that process has ended
        if ends:
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            here, _ = listener.accept()
            try:
                there = socket.create_connection(("127.0.0.1", port))
            except OSError:
                here.close()
                continue
            threading.Thread(target=pump, args=(here, there), kwargs={"ends": False}, daemon=True).start()
            threading.Thread(target=pump, args=(there, here), kwargs={"ends": True}, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def _forked(case: Case, node: int, port: int, first: int | None) -> tuple[int, int]:
    """The process id of that node, and the file with its ending."""
    from qlora_trainer.core.outcome import classify
    from qlora_trainer.training.distributed.launch import end_with_parent

    parent = str(os.getpid())
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    end_with_parent({"QLORA_STARTED_BY": parent})
    ended = Ended(0, "")
    try:
        _perform(case, node, port, first)
    except Exception as error:  # noqa: BLE001 - however it ends, the test gets it
        ending = classify(error)
        ended = Ended(int(ending.exit_code), ending.message)
    os.write(write, json.dumps(asdict(ended)).encode())
    os._exit(0)


def _end(processes: Iterable[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _main(cases: list[Case]) -> None:
    # Loaded here, torch is shared by all processes.
    import_module("qlora_trainer.training.distributed.meeting")
    found: list[object] = [None] * len(cases)
    to_begin = list(enumerate(cases))
    # By the file with the other node's ending.
    running: dict[int, tuple[int, list[int]]] = {}
    deadline = time.monotonic() + _LONGEST_S
    try:
        while to_begin or running:
            while to_begin and len(running) < _AT_A_TIME:
                index, case = to_begin.pop(0)
                port = free_port()
                first, said_by_first = _forked(case, 0, port, None)
                second, said_by_second = _forked(case, 1, port, first)
                running[said_by_second if case.node == 0 else said_by_first] = index, [first, second]
            ready, _, _ = select.select(running, [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for said in ready:
                index, processes = running.pop(said)
                found[index] = json.loads(os.read(said, 65536) or "null")
                _end(processes)
    finally:
        for _, processes in running.values():
            _end(processes)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main([Case(*case) for case in json.loads(sys.argv[1])])
