"""Sums of gradients over processes, which begin while the last backward pass of a step still runs."""

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_api.contract import ExitCode
from qlora_trainer.core.completion import TrainRecord, read_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.training import objective
from qlora_trainer.training.distributed import gradient_sums
from qlora_trainer.training.distributed.launch import RankInfo
from qlora_trainer.training.distributed.ranks import Ranks
from tests.support.commands.command import Files
from tests.support.manifests import merged
from tests.support.ranks import TWO, limit_second_gpu
from tests.support.runs.forks import train_ranks
from tests.support.runs.shared import TOGETHER
from tests.support.training import adapter_bytes, history, prepared


class Sums:
    """In place of all_reduce: the sums that have been started, in order."""

    def __init__(self, events: list[object]) -> None:
        self._events = events

    def __call__(self, flat: Tensor, *, async_op: bool) -> "Sums":
        assert async_op
        self._events.append(flat.tolist())
        return self

    def wait(self) -> None:
        """Nothing is added."""


def make_parameters(*names: str) -> dict[str, nn.Parameter]:
    """Parameters of one number each, the gradient of each its factor in `backward`."""
    return {name: nn.Parameter(torch.ones(1)) for name in names}


def backward(parameters: dict[str, nn.Parameter], **factors: float) -> None:
    """A pass that reaches these parameters in the reverse order, with these gradients."""
    loss = torch.zeros(1)
    for name, factor in factors.items():
        loss = (loss + parameters[f"blocks.{name[1:]}.weight"] * factor) * 1.0
    loss.backward()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What has happened, in buckets of one number."""
    found: list[object] = []
    monkeypatch.setattr(gradient_sums, "BUCKET_BYTES", 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", Sums(found))
    return found


NAMES = ("blocks.0.weight", "blocks.10.weight", "blocks.2.weight", "head.weight")


@pytest.mark.parametrize(
    ("factors", "in_pass"),
    [
        ({"_0": 1, "_2": 2, "_10": 3}, [[3], [2], [1]]),
        ({"_10": 3, "_0": 1, "_2": 2}, [[3], [2], [1]]),
        ({"_0": 1, "_2": 2}, []),
    ],
    ids=["last block first", "another order", "the last block is not reached"],
)
def test_sums_start_in_the_pass_from_the_last_block_to_the_first_in_every_rank(
    factors: dict[str, float], in_pass: list[list[float]], events: list[object]
) -> None:
    parameters = make_parameters(*NAMES)
    sums = Ranks(RankInfo(size=2, local_size=2)).gradient_sums(parameters, torch.full((1,), 9.0))

    with sums.during_last_pass():
        backward(parameters, **factors)
        assert events == in_pass
    assert events == [[factors.get("_10", 0)], [2], [1]]
    sums.finish()
    # What is outside of the blocks, without a gradient here, and the means.
    assert events[3:] == [[0], [9]]


def test_a_bucket_holds_blocks_that_the_pass_reaches_one_after_another(
    events: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_sums, "BUCKET_BYTES", 8)
    parameters = make_parameters(*NAMES, "blocks.9.weight")
    sums = Ranks(RankInfo(size=2, local_size=2)).gradient_sums(parameters, torch.full((1,), 9.0))

    with sums.during_last_pass():
        backward(parameters, _0=1, _2=2, _9=3, _10=4)
    assert events == [[3, 4], [1, 2]]


@pytest.mark.parametrize(
    "ranks", [Ranks(RankInfo(size=2, local_size=2), is_sharded=True), Ranks()], ids=["sharded", "one rank"]
)
def test_nothing_is_summed_in_the_pass_of_a_sharded_base_or_a_single_process(
    ranks: Ranks, events: list[object]
) -> None:
    parameters = make_parameters(*NAMES)
    sums = ranks.gradient_sums(parameters, torch.zeros(1))

    with sums.during_last_pass():
        backward(parameters, _0=1, _2=2, _10=3)
    assert events == []
    sums.finish()
    assert len(events) == (5 if ranks.is_sharded else 0)


def note_sums(folder: Path) -> None:
    """Let sums be of a few tensors each, and note when they and the passes begin and end."""
    gradient_sums.BUCKET_BYTES = 2048
    reduce, backward = torch.distributed.all_reduce, torch.Tensor.backward
    notes = folder / f"rank-{os.environ['RANK']}"

    def note(event: object) -> None:
        with notes.open("a") as file:
            file.write(f"{event}\n")

    def noted_reduce(tensor: Tensor, **settings: Any) -> Any:
        # That of an evaluation is waited for.
        if settings.get("async_op"):
            note(tensor.numel())
        return reduce(tensor, **settings)

    def noted_backward(*arguments: Any) -> None:
        note("begins")
        backward(*arguments)
        note("ends")

    torch.distributed.all_reduce = noted_reduce
    torch.Tensor.backward = noted_backward


def test_sums_begin_within_the_last_pass_of_a_step_and_change_no_byte(
    tmp_path: Path, tiny_llama: Path, together: tuple[Files, StepContext]
) -> None:
    context = prepared(tmp_path / "job", tiny_llama, TOGETHER, packed=False)

    train_ranks(context, partial(note_sums, tmp_path))

    first, second = ((tmp_path / f"rank-{rank}").read_text().splitlines() for rank in (0, 1))
    sizes = [event for event in first if event.isdecimal()]
    # The second process has no micro batch in the last round, and starts the same sums without a pass.
    assert sizes == [event for event in second if event.isdecimal()]
    # Only the loss comes after the pass.
    step = r"(begins ends )*begins (\d{2,} )+ends 1 "
    assert re.fullmatch(f"({step}){{6}}", " ".join([*first, ""]))
    assert adapter_bytes(context) == adapter_bytes(together[1])
    assert history(context) == history(together[1])


def run_out_in_the_pass(rows: int) -> None:
    """Give the second process a GPU whose memory ends in the backward pass of more rows, after sums have begun."""
    gradient_sums.BUCKET_BYTES = 2048
    if os.environ["RANK"] != "1":
        return
    loss, reduce, begun = vars(objective)["batch_loss"], torch.distributed.all_reduce, list[int]()

    def counted_reduce(*arguments: Any, **settings: Any) -> Any:
        begun.append(1)
        return reduce(*arguments, **settings)

    def limited(model: Any, batch: Any) -> Any:
        if len(batch.rows.lengths) > rows:
            first = next(parameter for parameter in model.parameters() if parameter.requires_grad)

            def run_out(_: Tensor) -> None:
                hook.remove()
                assert begun
                raise torch.OutOfMemoryError("CUDA out of memory")

            hook = first.register_hook(run_out)
        return loss(model, batch)

    torch.distributed.all_reduce = counted_reduce
    vars(objective)["batch_loss"] = limited


def test_a_process_short_of_memory_also_after_its_first_sums_makes_all_halve_their_micro_batches(
    tmp_path: Path, tiny_llama: Path
) -> None:
    training = {"microBatchSize": 4, "gradientAccumulationSteps": 2, "autoMicroBatch": True}
    before, within = (
        prepared(tmp_path / name, tiny_llama, merged(TWO, {"training": training}), packed=False)
        for name in ("before", "within")
    )
    train_ranks(before, partial(limit_second_gpu, 2))
    train_ranks(within, partial(run_out_in_the_pass, 2))

    record = read_completion(before.workspace.completion("train"), TrainRecord)
    assert record is not None
    assert record.micro_batch_size == 2
    assert adapter_bytes(within) == adapter_bytes(before)
    assert history(within) == history(before)


def test_a_process_that_fails_after_its_first_sums_ends_the_others_with_its_exit_code(
    tmp_path: Path, tiny_llama: Path
) -> None:
    context = prepared(tmp_path, tiny_llama, merged(TWO, {"dataset": {"eval": None}}), packed=False)
    train_ranks(context, partial(run_out_in_the_pass, 0), ends=ExitCode.GPU_OUT_OF_MEMORY)
