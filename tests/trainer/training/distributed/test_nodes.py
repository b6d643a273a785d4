"""A job of several nodes: the result matches one node's, and none outlives the others."""

import os
import signal
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from devcluster.addresses import free_port
from qlora_api.contract import ENV_NODE, ENV_NODE_WAIT, ENV_RENDEZVOUS, ExitCode
from qlora_api.spec.training import ResourcesSpec
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure, peer_lost
from qlora_trainer.training.distributed import meeting
from qlora_trainer.training.distributed.launch import ChildRanks, RankInfo
from qlora_trainer.training.distributed.meeting import Meeting, join_ranks
from qlora_trainer.training.distributed.ranks import Ranks, is_lost_connection
from tests.support.commands.command import Files
from tests.support.failures import failing
from tests.support.manifests import merged
from tests.support.models.tiny import POD_UID
from tests.support.ranks import EXACT, TWO, Pods, other, runs, succeeded, until, until_waiting, waiting_at, workspace
from tests.support.runs.lost_nodes import Case, Ended, endings
from tests.support.training import adapter_bytes, history

NODES: dict[str, Any] = {"resources": {"nodes": 2}}
SHORT: dict[str, Any] = {"training": {"maxSteps": 8, "saveEverySteps": 5, "evalEverySteps": 50}}


def spec_of(*parts: dict[str, Any]) -> dict[str, Any]:
    """The parts as one, the later ones winning."""
    return reduce(merged, parts)


def ran(pods: Pods, name: str = POD_UID, **environment: str) -> None:
    """Both pods have ended well."""
    second, first = pods.start(1, name, **environment), pods.start(0, name, **environment)
    assert first.done().exit_code == 0
    assert second.done().exit_code == 0


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path) -> tuple[Pods, StepContext]:
    """A job of a few steps on two nodes."""
    files, context = workspace(tmp_path / "job", tiny_llama, merged(NODES, SHORT))
    return Pods.of(files), context


def test_two_pods_train_the_adapter_of_two_processes_in_one(
    tmp_path: Path, tiny_llama: Path, together: tuple[Files, StepContext]
) -> None:
    files, apart = workspace(tmp_path / "job", tiny_llama, merged(NODES, EXACT), packed=False)
    pods = Pods.of(files)

    # Node 1 comes first, and waits.
    second = pods.start(1)
    first = pods.start(0)
    one, two = first.done(), second.done()

    succeeded(one)
    succeeded(two)
    assert adapter_bytes(apart) == adapter_bytes(together[1])
    assert history(apart) == history(together[1])
    # Node 0 reports; the other one leaves only its ending.
    assert len(one.records) > 1
    assert len(two.records) == 1


@pytest.mark.slow
def test_two_pods_with_two_processes_each_train_the_adapter_of_four_in_one(tmp_path: Path, tiny_llama: Path) -> None:
    settings = {"dataset": {"eval": None}, "training": {"maxSteps": 3}}
    alone, whole = workspace(tmp_path / "whole", tiny_llama, spec_of(EXACT, settings, {"resources": {"gpus": 4}}))
    files, apart = workspace(
        tmp_path / "job", tiny_llama, spec_of(EXACT, settings, {"resources": {"gpus": 2, "nodes": 2}})
    )
    succeeded(alone.run("train", OMP_NUM_THREADS="4"))

    ran(Pods.of(files), OMP_NUM_THREADS="2")

    assert adapter_bytes(apart) == adapter_bytes(whole)


def test_the_pod_whose_peer_is_killed_ends_by_itself(tmp_path: Path, job: tuple[Pods, StepContext]) -> None:
    pods, _ = job
    first, second = (pods.start(node, **waiting_at(tmp_path / "code", 3, 1)) for node in range(2))
    said = until(first.process, 3)
    second.process.kill()

    done = first.done(said)

    assert done.exit_code == ExitCode.PEER_LOST, done.stdout + done.stderr
    assert "lost another process of this run" in done.result.message


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_pod_whose_peer_is_killed_ends_by_itself_and_the_resume_is_exact(
    tmp_path: Path, tiny_llama: Path, job: tuple[Pods, StepContext], killed: int
) -> None:
    pods, context = job
    started = [pods.start(node, **waiting_at(tmp_path / "code", 7, killed)) for node in range(2)]
    said = until(started[0].process, 7)
    started[killed].process.kill()

    done = started[1 - killed].done(said if killed == 1 else "")

    assert done.exit_code == ExitCode.PEER_LOST, done.stdout + done.stderr
    assert "lost another process of this run" in done.result.message
    ran(pods, "the next attempt")
    files, undisturbed = workspace(tmp_path / "whole", tiny_llama, merged(TWO, SHORT))
    succeeded(files.run("train"))
    assert adapter_bytes(context) == adapter_bytes(undisturbed)


@pytest.mark.parametrize("node", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_pod_whose_peers_never_come_reports_it(tmp_path: Path, tiny_llama: Path, node: int) -> None:
    files, _ = workspace(tmp_path / "job", tiny_llama, NODES)

    done = Pods.of(files).start(node, **{ENV_NODE_WAIT: "1"}).done()

    assert done.exit_code == ExitCode.PEERS_MISSING, done.stdout + done.stderr
    assert "not all nodes of the job have started" in done.result.message
    assert "spec.resources.nodes" in done.result.message


def test_sigterm_while_it_waits_ends_a_pod_as_interrupted(job: tuple[Pods, StepContext]) -> None:
    pods, _ = job
    first = pods.start(0)
    assert first.process.stdout is not None
    said = first.process.stdout.readline()
    assert "waiting for the other nodes" in said
    first.process.terminate()

    assert first.done(said).exit_code == ExitCode.INTERRUPTED


def test_a_pod_does_not_join_those_that_its_predecessor_had_joined() -> None:
    port = free_port()
    served = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    torch.distributed.PrefixStore("attempt-0", served).set("rank-1", "the pod before")
    rank_info = RankInfo(rank=1, size=2, address="127.0.0.1", port=port)

    with (
        pytest.raises(StepFailure, match="still serves pods that end") as caught,
        join_ranks(ChildRanks(rank_info), "cpu", "none", Meeting(seconds=0, incarnation="this pod")),
    ):
        pytest.fail("it has joined")
    assert caught.value.exit_code is ExitCode.PEERS_MISSING


@pytest.mark.slow
def test_a_replacement_pod_waits_for_new_peers(tmp_path: Path, job: tuple[Pods, StepContext]) -> None:
    """A resumed Job may have its second pod before the old first one has ended."""
    pods, _ = job
    first, second = (pods.start(node, "old", **waiting_at(tmp_path / "code", 2, 1)) for node in range(2))
    until(first.process, 2, "old")
    until_waiting(tmp_path / "code", 1)
    successor = pods.start(1, "new")
    os.kill(second.process.pid, signal.SIGTERM)
    assert second.done().exit_code == ExitCode.INTERRUPTED
    first.process.communicate()
    assert first.process.returncode == ExitCode.INTERRUPTED

    assert pods.start(0, "new").done().exit_code == 0
    assert successor.done().exit_code == 0


@pytest.mark.slow
def test_a_killed_process_of_a_pod_is_that_pods_failure_and_ends_both(tmp_path: Path, tiny_llama: Path) -> None:
    files, _ = workspace(tmp_path / "job", tiny_llama, merged(SHORT, {"resources": {"gpus": 2, "nodes": 2}}))
    pods = Pods.of(files)
    # The second process of the second pod.
    first, second = (pods.start(node, **waiting_at(tmp_path / "code", 3, 3)) for node in range(2))
    said = until(first.process, 3)
    child = other(second.process)
    os.kill(child, signal.SIGKILL)

    ended = [first.done(said), second.done()]

    assert [done.exit_code for done in ended] == [ExitCode.UNREACHABLE] * 2
    assert "rank 3 of 4 was killed by SIGKILL" in ended[0].result.message
    assert not runs(child)


LOST = [
    Case("waiting", 0),
    Case("waiting", 0, "killed behind a network"),
    Case("connecting", 0),
    Case("connecting", 1),
    Case("start", 0),
    Case("loading", 1),
    Case("pass", 0),
    Case("pass", 1),
    Case("saving", 0),
    Case("end", 1),
    Case("end", 0, "killed behind a network"),
    Case("waiting", 0, "silent"),
    Case("connecting", 0, "silent"),
    Case("start", 0, "silent"),
    Case("loading", 1, "silent"),
    Case("pass", 0, "silent"),
    Case("end", 0, "silent"),
]
STOPPED = [Case("waiting", 0, "stopped"), Case("waiting", 0, "killed as both stop")]
UNHARMED = [Case("over", 0), Case("over", 1), Case("saving", 0, "slow"), Case("end", 0, "slow")]


@pytest.fixture(scope="module")
def ended() -> dict[Case, Ended]:
    """How the other of two nodes ends in each case."""
    return endings([*LOST, *STOPPED, *UNHARMED])


def test_a_node_that_falls_silent_between_two_connections_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def clone(self) -> None:
            raise torch.distributed.DistNetworkError("The client socket has timed out after 4000ms")

        def check(self, _keys: list[str]) -> None:
            self.clone()

    monkeypatch.setattr(meeting, "_store", lambda *_: Silent())
    with failing(ExitCode.PEER_LOST, match=r"lost another process of this run \(The client socket"):
        join_ranks(ChildRanks(RankInfo(1, 2)), "cpu", "none").__enter__()


@pytest.mark.parametrize("case", LOST, ids=lambda case: "-".join(map(str, case)))
def test_a_node_lost_at_any_point_ends_the_other_as_lost_peer(ended: dict[Case, Ended], case: Case) -> None:
    assert case in ended, "it hangs"
    assert ended[case].exit_code == ExitCode.PEER_LOST, ended[case].message
    assert "lost another process of this run" in ended[case].message


@pytest.mark.parametrize("case", STOPPED, ids=lambda case: case.how)
def test_pods_that_are_stopped_while_they_wait_are_all_interrupted(ended: dict[Case, Ended], case: Case) -> None:
    """If one had lost another, their Job would fail, and no queue could resume it."""
    assert case in ended, "it hangs"
    assert ended[case].exit_code == ExitCode.INTERRUPTED, ended[case].message


@pytest.mark.parametrize("case", UNHARMED, ids=lambda case: "-".join(map(str, case)))
def test_a_node_that_is_slow_or_is_lost_once_all_have_finished_harms_none(ended: dict[Case, Ended], case: Case) -> None:
    assert case in ended, "it hangs"
    assert ended[case].exit_code == 0, ended[case].message


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        # As NCCL 2.30 and PyTorch 2.15 word them, in a pass of a sharded base.
        ("NCCL error in: x.cpp:1, ncclRemoteError: A call failed possibly due to a network error", True),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=_ALLGATHER_BASE)", True),
        ("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:4711", True),
        ("NCCL error in: x.cpp:1, ncclSystemError: System call (e.g. socket, malloc) or external library call", False),
        ("[enforce fail at /gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: eth7", False),
        ("NCCL error in: x.cpp:1, ncclUnhandledCudaError: Connection reset by Cuda failure 'out of memory'", False),
        ("size mismatch", False),
    ],
)
def test_only_errors_of_another_node_mean_a_lost_one(said: str, lost: bool) -> None:
    assert is_lost_connection(RuntimeError(said)) == lost


def test_a_local_error_in_an_exchange_is_not_taken_for_a_lost_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(torch.distributed, "all_gather", broken)

    with pytest.raises(RuntimeError, match="uncorrectable ECC error"):
        Ranks(RankInfo(size=2), lost=lambda error: peer_lost(str(error))).wait()


def test_a_child_that_has_lost_another_node_ends_its_pod_the_same_way() -> None:
    """It cannot report it in the store, whose loss may be the cause."""
    child = subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({ExitCode.PEER_LOST:d})"])
    child.wait()

    with failing(ExitCode.PEER_LOST, match="rank 3 of 4 ended with status 201"):
        ChildRanks(RankInfo(rank=2, size=4, local_size=2), [child]).require_alive()


def test_the_processes_of_node_0_reach_the_store_without_a_name() -> None:
    environment = {ENV_NODE: "0", ENV_RENDEZVOUS: "node-0.qlora-x:29500"}

    found = RankInfo.from_environment(environment, ResourcesSpec(nodes=2, gpus=4))

    assert found.environment()["MASTER_ADDR"] == "127.0.0.1"
    assert found.port == 29500


def test_a_process_without_the_other_nodes_addresses_is_rejected() -> None:
    with failing(ExitCode.BAD_CONFIGURATION, match=r"spec\.resources\.nodes is 2"):
        RankInfo.from_environment({ENV_NODE: "0"}, ResourcesSpec(nodes=2))

    found = RankInfo.from_environment({ENV_NODE: "1", ENV_RENDEZVOUS: "node-0:29500"}, ResourcesSpec(nodes=2, gpus=4))
    assert found == RankInfo(rank=4, size=8, local_size=4, address="node-0", port=29500)
