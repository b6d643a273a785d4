"""A GPU out of memory: the failure's message, and smaller micro batches."""

import gc
import json
import re
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_api.choice import Choice
from qlora_api.contract import ExitCode
from qlora_api.memory.training_shape import RECOMPUTE_ALL
from qlora_api.schema import replace
from qlora_api.spec.job import QLoRAJobSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.outcome import summary
from qlora_trainer.evaluation import held_out
from qlora_trainer.model.architecture.decoder import decoder_blocks
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.memory.dry_run import StepSize
from qlora_trainer.training import loop, objective
from qlora_trainer.training.out_of_memory import explain_shortage, smaller
from tests.support.dry_runs import measure
from tests.support.failures import failing
from tests.support.manifests import merged
from tests.support.models.tiny import Recorded
from tests.support.resolved import resolved_spec, resolved_training
from tests.support.training import (
    Lost,
    LostAtStep,
    adapter_bytes,
    failure,
    history,
    interrupted_at,
    run,
    with_record,
)
from tests.trainer.conftest import Prepare


class Card:
    """A GPU with room for so many rows of a micro batch, as the test has none to fill."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, error: RuntimeError | None = None) -> None:
        self.sizes: list[int] = []
        self._error = error or torch.OutOfMemoryError("CUDA out of memory")
        self._rows, self._loss = rows, batch_loss
        monkeypatch.setattr(objective, "batch_loss", self._batch_loss)

    def _batch_loss(self, model: Any, batch: Batch) -> torch.Tensor:
        rows = len(batch.rows.lengths)
        if rows > self._rows:
            raise self._error
        self.sizes.append(rows)
        return self._loss(model, batch)


@pytest.mark.parametrize(
    ("training", "advice"),
    [
        ({"microBatchSize": 4}, "set spec.training.microBatchSize to 2 and gradientAccumulationSteps to 4"),
        ({"gradientCheckpointing": False}, "set spec.training.gradientCheckpointing to true"),
        ({}, "set spec.training.maxSequenceLength to 256"),
        ({"autoMicroBatch": True}, "set spec.training.maxSequenceLength to 256"),
    ],
)
def test_running_out_of_gpu_memory_reports_its_use_and_advice(
    training: dict[str, Any], advice: str, workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch, rows=0)

    found = failure(workspace(spec={"training": training}))

    assert found.exit_code is ExitCode.GPU_OUT_OF_MEMORY
    assert advice in found.message
    size = training.get("microBatchSize", 1)
    # Prepare runs no dry run for a CPU; the shares of one are in the next test.
    assert re.search(rf"measured peak of \d+\.\d GiB with microBatchSize {size}; there is no estimate:", found.message)


ANSWERED = {
    "gate": {"score": {"check": "exactMatch", "maxNewTokens": 1024}},
    "dataset": {"eval": {"fraction": 0.1}},
    "training": {"maxSequenceLength": 512},
    "lora": {"rank": 8},
}


@pytest.mark.parametrize(
    ("spec", "blocks", "share"),
    [
        ({}, 2, "activations"),
        (ANSWERED, 24, "scored answers"),
        ({"resources": {"gpus": 2}, "training": {"sharding": "full"}}, 2, "blocks of other GPUs"),
    ],
    ids=["activations", "answers", "sharded"],
)
def test_the_shares_that_are_named_add_up_to_the_estimate(
    spec: dict[str, Any], blocks: int, share: str, tmp_path: Path
) -> None:
    shape = {"num_hidden_layers": blocks, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    vocabulary = {"vocab_size": 128256, "num_key_value_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **vocabulary, **shape}))
    sources = {"model": {"source": "pvc://a/b"}, "dataset": {"source": "pvc://c/d"}}
    document = merged(sources | {"training": {"maxSequenceLength": 4096}}, spec)
    settings = resolved_spec(QLoRAJobSpec.model_validate(document))
    size = StepSize(1, settings.training.max_sequence_length, True)
    found = measure(tmp_path / "config.json", settings, [size], "")

    with (
        pytest.raises(StepFailure) as caught,
        explain_shortage(settings, settings.lora.target_modules, "cpu", lambda: 1, lambda: RECOMPUTE_ALL, found),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")

    named = re.search(r"the estimate is (\d+\.\d) GiB \((.*?)\)", caught.value.message)
    assert named is not None
    sizes = {name: float(size) for name, _, size in (part.rpartition(" ") for part in named[2].split(", "))}
    assert sizes[share] > 0.5
    assert sum(sizes.values()) == pytest.approx(float(named[1]), abs=0.05 * (len(sizes) + 1))


@pytest.mark.parametrize(
    "said",
    ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: out of memory"],
)
def test_memory_that_a_library_could_not_get_is_reported_too(
    said: str, workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(monkeypatch, rows=0, error=RuntimeError(said))

    assert failure(workspace()).exit_code is ExitCode.GPU_OUT_OF_MEMORY


AUTOMATIC = {
    "training": {"microBatchSize": 4, "gradientAccumulationSteps": 1, "autoMicroBatch": True, "warmupSteps": 0},
    "dataset": {"eval": None},
    "lora": {"dropout": 0.0},
}


def test_a_micro_batch_that_is_advised_divides_the_batch_size() -> None:
    training = resolved_training(micro_batch_size=5, gradient_accumulation_steps=2, auto_micro_batch=True)
    assert smaller(training) == "set spec.training.microBatchSize to 2 and gradientAccumulationSteps to 4"
    of_rows = replace(training, batch_size=10, packing=False)
    assert smaller(of_rows) == "set spec.training.microBatchSize to 1"


def test_micro_batches_are_halved_until_they_fit_and_the_steps_stay_equal(
    workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy, small = workspace("roomy", AUTOMATIC, packed=False), workspace("small", AUTOMATIC, packed=False)
    expected = run(roomy)
    card = Card(monkeypatch, 1, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    records = Recorded()

    found = run(small, records=records)

    # The last step's rows are evaluated once more after it.
    assert card.sizes == [1] * 4 * 7
    assert (found.training_step, found.micro_batch_size, expected.micro_batch_size) == (6, 1, None)
    assert [line["loss"] for line in history(small)] == pytest.approx(
        [line["loss"] for line in history(roomy)], rel=1e-3
    )
    said = "training with microBatchSize 1, lowered because the GPU ran out of memory"
    assert (records.written[-1]["activity"], records.written[-1]["microBatchSize"]) == (said, 1)
    assert "with microBatchSize 1 after the GPU had run out of memory" in summary(found, "train")


def test_a_resumed_run_keeps_its_smaller_micro_batches_and_ends_in_the_same_bytes(
    workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = merged(AUTOMATIC, {"dataset": {"eval": {"fraction": 0.2}}, "lora": {"dropout": 0.1}})
    undisturbed, disturbed = (workspace(name, spec, packed=False) for name in ("undisturbed", "disturbed"))
    Card(monkeypatch, rows=2)
    run(undisturbed)

    with pytest.raises(Lost):
        run(disturbed, records=LostAtStep(1))
    interrupted_at(disturbed, 3)
    monkeypatch.undo()
    resumed = run(disturbed)

    assert resumed.micro_batch_size == 2
    assert adapter_bytes(disturbed) == adapter_bytes(undisturbed)
    assert history(disturbed) == history(undisturbed)


@pytest.mark.parametrize("blocks", [0, 1])
def test_activations_that_prepare_meant_to_keep_are_recomputed_before_micro_batches_are_halved(
    blocks: int, workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = merged(AUTOMATIC, {"lora": {"dropout": 0.1}})
    recomputing = workspace("recomputing", spec, packed=False)
    keeping = workspace("keeping", merged(spec, {"training": {"gradientCheckpointing": None}}), packed=False)
    choice = Choice.of("training.gradientCheckpointing", blocks != 0, "the GPU has room for the activations")
    with_record(keeping, settings=(choice,), recomputed_blocks=blocks)
    run(recomputing)
    shortages = []

    def room_for_one_block(model: Any, batch: Batch) -> torch.Tensor:
        if not all(block.gradient_checkpointing for block in decoder_blocks(model)):
            shortages.append(batch)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch_loss(model, batch)

    monkeypatch.setattr(objective, "batch_loss", room_for_one_block)
    with pytest.raises(Lost):
        run(keeping, records=LostAtStep(3))
    interrupted_at(keeping, 3)
    # A resumed run does not try again what failed.
    assert run(keeping).micro_batch_size is None
    assert len(shortages) == 1
    assert adapter_bytes(keeping) == adapter_bytes(recomputing)


def in_forward(_model: Any, _loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run out before there is a graph."""
    raise torch.OutOfMemoryError("CUDA out of memory")


def in_backward(model: Any, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run out in the backward pass, with all gradients but the first layer's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first, last = trained[0], trained[-1]
    before = None if last.grad is None else last.grad.clone()

    def run_out(_gradient: torch.Tensor) -> None:
        hook.remove()
        assert last.grad is not None
        assert before is None or not torch.equal(last.grad, before)
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = first.register_hook(run_out)
    return loss()


@pytest.mark.parametrize("runs_out", [in_forward, in_backward])
@pytest.mark.parametrize("at", [1, 2])
def test_a_repeated_step_drops_the_gradients_of_its_first_micro_batches(
    at: int,
    runs_out: Callable[[Any, Callable[[], torch.Tensor]], torch.Tensor],
    workspace: Prepare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that runs out at micro batch `at` matches one with the smaller ones."""
    spec = merged(AUTOMATIC, {"lora": {"dropout": 0.1}, "training": {"gradientAccumulationSteps": 2, "maxSteps": 3}})
    small = {"training": {"microBatchSize": 2, "gradientAccumulationSteps": 4}}
    halved = workspace("halved", spec, packed=False)
    small_throughout = workspace("small", merged(spec, small), packed=False)
    run(small_throughout)
    passes = count(1)

    def runs_out_once(model: Any, batch: Batch) -> torch.Tensor:
        if next(passes) == at:
            return runs_out(model, lambda: batch_loss(model, batch))
        return batch_loss(model, batch)

    monkeypatch.setattr(objective, "batch_loss", runs_out_once)

    assert run(halved).micro_batch_size == 2
    assert history(halved) == history(small_throughout)
    assert adapter_bytes(halved) == adapter_bytes(small_throughout)


def test_memory_that_runs_out_after_the_last_step_is_reported_too(
    workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs_out(_model: Any, _batch: Batch) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(held_out, "batch_loss", runs_out)

    with failing(ExitCode.GPU_OUT_OF_MEMORY, "set spec.training.maxSequenceLength to 256"):
        run(workspace(spec={"output": {"merged": {}}, "training": {"microBatchSize": 2, "maxSteps": 1}}))


class Kept:
    """Objects that refer to themselves, so that only a garbage collection frees them."""

    def __init__(self) -> None:
        self.own, self.tensor = self, torch.zeros(8)


def test_memory_of_the_failed_pass_is_freed_before_the_step_is_repeated(
    workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[weakref.ref[Kept]] = []
    alive: list[bool] = []

    def runs_out_once(model: Any, batch: Batch) -> torch.Tensor:
        if not left:
            kept = Kept()
            left.append(weakref.ref(kept))
            raise torch.OutOfMemoryError("CUDA out of memory")
        alive.append(left[0]() is not None)
        return batch_loss(model, batch)

    monkeypatch.setattr(objective, "batch_loss", runs_out_once)
    # pytest keeps the error that is logged, with all that its frames refer to.
    monkeypatch.setattr(loop.logger, "disabled", True)
    gc.disable()
    try:
        run(workspace(spec=merged(AUTOMATIC, {"training": {"maxSteps": 1}}), packed=False))
    finally:
        gc.enable()

    assert alive[0] is False
