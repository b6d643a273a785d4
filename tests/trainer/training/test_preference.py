"""Runs that compare two answers: the reference is computed once, also if interrupted."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_api.contract import ExitCode
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.outcome import Ending, result_record
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import row_losses
from qlora_trainer.training import preference, reference, suspect_run
from qlora_trainer.training.progress import divergence
from tests.support.failures import failing
from tests.support.manifests import merged
from tests.support.models.tiny import Recorded
from tests.support.ranks import SHARDED, same_numbers, succeeded, workspace
from tests.support.training import Lost, LostAtStep, adapter_bytes, failure, history, interrupted_at, prepared, run

# Sixteen pairs in separate sequences, four in a step: four steps make an epoch.
DPO: dict[str, Any] = {
    "lora": {"dropout": 0.0},
    "training": {"objective": "dpo", "gradientAccumulationSteps": 4, "maxSteps": 6, "scheduler": "constant"},
}


def job(root: Path, model: Path, changes: dict[str, Any] | None = None) -> StepContext:
    return prepared(root, model, merged(DPO, changes or {}), packed=False, pairs=True)


def known(context: StepContext, step: int) -> dict[str, torch.Tensor]:
    return load_file(context.workspace.checkpoints / f"step-{step}" / "objective.safetensors")


class Counted:
    """Counts how often each row passes the base without the adapter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self._losses = row_losses
        monkeypatch.setattr(reference, "row_losses", self._row_losses)

    def _row_losses(self, model: Any, batch: Batch) -> torch.Tensor:
        assert batch.pairs is not None
        self.rows += batch.pairs.numbers
        return self._losses(model, batch)


def test_each_row_passes_the_base_once_and_a_resumed_run_ends_in_the_same_bytes(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    undisturbed = job(tmp_path / "undisturbed", tiny_llama, {"lora": {"dropout": 0.1}})
    run(undisturbed)
    # Sixteen pairs are trained on, and four are held out.
    assert sorted(counted.rows) == sorted([*range(32), *range(8)])

    counted.rows = []
    resumed = job(tmp_path / "resumed", tiny_llama, {"lora": {"dropout": 0.1}})
    interrupted_at(resumed, 2)  # half of the first epoch: half of the rows are known
    assert int(known(resumed, 2)["train"].isnan().sum()) == 16
    interrupted_at(resumed, 5)  # in the second epoch: all are
    assert not any(bool(rows.isnan().any()) for rows in known(resumed, 5).values())
    run(resumed)

    assert sorted(counted.rows) == sorted([*range(32), *range(8)])
    assert adapter_bytes(resumed) == adapter_bytes(undisturbed)
    assert history(resumed) == history(undisturbed)


def test_a_row_that_is_first_seen_late_has_the_same_reference(tmp_path: Path, tiny_llama: Path) -> None:
    """All rows in step 1, before the adapter changes anything, against four a step."""
    at_once = job(tmp_path / "at-once", tiny_llama, {"training": {"gradientAccumulationSteps": 16, "maxSteps": 1}})
    in_turn = job(tmp_path / "in-turn", tiny_llama, {"training": {"maxSteps": 4}})
    run(at_once)
    run(in_turn)
    assert torch.equal(known(in_turn, 4)["train"], known(at_once, 1)["train"])


def test_the_run_learns_to_prefer_the_chosen_answers_and_reports_it(tmp_path: Path, tiny_llama: Path) -> None:
    context, records = job(tmp_path / "workspace", tiny_llama), Recorded()
    run(context, records=records)

    evaluations = [line for line in history(context) if "evalLoss" in line]
    assert evaluations[0]["evalLoss"] == pytest.approx(math.log(2), abs=1e-3)
    # A new adapter's B is 0: policy and reference are the same model, by two implementations of its layers.
    first = next(line for line in history(context) if "loss" in line)
    assert (first["rewardMargin"], first["accuracy"]) == (0.0, 0.5)
    assert evaluations[-1]["evalLoss"] < 0.6
    assert evaluations[-1]["evalAccuracy"] == 1.0
    last = [line for line in history(context) if "loss" in line][-1]
    assert last["rewardMargin"] == pytest.approx(last["chosenReward"] - last["rejectedReward"], abs=1e-5)
    said = records.written[-1]
    assert (said["accuracy"], said["evalAccuracy"]) == (pytest.approx(last["accuracy"]), 1.0)
    assert said["rewardMargin"] == pytest.approx(last["rewardMargin"])


def test_the_reference_is_computed_as_the_policy_is(tmp_path: Path, tiny_llama: Path) -> None:
    """With weights of normalizations as trained models have them, other kernels would give other bits."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * ("norm" in name)
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    context = job(tmp_path / "workspace", model, {"training": {"maxSteps": 1, "evalEverySteps": 1}})
    run(context)
    before, first = history(context)[:2]
    assert before["evalLoss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (first["rewardMargin"], first["accuracy"]) == (0.0, 0.5)


def test_the_result_has_loss_and_accuracy_of_the_adapter_that_is_kept(tmp_path: Path, tiny_llama: Path) -> None:
    # The second step at this rate overshoots by far, on any processor.
    unsteady = {"keep": "best", "learningRate": 0.5, "evalEverySteps": 1, "warmupSteps": 0, "maxSteps": 2}
    context, records = job(tmp_path / "workspace", tiny_llama, {"training": unsteady}), Recorded()
    record = run(context, records=records)
    curve = {line["step"]: line for line in history(context) if "evalLoss" in line}
    kept, last = curve[record.kept_step], curve[record.training_step]
    assert kept["evalAccuracy"] != last["evalAccuracy"], "the test needs a run whose best step is not its last"
    names = {"step": "train", "job_uid": "job", "pod_uid": "pod", "attempt": 1, "time": "2026-01-02T03:04:05Z"}
    result = result_record(Ending(ExitCode.DONE, ""), record, records.findings, **names)  # type: ignore[arg-type]
    assert (result.eval_loss, result.eval_accuracy) == (kept["evalLoss"], kept["evalAccuracy"])


# Later checkpoints must record the first step's adapter, which is the best; the run ends two evaluations after it.
@pytest.mark.parametrize(("objective", "micro_batches"), [("dpo", 2), pytest.param("orpo", 4, marks=pytest.mark.slow)])
def test_a_run_interrupted_after_every_step_keeps_the_same_best_adapter(
    objective: str, micro_batches: int, tmp_path: Path, tiny_llama: Path
) -> None:
    each_step: dict[str, Any] = {"keep": "best", "evalEverySteps": 1, "saveEverySteps": 1, "warmupSteps": 0}
    stops = {"earlyStopping": {"patience": 2}, "learningRate": 0.1, "gradientAccumulationSteps": micro_batches}
    spec = {"lora": {"dropout": 0.1}, "training": {"objective": objective, **each_step, **stops}}
    undisturbed, disturbed = (job(tmp_path / name, tiny_llama, spec) for name in ("undisturbed", "disturbed"))
    expected = run(undisturbed)
    accuracy = {line["step"]: line["evalAccuracy"] for line in history(undisturbed) if "evalAccuracy" in line}
    assert (expected.kept_step, expected.training_step) == (1, 3), "the test needs a best step that is not the last"
    assert accuracy[1] != accuracy[3]

    for step in (1, 2, 3):
        interrupted_at(disturbed, step)
        torch.manual_seed(step)
    found = run(disturbed)

    assert adapter_bytes(disturbed) == adapter_bytes(undisturbed)
    assert history(disturbed) == history(undisturbed)
    assert (found.kept_step, found.training_step) == (expected.kept_step, expected.training_step)
    assert (found.eval_loss, found.loss) == (expected.eval_loss, expected.loss)
    assert found.eval_accuracy == expected.eval_accuracy == accuracy[1]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_match_one(sharded: bool, tmp_path: Path, tiny_llama: Path) -> None:
    # Five sequences a step do not divide by two: in the last round one rank has a batch that does not count.
    training = merged(DPO, {"training": {"gradientAccumulationSteps": 5}})
    two = SHARDED if sharded else {"resources": {"gpus": 2}}
    alone, together = (
        trained(tmp_path / name, tiny_llama, merged(training, changes)) for name, changes in (("one", {}), ("two", two))
    )

    same_numbers(together, alone, 1e-3, of_norms=3e-3 if sharded else None)
    ours, theirs = known(together, 6), known(alone, 6)
    for split, rows in theirs.items():
        torch.testing.assert_close(ours[split], rows, rtol=1e-2 if sharded else 1e-5, atol=1e-4)


def trained(root: Path, model: Path, spec: dict[str, Any]) -> StepContext:
    """A workspace after a training with the command line."""
    files, context = workspace(root, model, spec, packed=False, pairs=True)
    succeeded(files.run("train"))
    return context


def test_micro_batches_of_several_pairs_and_packed_pairs_have_the_same_losses(tmp_path: Path, tiny_llama: Path) -> None:
    """In one step over all pairs their order does not matter."""
    spec = merged(DPO, {"training": {"maxSteps": 1, "gradientAccumulationSteps": 16}})
    alone = job(tmp_path / "alone", tiny_llama, spec)
    run(alone)
    fewer = {"training": {"microBatchSize": 4, "gradientAccumulationSteps": 4}}
    several = job(tmp_path / "several", tiny_llama, merged(spec, fewer))
    run(several)
    packed = prepared(tmp_path / "packed", tiny_llama, spec, packed=True, pairs=True)
    run(packed)
    assert len(PreparedDataset.open(packed.workspace.data / "rows", "train")) < 16
    same_numbers(several, alone, 1e-2)
    same_numbers(packed, alone, 1e-2)


def test_the_reference_loss_of_the_base_is_log_2(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the adapter the model is the reference, for any data."""
    monkeypatch.setattr(suspect_run, "has_diverged", lambda _loss, _base_loss: True)
    monkeypatch.setattr(divergence.Stability, "is_out_of_patience", lambda *_: True)
    with failing(ExitCode.DIVERGED, "the base model without the adapter has 0.6931 on the same rows"):
        run(job(tmp_path / "workspace", tiny_llama))


def test_a_run_that_prefers_the_rejected_answers_for_long_has_diverged(tmp_path: Path, tiny_llama: Path) -> None:
    """Its loss stays more than 1 nat above log 2, which is that of the base."""
    wild = {"learningRate": 1.0, "warmupSteps": 0, "gradientAccumulationSteps": 1, "divergencePatience": 2}
    strong = {"preference": {"beta": 10}}
    context = job(tmp_path / "workspace", tiny_llama, {"dataset": {"eval": None}, "training": {**wild, **strong}})
    failed = failure(context)
    assert failed.exit_code is ExitCode.DIVERGED
    assert "training diverged at step 4: loss " in failed.message
    assert "suspect since step 3" in failed.message
    assert "the base model without the adapter has 0.6931 on the same rows" in failed.message


def test_data_prepared_for_another_objective_are_rejected(tmp_path: Path, tiny_llama: Path) -> None:
    context = prepared(tmp_path / "workspace", tiny_llama, DPO, packed=False, pairs=False)
    failed = failure(context)
    assert failed.exit_code is ExitCode.BAD_CONFIGURATION
    assert failed.message.startswith("spec.training.objective is dpo, and the prepared data are rows with one answer")


def test_a_supervised_checkpoint_has_nothing_of_an_objective(tmp_path: Path, tiny_llama: Path) -> None:
    context = prepared(tmp_path / "workspace", tiny_llama, {"training": {"maxSteps": 1}})
    run(context)
    sums = json.loads((context.workspace.checkpoints / "step-1" / "manifest.json").read_text())["sha256"]
    assert sorted(sums) == ["adapter.safetensors", "optimizer.safetensors", "state.json"]


class Card:
    """A GPU that runs out of memory in passes that `fits` does not admit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fits: Callable[[int], bool]) -> None:
        """`fits` is called for each pass, with its pairs."""
        self._fits, self._losses = fits, row_losses
        for module in (preference, reference):
            monkeypatch.setattr(module, "row_losses", self._row_losses)

    def _row_losses(self, model: Any, batch: Batch) -> torch.Tensor:
        assert batch.pairs is not None
        losses = self._losses(model, batch)
        if not self._fits(len(batch.pairs)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses


HALVED: dict[str, Any] = {
    "lora": {"dropout": 0.1},
    "training": {"microBatchSize": 4, "gradientAccumulationSteps": 1, "autoMicroBatch": True},
}
SMALL: dict[str, Any] = {"training": {"microBatchSize": 2, "gradientAccumulationSteps": 2}}


def same_reference(one: StepContext, other: StepContext) -> None:
    """Check that two runs kept the same of their rows: DPO its reference, and ORPO nothing."""
    steps = [context.workspace.checkpoints / "step-6" for context in (one, other)]
    kept, same = ([file.read_bytes() for file in step.glob("objective.*")] for step in steps)
    assert len(kept) == (one.spec.training.objective == "dpo")
    assert kept == same


@pytest.mark.parametrize("objective", ["dpo", pytest.param("orpo", marks=pytest.mark.slow)])
def test_micro_batches_of_pairs_are_halved_and_a_resumed_run_keeps_them(
    objective: str, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = merged(HALVED, {"training": {"objective": objective}})
    small = job(tmp_path / "small", tiny_llama, merged(spec, SMALL))
    run(small)
    halved, disturbed = (job(tmp_path / name, tiny_llama, spec) for name in ("halved", "disturbed"))
    Card(monkeypatch, lambda pairs: pairs <= 2)
    found = run(halved)
    assert (found.micro_batch_size, found.training_step) == (2, 6)
    with pytest.raises(Lost):
        run(disturbed, records=LostAtStep(1))
    interrupted_at(disturbed, 3)
    monkeypatch.undo()
    assert run(disturbed).micro_batch_size == 2

    for context in (halved, disturbed):
        assert adapter_bytes(context) == adapter_bytes(small)
        assert history(context) == history(small)
        same_reference(context, small)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "at"), [("dpo", 1), ("dpo", 2), ("dpo", 3), ("orpo", 2)])
def test_a_step_that_is_repeated_for_pairs_keeps_nothing_of_its_first_try(
    objective: str, at: int, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in this pass: with or without the adapter, in any micro batch."""
    steps = {"dataset": {"eval": None}, "training": {"objective": objective, "gradientAccumulationSteps": 4}}
    spec = merged(merged(HALVED, steps), {"training": {"microBatchSize": 2}})
    small = job(
        tmp_path / "small",
        tiny_llama,
        merged(spec, {"training": {"microBatchSize": 1, "gradientAccumulationSteps": 8}}),
    )
    run(small)
    halved, passes = job(tmp_path / "halved", tiny_llama, spec), count(1)
    Card(monkeypatch, lambda _pairs: next(passes) != at)

    assert run(halved).micro_batch_size == 1
    assert adapter_bytes(halved) == adapter_bytes(small)
    assert history(halved) == history(small)
    same_reference(halved, small)


@pytest.mark.slow
def test_rows_that_were_seen_before_memory_ran_out_pass_the_base_once(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the second epoch: the references of the first are kept."""
    context = job(tmp_path / "workspace", tiny_llama, merged(HALVED, {"dataset": {"eval": None}}))
    counted = Counted(monkeypatch)
    passes = count(1)

    def late(model: Any, batch: Batch) -> torch.Tensor:
        if next(passes) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return row_losses(model, batch)

    monkeypatch.setattr(preference, "row_losses", late)
    assert run(context).micro_batch_size == 2
    assert sorted(counted.rows) == list(range(32))
