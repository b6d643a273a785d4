"""Several processes that train one adapter: what they compute together, and how they end together."""

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_api.contract import ExitCode, ProgressRecord, ResultRecord, decode_record
from qlora_trainer.distributed import Ranks
from qlora_trainer.failures import StepFailure, unreachable
from qlora_trainer.launch import Place
from qlora_trainer.records import TrainRecord, read_completion
from qlora_trainer.step import StepContext
from tests.trainer.command import Done, Files
from tests.trainer.tiny import JOB_UID, POD_UID, merged
from tests.trainer.training import adapter_bytes, history, prepared

TWO: dict[str, Any] = {"resources": {"gpus": 2}}
LONG = merged(TWO, {"training": {"maxSteps": 60, "saveEverySteps": 5, "evalEverySteps": 50}})
SHARDED = merged(TWO, {"training": {"sharding": "full"}})
# Five micro batches a step do not divide by two, and the last step of an epoch has fewer.
EXACT = {"lora": {"dropout": 0.0}, "training": {"gradientAccumulationSteps": 5}}

Make = Callable[..., tuple[Files, StepContext]]


def workspace(root: Path, model: Path, spec: dict[str, Any], **settings: Any) -> tuple[Files, StepContext]:
    """A workspace in which prepare is done, for the command line; `spec` changes the job of six steps."""
    context = prepared(root / "workspace", model, spec, **settings)
    return Files(root, model.parent, context.spec.dump()), context


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path) -> Make:
    """Makes workspaces by their names."""
    return lambda name, spec, **settings: workspace(tmp_path / name, tiny_llama, spec, **settings)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Files, StepContext]:
    """What two processes have trained. Do not change it: copy it."""
    root = tmp_path_factory.mktemp("together") / "job"
    files, context = workspace(root, tiny_llama, merged(EXACT, TWO), packed=False)
    succeeded(files.run("train"))
    return files, context


def succeeded(done: Done) -> None:
    assert done.exit_code == 0, done.stdout + done.stderr
    assert done.result.outcome == "succeeded"


def started(files: Files, step: int) -> "tuple[subprocess.Popen[str], str]":
    """The main process as soon as it says that `step` steps are done; and what it has said."""
    process = files.start("train")
    return process, until(process, step)


def until(process: "subprocess.Popen[str]", step: int) -> str:
    """What the process says until `step` steps are done."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        record = decode_record(line, job_uid=JOB_UID, pod_uid=POD_UID)
        if isinstance(record, ProgressRecord) and record.training_step >= step:
            return said
    raise AssertionError(f"it ended before step {step}: {said}")


def other(process: "subprocess.Popen[str]") -> int:
    """Process id of the second rank, which the main process has started."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_two_processes_compute_what_one_does(make: Make, together: tuple[Files, StepContext]) -> None:
    (alone, one), (_, two) = make("one", EXACT, packed=False), together
    succeeded(alone.run("train"))

    expected, found = history(one), history(two)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for name in ("loss", "evalLoss", "gradNorm"):
        values = [line[name] for line in expected if name in line]
        assert [line[name] for line in found if name in line] == pytest.approx(values, rel=1e-4)
    ours, theirs = (load_file(context.workspace.trained / "adapter_model.safetensors") for context in (two, one))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm()
    record = read_completion(two.workspace.completion("train"), TrainRecord)
    assert record is not None
    assert record.ranks == 2


def test_torchrun_starts_the_processes_too(make: Make, together: tuple[Files, StepContext]) -> None:
    (files, by_torchrun), (_, by_itself) = make("torchrun", EXACT, packed=False), together
    prefix = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")

    succeeded(files.run("train", prefix, OMP_NUM_THREADS="2"))

    assert adapter_bytes(by_torchrun) == adapter_bytes(by_itself)
    assert history(by_torchrun) == history(by_itself)


@pytest.fixture
def two_nodes() -> list[tuple[str, ...]]:
    """What starts the step on each of two nodes, which here are two agents of torchrun on one machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--no-python", "--nnodes", "2", "--nproc-per-node", "1")
    store = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    return [(*torchrun, *store, "--node-rank", str(node)) for node in range(2)]


def test_two_nodes_compute_what_one_does(
    make: Make, together: tuple[Files, StepContext], two_nodes: list[tuple[str, ...]]
) -> None:
    (files, apart), (_, by_itself) = make("nodes", EXACT, packed=False), together

    nodes = [files.start("train", node) for node in two_nodes]
    for done in [files.finish(node) for node in nodes]:
        assert done.exit_code == 0, done.stdout + done.stderr

    assert adapter_bytes(apart) == adapter_bytes(by_itself)
    assert history(apart) == history(by_itself)


def test_sigterm_on_one_node_saves_once_and_ends_both_and_the_resume_is_exact(
    make: Make, two_nodes: list[tuple[str, ...]]
) -> None:
    (undisturbed, one), (disturbed, two) = make("undisturbed", LONG), make("disturbed", LONG)
    succeeded(undisturbed.run("train"))

    first, second = (disturbed.start("train", node) for node in two_nodes)
    said = until(first, 5)
    second.terminate()
    interrupted = [disturbed.finish(first, said), disturbed.finish(second)]

    assert all(done.exit_code for done in interrupted)
    (result,) = [record for record in interrupted[0].records if isinstance(record, ResultRecord)]
    assert result.exit_code == ExitCode.INTERRUPTED
    assert f"the checkpoint of step {result.training_step} is saved" in result.message
    succeeded(disturbed.run("train"))
    assert adapter_bytes(two) == adapter_bytes(one)
    assert history(two) == history(one)


def test_a_sharded_base_gives_the_same_losses_from_half_of_its_bytes_and_goes_on_exactly(
    make: Make, together: tuple[Files, StepContext]
) -> None:
    (files, sharded), (_, whole) = make("sharded", merged(EXACT, SHARDED), packed=False), together

    succeeded(files.run("train"))

    expected, found = history(whole), history(sharded)
    for name in ("loss", "evalLoss", "gradNorm"):
        values = [line[name] for line in expected if name in line]
        assert [line[name] for line in found if name in line] == pytest.approx(values, rel=1e-5)
    for log in ("train.log", "train.rank-1.log"):
        held = re.search(r"holds (\d+) of (\d+) bytes", (files.workspace / "records" / log).read_text())
        assert held is not None
        assert int(held[1]) == pytest.approx(int(held[2]) / 2, rel=0.01)
    uninterrupted = adapter_bytes(sharded)
    (files.workspace / "records" / "train.json").unlink()
    shutil.rmtree(files.workspace / "checkpoints" / "step-6")
    succeeded(files.run("train"))
    assert adapter_bytes(sharded) == uninterrupted


def test_another_number_of_processes_does_not_go_on_from_a_checkpoint(
    tmp_path: Path, together: tuple[Files, StepContext]
) -> None:
    files = together[0].copied(tmp_path / "copy")
    (files.workspace / "records" / "train.json").unlink()

    done = files.with_spec({"resources": {"gpus": 1}}).run("train")

    assert done.exit_code == ExitCode.BAD_CONFIGURATION
    assert "ranks was 2, is 1" in done.result.message


def test_sigterm_in_one_process_saves_once_and_ends_both_and_the_resume_is_exact(make: Make) -> None:
    (undisturbed, one), (disturbed, two) = make("undisturbed", LONG), make("disturbed", LONG)
    succeeded(undisturbed.run("train"))

    process, said = started(disturbed, 5)
    child = other(process)
    os.kill(child, signal.SIGTERM)
    interrupted = disturbed.finish(process, said)

    assert interrupted.exit_code == ExitCode.INTERRUPTED, interrupted.stderr
    assert not runs(child)
    step = interrupted.result.training_step
    assert step is not None
    assert 5 <= step < 60
    assert f"the checkpoint of step {step} is saved" in interrupted.result.message
    succeeded(disturbed.run("train"))
    assert adapter_bytes(two) == adapter_bytes(one)
    assert history(two) == history(one)


def test_a_process_that_is_killed_ends_the_other_for_another_attempt(make: Make) -> None:
    files, _ = make("killed", LONG)
    process, said = started(files, 5)
    os.kill(other(process), signal.SIGKILL)

    done = files.finish(process, said)

    assert done.exit_code == ExitCode.UNREACHABLE, done.stderr
    assert "rank 1 of 2 was killed by SIGKILL" in done.result.message


def test_no_process_outlives_the_main_one(make: Make) -> None:
    files, _ = make("orphan", LONG)
    process, _said = started(files, 5)
    child = os.pidfd_open(other(process))
    process.kill()
    process.communicate()

    # It becomes readable when that process ends.
    assert select.select([child], [], [], 60)[0]
    os.close(child)


FULL_CARD = """
import os
if os.environ.get("RANK") == "1":
    import torch
    from qlora_trainer import loop
    loss = loop.batch_loss
    def batch_loss(model, batch):
        if len(batch.rows.lengths) > {rows}:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, batch)
    loop.batch_loss = batch_loss
"""


@pytest.fixture
def second_card(tmp_path: Path) -> Callable[[int], dict[str, str]]:
    """Makes the environment in which the second process has a GPU for so many rows: there is none to fill."""

    def make(rows: int, more: str = "") -> dict[str, str]:
        folder = tmp_path / "card"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(FULL_CARD.format(rows=rows) + more)
        return {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}

    return make


def test_a_failure_of_one_process_ends_both_with_its_exit_code(
    make: Make, second_card: Callable[[int], dict[str, str]]
) -> None:
    files, _ = make("full", TWO)

    done = files.run("train", **second_card(0))

    assert done.exit_code == ExitCode.GPU_OUT_OF_MEMORY, done.stderr
    assert "rank 1: the GPU is out of memory at a measured peak" in done.result.message
    assert "spec.training.maxSequenceLength" in done.result.message


SUM_WITHOUT_ANSWER = """
else:
    import torch.distributed
    torch.distributed.all_reduce = lambda *_: os._exit(99)
"""


def test_nobody_begins_a_sum_that_a_failed_process_will_never_join(
    make: Make, second_card: Callable[..., dict[str, str]]
) -> None:
    """NCCL, other than gloo, would wait for half an hour."""
    files, _ = make("alone", merged(TWO, {"dataset": {"eval": None}}))

    done = files.run("train", **second_card(0, SUM_WITHOUT_ANSWER))

    assert done.exit_code == ExitCode.GPU_OUT_OF_MEMORY, done.stderr


def test_a_loss_is_summed_only_when_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    summed: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_gather", lost)
    monkeypatch.setattr(torch.distributed, "all_reduce", summed.append)

    with pytest.raises(StepFailure, match="Connection closed by peer"):
        Ranks(Place(size=2, local_size=2), lost=lambda error: unreachable(str(error))).sum(torch.zeros(()))
    assert not summed


def test_memory_that_runs_out_in_an_exchange_is_not_taken_for_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_tensor: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.distributed, "all_reduce", full)
    ranks = Ranks(Place(size=2, local_size=2), lost=lambda error: unreachable(str(error)))

    with pytest.raises(torch.OutOfMemoryError):
        ranks.sum_gradients([torch.nn.Parameter(torch.zeros(2))], torch.zeros(()))


def test_a_gpu_that_is_short_of_memory_makes_all_halve_their_micro_batches(
    make: Make, second_card: Callable[[int], dict[str, str]]
) -> None:
    training = {"microBatchSize": 4, "gradientAccumulationSteps": 2, "autoMicroBatch": True}
    files, context = make("short", merged(TWO, {"training": training}), packed=False)

    succeeded(files.run("train", **second_card(2)))

    record = read_completion(context.workspace.completion("train"), TrainRecord)
    assert record is not None
    assert record.micro_batch_size == 2


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE 4"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "not to numbers"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(variables: dict[str, str], named: str) -> None:
    with pytest.raises(StepFailure, match=named) as caught:
        Place.of(variables)
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_a_place_is_read_back_from_its_own_variables() -> None:
    place = Place(rank=3, size=4, local_rank=1, local_size=2, address="node-0", port=29500)

    assert Place.of(place.environment(), gpus=8) == place
    assert Place.of({}, gpus=8) == Place(size=8, local_size=8)
