"""A job of several nodes, whose pods meet at node 0: they compute what one node does, and none outlives the others."""

import os
import signal
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from devcluster.addresses import free_port
from qlora_api.contract import ENV_NODE, ENV_NODE_WAIT, ENV_RENDEZVOUS, ExitCode
from qlora_api.training import ResourcesSpec
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.training.launch import ChildRanks, RankInfo
from qlora_trainer.training.ranks import Meeting, joined
from tests.support.command import Files
from tests.support.ranks import EXACT, SHARDED, TWO, Pods, other, runs, second_gpu, succeeded, until, workspace
from tests.support.tiny import POD_UID, merged
from tests.support.training import adapter_bytes, history

NODES: dict[str, Any] = {"resources": {"nodes": 2}}
MANY_STEPS: dict[str, Any] = {"training": {"maxSteps": 24, "saveEverySteps": 5, "evalEverySteps": 50}}


def spec_of(*parts: dict[str, Any]) -> dict[str, Any]:
    """The parts as one, the later ones winning."""
    return reduce(merged, parts)


def ran(pods: Pods, name: str = POD_UID, **environment: str) -> None:
    """Both pods have ended well."""
    second, first = pods.start(1, name, **environment), pods.start(0, name, **environment)
    assert first.done().exit_code == 0
    assert second.done().exit_code == 0


@pytest.fixture
def long_job(tmp_path: Path, tiny_llama: Path) -> tuple[Pods, StepContext]:
    """A job of many steps on two nodes, which can be disturbed in their midst."""
    files, context = workspace(tmp_path / "job", tiny_llama, merged(NODES, MANY_STEPS))
    return Pods.of(files), context


def test_two_pods_train_the_adapter_of_two_processes_in_one(
    tmp_path: Path, tiny_llama: Path, together: tuple[Files, StepContext]
) -> None:
    files, apart = workspace(tmp_path / "job", tiny_llama, merged(NODES, EXACT), packed=False)
    pods = Pods.of(files)

    # Node 1 is there first, and waits.
    second = pods.start(1)
    first = pods.start(0)
    one, two = first.done(), second.done()

    succeeded(one)
    succeeded(two)
    assert adapter_bytes(apart) == adapter_bytes(together[1])
    assert history(apart) == history(together[1])
    # Node 0 reports; the other says only how it has ended.
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


def test_the_pod_whose_peer_is_killed_ends_by_itself(long_job: tuple[Pods, StepContext]) -> None:
    pods, _ = long_job
    first, second = (pods.start(node) for node in range(2))
    said = until(first.process, 3)
    second.process.kill()

    done = first.done(said)

    assert done.exit_code == ExitCode.PEER_LOST, done.stdout + done.stderr
    assert "lost another process of this run" in done.result.message


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_pod_whose_peer_is_killed_ends_by_itself_and_the_resume_is_exact(
    tmp_path: Path, tiny_llama: Path, long_job: tuple[Pods, StepContext], killed: int
) -> None:
    pods, context = long_job
    started = [pods.start(node) for node in range(2)]
    said = until(started[0].process, 7)
    started[killed].process.kill()

    done = started[1 - killed].done(said if killed == 1 else "")

    assert done.exit_code == ExitCode.PEER_LOST, done.stdout + done.stderr
    assert "lost another process of this run" in done.result.message
    ran(pods, "the next attempt")
    files, undisturbed = workspace(tmp_path / "whole", tiny_llama, merged(TWO, MANY_STEPS))
    succeeded(files.run("train"))
    assert adapter_bytes(context) == adapter_bytes(undisturbed)


@pytest.mark.slow
def test_the_pod_whose_peer_is_killed_ends_by_itself_in_the_midst_of_a_sharded_pass(
    tmp_path: Path, tiny_llama: Path
) -> None:
    files, _ = workspace(tmp_path / "job", tiny_llama, spec_of(SHARDED, MANY_STEPS, {"resources": {"gpus": 1}}, NODES))
    pods = Pods.of(files)
    started = [pods.start(node) for node in range(2)]
    said = until(started[0].process, 5)
    started[1].process.kill()

    done = started[0].done(said)

    assert done.exit_code == ExitCode.PEER_LOST, done.stdout + done.stderr


# That one of two processes is asked to stop is in test_rank_endings.py.
@pytest.mark.slow
def test_sigterm_on_one_pod_saves_a_checkpoint_and_ends_both(long_job: tuple[Pods, StepContext]) -> None:
    pods, _ = long_job
    first, second = (pods.start(node) for node in range(2))
    said = until(first.process, 5)
    second.process.terminate()

    ended = [first.done(said), second.done()]

    assert [done.exit_code for done in ended] == [ExitCode.INTERRUPTED] * 2, ended[0].stderr
    assert f"the checkpoint of step {ended[0].result.training_step} is saved" in ended[0].result.message


# That one of two processes fails is in test_rank_endings.py.
@pytest.mark.slow
def test_the_failure_of_one_pod_is_what_both_report(tmp_path: Path, tiny_llama: Path) -> None:
    files, _ = workspace(tmp_path / "job", tiny_llama, NODES)
    pods = Pods.of(files)
    full = second_gpu(tmp_path / "card", 0)

    first = pods.start(0)
    second = pods.start(1, **full)
    ended = [first.done(), second.done()]

    assert [done.exit_code for done in ended] == [ExitCode.GPU_OUT_OF_MEMORY] * 2, ended[0].stderr
    assert "rank 1: the GPU is out of memory" in ended[0].result.message


@pytest.mark.parametrize("node", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_pod_that_waits_for_the_others_in_vain_says_so(tmp_path: Path, tiny_llama: Path, node: int) -> None:
    files, _ = workspace(tmp_path / "job", tiny_llama, NODES)

    done = Pods.of(files).start(node, **{ENV_NODE_WAIT: "1"}).done()

    assert done.exit_code == ExitCode.PEERS_MISSING, done.stdout + done.stderr
    assert "not all nodes of the job have started" in done.result.message
    assert "spec.resources.nodes" in done.result.message


def test_sigterm_while_it_waits_ends_a_pod_as_interrupted(long_job: tuple[Pods, StepContext]) -> None:
    pods, _ = long_job
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
        joined(ChildRanks(rank_info), "cpu", "none", Meeting(seconds=0, incarnation="this pod")),
    ):
        pytest.fail("it has joined")
    assert caught.value.exit_code is ExitCode.PEERS_MISSING


@pytest.mark.slow
def test_a_pod_that_replaces_another_waits_for_peers_of_its_own(long_job: tuple[Pods, StepContext]) -> None:
    """A resumed Job may have its second pod before the old first one has ended."""
    pods, _ = long_job
    first, second = (pods.start(node, "old") for node in range(2))
    until_old = first.process.stdout
    assert until_old is not None
    while "training" not in until_old.readline():
        pass
    successor = pods.start(1, "new")
    os.kill(second.process.pid, signal.SIGTERM)
    assert second.done().exit_code == ExitCode.INTERRUPTED
    first.process.communicate()
    assert first.process.returncode == ExitCode.INTERRUPTED

    assert pods.start(0, "new").done().exit_code == 0
    assert successor.done().exit_code == 0


@pytest.mark.slow
def test_a_killed_process_of_a_pod_is_that_pods_failure_and_ends_both(tmp_path: Path, tiny_llama: Path) -> None:
    files, _ = workspace(tmp_path / "job", tiny_llama, merged(MANY_STEPS, {"resources": {"gpus": 2, "nodes": 2}}))
    pods = Pods.of(files)
    first, second = (pods.start(node) for node in range(2))
    said = until(first.process, 3)
    child = other(second.process)
    os.kill(child, signal.SIGKILL)

    ended = [first.done(said), second.done()]

    assert [done.exit_code for done in ended] == [ExitCode.UNREACHABLE] * 2
    assert "rank 3 of 4 was killed by SIGKILL" in ended[0].result.message
    assert not runs(child)


def test_a_process_that_does_not_know_the_other_nodes_is_rejected() -> None:
    with pytest.raises(StepFailure, match=r"spec\.resources\.nodes is 2") as caught:
        RankInfo.of({ENV_NODE: "0"}, ResourcesSpec(nodes=2))
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION

    found = RankInfo.of({ENV_NODE: "1", ENV_RENDEZVOUS: "node-0:29500"}, ResourcesSpec(nodes=2, gpus=4))
    assert found == RankInfo(rank=4, size=8, local_size=4, address="node-0", port=29500)
