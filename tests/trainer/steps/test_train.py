"""The train step from the outside: its files, its exact resume, and its rejections."""

import dataclasses
import errno
import fcntl
import os
import shutil
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_api.contract import ExitCode, nine_digits
from qlora_trainer.core.completion import TrainRecord, read_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StopRequest
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.train import train
from qlora_trainer.training.checkpoints import checkpoint
from qlora_trainer.training.checkpoints.attempts import read_attempts
from tests.support.failures import failing
from tests.support.manifests import merged
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.training import (
    RARE_TOKEN,
    Lost,
    LostAtStep,
    adapter_bytes,
    failure,
    history,
    interrupted_at,
    prepared,
    run,
    with_record,
)
from tests.trainer.conftest import MakeContext, Prepare


def test_damaged_rows_end_the_step_until_prepare_has_made_them_again(make_context: MakeContext, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(20)]
    )
    context = make_context({"training": {"saveEverySteps": 2}})
    rows = context.workspace.root / prepare(context, Recorded()).data_path / "train.safetensors"
    interrupted_at(context, 2)
    os.truncate(rows, rows.stat().st_size - 1)
    with failing(ExitCode.BAD_DATASET, match=r"is damaged .*; set a new spec\.retry\.request"):
        run(context)
    prepare(context, Recorded())
    assert run(context).training_step == 4
    assert read_attempts(context.workspace.records)[-1].from_step == 2


def test_training_lowers_both_losses_and_records_its_results(workspace: Prepare) -> None:
    context, records = workspace(), Recorded()

    record = run(context, records=records)

    assert record.training_step == 6
    lines = history(context)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [line["step"] for line in lines if "evalLoss" in line] == [0, 2, 4, 6]
    assert record.loss == lines[-2]["loss"] < lines[1]["loss"]
    assert (record.eval_loss, record.initial_eval_loss) == (lines[-1]["evalLoss"], lines[0]["evalLoss"])
    assert lines[-1]["evalLoss"] < lines[0]["evalLoss"]
    assert (record.peak_memory_bytes or 0) > 2**20
    assert read_completion(context.workspace.completion("train"), TrainRecord) == record
    written = records.written
    assert written[0]["activity"] == "loading the base model in 4-bit"
    assert written[0]["totalSteps"] == 6
    assert [entry["activity"] for entry in written].count(
        "paging needs a GPU: the optimizer state stays in main memory"
    ) == 1
    steps = [entry["trainingStep"] for entry in written]
    assert steps == sorted(steps)
    last = written[-1]
    assert (last["trainingStep"], last["epoch"], last["remainingSeconds"], last["checkpointStep"]) == (6, 3.0, 0.0, 6)
    assert record.eval_loss is not None
    assert last["evalLoss"] == nine_digits(record.eval_loss)


def test_records_have_the_losses_at_rungs_and_the_sweeps_page_a_stopped_run(
    workspace: Prepare,
) -> None:
    context = workspace()
    shared = context.workspace.root.parent / "shared"
    context = dataclasses.replace(context, rungs=(2, 4), mounts=dataclasses.replace(context.mounts, sweep=shared))
    interrupted_at(context, 3)
    assert "at step 2, stopped" in (shared / "report.html").read_text()
    records = Recorded()
    run(context, records=records)
    losses = {line["step"]: nine_digits(line["evalLoss"]) for line in history(context) if "evalLoss" in line}
    found = [record.get("evaluations") for record in records.written if record["trainingStep"] == 6]
    assert found
    assert all(evaluations == [[2, losses[2]], [4, losses[4]]] for evaluations in found)
    ended = records.findings.progress
    assert ended is not None
    assert ended.evaluations == ((2, losses[2]), (4, losses[4]))


def test_goodput_is_the_share_of_all_attempts_that_is_in_the_adapter(workspace: Prepare) -> None:
    """The clock ticks at each reading: undone steps count as time, and not as work."""
    ticks = count()

    def attempt(context: StepContext, records: Recorded) -> TrainRecord:
        return train(
            context,
            records,
            stop=StopRequest(),
            now=lambda: datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=next(ticks)),
            monotonic=lambda: float(next(ticks)),
        )

    undisturbed, lost, shown = workspace("undisturbed"), workspace("lost"), Recorded()
    whole = attempt(undisturbed, shown)
    with pytest.raises(Lost):
        attempt(lost, LostAtStep(5))
    repeated = attempt(lost, Recorded())

    assert whole.goodput is not None
    assert repeated.goodput is not None
    assert 0 < repeated.goodput < whole.goodput < 1
    assert (whole.attempts, repeated.attempts) == (1, 2)
    # While it runs, too.
    assert all(0 <= record["goodput"] <= 1 for record in shown.written[1:])
    # It was killed in step 5, and had saved after step 4: its later work is lost, and the next one loads again.
    assert repeated.usage is not None
    first, second = repeated.usage.attempts
    assert (first.ended, first.from_step, second.from_step) == ("failed", 0, 4)
    assert first.startup_seconds is not None
    assert second.startup_seconds is not None
    assert 0 < first.lost_seconds < first.seconds - first.startup_seconds
    assert (second.lost_seconds, repeated.usage.lost_seconds) == (0, first.lost_seconds)
    assert all(record["trainingSince"] for record in shown.written[1:])


def test_a_checkpoint_that_cannot_be_read_just_now_is_kept(workspace: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    context = workspace()
    interrupted_at(context, 1)

    def stale(_path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(checkpoint, "file_sha256", stale)
    with pytest.raises(OSError, match="Stale"):
        run(context)

    assert [path.name for path in context.workspace.checkpoints.iterdir()] == ["step-1"]


def test_a_stop_before_the_first_step_loses_nothing(workspace: Prepare) -> None:
    context, stop = workspace(), StopRequest()
    stop.set()

    with pytest.raises(Interrupted, match="nothing to save yet"):
        run(context, stop=stop)

    assert not context.workspace.checkpoints.exists()


class StopInStep(Recorded):
    """Requests a stop while the step after the first one has micro batches left."""

    def __init__(self, stop: StopRequest) -> None:
        super().__init__()
        self._stop, self.reports = stop, 0

    def progress(self, record: Any, *, force: bool = False) -> None:
        super().progress(record, force=force)
        self.reports += record.training_step == 1 and record.activity == "training"
        # The first is that of the step before, the second that of a micro batch.
        if self.reports == 2:
            self._stop.set()


@pytest.mark.parametrize("objective", ["supervised", "dpo"])
def test_a_stop_within_a_step_drops_it_and_loses_no_other(objective: str, tiny_llama: Path, tmp_path: Path) -> None:
    spec = {"training": {"gradientAccumulationSteps": 8, "maxSteps": 3, "objective": objective}}
    pairs = objective == "dpo"
    whole, parts = (
        prepared(tmp_path / name, tiny_llama, spec, pairs=pairs, packed=False) for name in ("whole", "parts")
    )
    run(whole)
    records = StopInStep(stop := StopRequest())

    with pytest.raises(Interrupted) as caught:
        run(parts, stop=stop, records=records)

    # The third is that of the checkpoint.
    assert (caught.value.training_step, records.reports) == (1, 3)
    assert [path.name for path in parts.workspace.checkpoints.iterdir()] == ["step-1"]
    run(parts)
    assert adapter_bytes(parts) == adapter_bytes(whole)
    assert history(parts) == history(whole)


def test_a_finished_run_is_not_repeated_but_a_changed_adapter_is_restored(workspace: Prepare) -> None:
    context = workspace()
    record, adapter = run(context), adapter_bytes(context)

    silent = Recorded()
    assert run(context, records=silent) == record
    assert silent.written == []
    (context.workspace.trained / "adapter_model.safetensors").write_bytes(b"changed")
    assert run(context).adapter_sha256 == record.adapter_sha256
    assert adapter_bytes(context) == adapter


def test_packing_and_micro_batches_do_not_change_the_loss(workspace: Prepare) -> None:
    quick = {"training": {"maxSteps": 1, "gradientAccumulationSteps": 16, "warmupSteps": 0}, "lora": {"dropout": 0.0}}
    several = merged(quick, {"training": {"microBatchSize": 16, "gradientAccumulationSteps": 1}})
    packed, alone = workspace("packed", quick), workspace("alone", quick, packed=False)
    together = workspace("together", several, packed=False)

    losses = [(record.loss, record.initial_eval_loss) for record in map(run, (packed, alone, together))]

    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    assert losses[2] == pytest.approx(losses[1], rel=2e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adapter_is_the_same_bytes_whatever_activations_are_kept(workspace: Prepare, dropout: float) -> None:
    trained = set()
    for blocks, offloads in ((None, False), (None, True), (0, False), (1, False)):
        spec = {"lora": {"dropout": dropout}, "training": {"gradientCheckpointing": blocks != 0}}
        context = with_record(
            workspace(f"{blocks}-{offloads}", spec), recomputed_blocks=blocks, offloads_inputs=offloads
        )
        run(context)
        trained.add(adapter_bytes(context))
    assert len(trained) == 1


def test_a_loss_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(
    workspace: Prepare, tiny_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "poisoned"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][RARE_TOKEN] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    # With this seed the row of the poisoned token is not among the first.
    spec = {"training": {"gradientAccumulationSteps": 1, "saveEverySteps": 1, "maxSteps": 50, "seed": 1}}
    context = workspace(spec=spec, model=model)

    with failing(ExitCode.DIVERGED, "loss nan", "spec.training.learningRate"):
        run(context)
    kept = sorted(context.workspace.checkpoints.glob("step-*"))
    assert kept
    assert all(tensor.isfinite().all() for path in kept for tensor in load_file(path / "adapter.safetensors").values())
    assert not context.workspace.trained.exists()


def test_no_number_of_suspensions_ends_a_job(workspace: Prepare) -> None:
    context = workspace(spec={"retry": {"maxDisruptions": 0}})
    interrupted_at(context, 1)
    interrupted_at(context, 2)

    assert run(context).training_step == 6


def test_only_one_attempt_trains_in_a_workspace(workspace: Prepare) -> None:
    context = workspace()
    context.workspace.records.mkdir(exist_ok=True)
    with (context.workspace.records / "train.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        found = failure(context)

    assert found.exit_code is ExitCode.UNREACHABLE
    assert "another attempt is still training" in found.message
    assert run(context).training_step == 6


def test_a_resumed_run_uses_as_many_threads_as_the_first_attempt(workspace: Prepare) -> None:
    context = workspace()
    before = torch.get_num_threads()
    interrupted_at(context, 1)
    used = torch.get_num_threads()
    torch.set_num_threads(used + 1)
    try:
        interrupted_at(context, 2)
        assert torch.get_num_threads() == used <= len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test must not find")
def test_a_missing_gpu_is_an_error_and_not_a_slow_run(workspace: Prepare) -> None:
    with failing(ExitCode.BAD_CONFIGURATION, "no CUDA GPU is visible"):
        run(dataclasses.replace(workspace(), device="cuda"))


def test_without_prepare_nothing_is_trained(workspace: Prepare) -> None:
    context = workspace()
    context.workspace.completion("prepare").unlink()

    assert "run the prepare step first" in failure(context).message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_adapter_trained_on_a_changed_base_is_not_kept(workspace: Prepare, name: str) -> None:
    context = workspace()
    path = context.workspace.base / name
    content = path.read_bytes()
    # A configuration that is still JSON, and a weight that is still a number.
    path.write_bytes(content[:-1] + (b" " if name == "config.json" else bytes([content[-1] ^ 1])))

    with failing(ExitCode.UNSAFE_ARTIFACT, "was changed or damaged"):
        run(context)
    assert not context.workspace.trained.exists()
    assert not context.workspace.completion("train").exists()
    assert not [*context.workspace.checkpoints.glob("step-*")]


def test_an_extra_file_that_a_library_might_load_is_rejected(workspace: Prepare) -> None:
    context = workspace()
    (context.workspace.base / "adapter_config.json").write_text("{}")
    with failing(ExitCode.UNSAFE_ARTIFACT, "adapter_config.json"):
        run(context)


def test_training_reads_no_original(workspace: Prepare, tmp_path: Path, tiny_llama: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    context = workspace(model=model)
    (model / "model.safetensors").unlink()
    assert run(context).base_sha256
