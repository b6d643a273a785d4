"""Several processes that train one adapter: their joint result is that of one process."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_api.contract import ExitCode
from qlora_api.spec.training import ResourcesSpec
from qlora_trainer.core.completion import TrainRecord, read_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.cpu import ENV_COMPUTE_TYPE
from qlora_trainer.core.failures import StepFailure, unreachable
from qlora_trainer.training.distributed.launch import RankInfo
from qlora_trainer.training.distributed.ranks import Ranks
from tests.support.commands.command import Files
from tests.support.failures import failing
from tests.support.manifests import merged
from tests.support.ranks import EXACT, same_numbers, two_nodes, workspace
from tests.support.runs.forks import train_ranks
from tests.support.runs.shared import TOGETHER
from tests.support.training import adapter_bytes, context_of, history, job, prepared, run


def test_two_processes_match_one(tmp_path: Path, tiny_llama: Path, together: tuple[Files, StepContext]) -> None:
    one, (_, two) = prepared(tmp_path, tiny_llama, EXACT, packed=False), together
    run(one)

    same_numbers(two, one, 1e-4)
    ours, theirs = (load_file(context.workspace.trained / "adapter_model.safetensors") for context in (two, one))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm()
    record = read_completion(two.workspace.completion("train"), TrainRecord)
    assert record is not None
    assert record.ranks == 2


def _compute_in_float32_on_the_first() -> None:
    os.environ[ENV_COMPUTE_TYPE] = "float32" if os.environ["RANK"] == "0" else "bfloat16"


def test_processes_on_different_processors_compute_as_the_first_does(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (
        prepared(tmp_path / str(gpus), tiny_llama, merged(EXACT, {"resources": {"gpus": gpus}}), packed=False)
        for gpus in (1, 2)
    )
    train_ranks(two, _compute_in_float32_on_the_first)
    monkeypatch.setenv(ENV_COMPUTE_TYPE, "float32")
    assert run(one).compute_type == "float32"
    same_numbers(two, one, 1e-6)


@pytest.mark.parametrize("sharding", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_all_processes_stop_early_after_the_same_step_with_the_best_adapter(
    sharding: str, tmp_path: Path, tiny_llama: Path
) -> None:
    settings = {
        "sharding": sharding,
        "maxSteps": 40,
        "learningRate": 0.05,
        "evalEverySteps": 1,
        "saveEverySteps": 40,
        "keep": "best",
        "earlyStopping": {"patience": 1},
    }
    context = prepared(tmp_path, tiny_llama, merged(TOGETHER, {"training": settings}))

    train_ranks(context)

    losses = {line["step"]: line["evalLoss"] for line in history(context) if "evalLoss" in line}
    record = read_completion(context.workspace.completion("train"), TrainRecord)
    assert record is not None
    assert record.training_step == max(losses) < 40
    assert record.adapter_step == record.training_step - 1
    assert record.eval_loss == losses[record.adapter_step] == min(losses.values())
    best = context.workspace.checkpoints / f"step-{record.training_step}" / "best.safetensors"
    ours, kept = load_file(context.workspace.trained / "adapter_model.safetensors"), load_file(best)
    assert all(torch.equal(ours[name], tensor) for name, tensor in kept.items())


@pytest.mark.slow
def test_two_nodes_match_one(tmp_path: Path, tiny_llama: Path, together: tuple[Files, StepContext]) -> None:
    (files, apart), (_, by_itself) = workspace(tmp_path / "job", tiny_llama, EXACT, packed=False), together

    nodes = [files.start("train", node) for node in two_nodes()]
    for done in [files.finish(node) for node in nodes]:
        assert done.exit_code == 0, done.stdout + done.stderr

    assert adapter_bytes(apart) == adapter_bytes(by_itself)
    assert history(apart) == history(by_itself)


def test_another_number_of_processes_does_not_resume_a_checkpoint(
    tmp_path: Path, together: tuple[Files, StepContext]
) -> None:
    files = together[0].copied(tmp_path / "copy")
    (files.workspace / "records" / "train.json").unlink()

    with failing(ExitCode.BAD_CONFIGURATION, match="the number of GPUs was 2, is 1"):
        run(context_of(files.workspace, job(EXACT)))


@pytest.mark.parametrize(
    "exchange",
    [
        lambda ranks: ranks.sum(torch.zeros(())),
        lambda ranks: ranks.copy_from_main([torch.nn.Parameter(torch.zeros(2))]),
    ],
    ids=["sum", "copy"],
)
def test_nothing_is_exchanged_over_nccl_before_every_process_is_ready(
    monkeypatch: pytest.MonkeyPatch, exchange: Callable[[Ranks], object]
) -> None:
    """NCCL waits for a lost process: half an hour, or forever while it connects GPUs."""

    def lost(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    exchanged: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_gather", lost)
    monkeypatch.setattr(torch.distributed, "all_reduce", exchanged.append)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, **_: exchanged.append(tensor))

    with pytest.raises(StepFailure, match="Connection closed by peer"):
        exchange(Ranks(RankInfo(size=2, local_size=2), lost=lambda error: unreachable(str(error))))
    assert not exchanged


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")]
)
def test_memory_that_runs_out_in_an_exchange_is_not_taken_for_a_lost_process(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def full(_tensor: torch.Tensor, *, async_op: bool) -> None:
        raise error

    monkeypatch.setattr(torch.distributed, "all_reduce", full)
    ranks = Ranks(RankInfo(size=2, local_size=2), lost=lambda error: unreachable(str(error)))

    with pytest.raises(type(error), match="out of memory"):
        ranks.gradient_sums({"weight": torch.nn.Parameter(torch.zeros(2))}, torch.zeros(())).finish()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE 4"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "not to numbers"),
    ],
)
def test_variables_that_contradict_each_other_are_rejected(variables: dict[str, str], named: str) -> None:
    with failing(ExitCode.BAD_CONFIGURATION, match=named):
        RankInfo.from_environment(variables)


def test_a_rank_is_read_back_from_its_own_variables() -> None:
    place = RankInfo(rank=3, size=4, local_rank=1, local_size=2, address="node-0", port=29500, is_launched=True)

    assert RankInfo.from_environment(place.environment(), ResourcesSpec(gpus=8)) == place
    assert RankInfo.from_environment({}, ResourcesSpec(gpus=8)) == RankInfo(size=8, local_size=8)
