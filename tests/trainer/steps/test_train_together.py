"""Jobs that are trained together end as each of them does alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlora_api.artifact_status import InitialAdapterStatus
from qlora_api.contract import ExitCode, ProgressRecord, ResultRecord, decode_record
from qlora_trainer.core.completion import PrepareRecord, TrainRecord, read_completion, write_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StepFailure, StopRequest
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.losses.joint import joint_losses
from qlora_trainer.steps.train_together import train_together
from qlora_trainer.training.checkpoints.attempts import only_attempt, read_attempts
from qlora_trainer.training.checkpoints.checkpoint import Checkpoint
from qlora_trainer.training.joint_training import Ended, Member, run_together
from tests.support.manifests import merged
from tests.support.models.tiny import POD_UID, Recorded
from tests.support.training import ROW_LENGTHS, StopAtStep, adapter_bytes, history, interrupted_at, prepared, run

# The jobs differ in data, length, adapter, its layers and beginning, rate, evaluations, what is kept, and the end.
OTHER_DATA = {"source": "pvc://data/other.jsonl"}
PLAIN: dict[str, Any] = {"lora": {"dropout": 0}}
OTHER_LENGTHS = (9, 31, 17, 40, 12, 25, 38)
JOBS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "wide": {
        "lora": {"dropout": 0, "rank": 8, "targetModules": ["q_proj", "up_proj"]},
        "training": {"seed": 5, "learningRate": 0.02},
        "dataset": OTHER_DATA,
    },
    "long": {
        "lora": {"dropout": 0},
        "training": {"seed": 7, "maxSteps": 9, "gradientAccumulationSteps": 3},
        "dataset": OTHER_DATA,
    },
    "best": {
        "lora": {"dropout": 0},
        "training": {"seed": 9, "keep": "best", "optimizer": "adamw", "evalEverySteps": 1},
    },
    # No evaluation improves so much: it ends after five steps, one after the stop below.
    "further": {
        "lora": {"dropout": 0, "from": {"source": "pvc://adapters/earlier"}},
        "training": {"seed": 11, "evalEverySteps": 1, "earlyStopping": {"patience": 5, "minDelta": 0.5}},
    },
}


def contexts(root: Path, model: Path, jobs: dict[str, dict[str, Any]] = JOBS) -> list[StepContext]:
    """A prepared workspace for each job."""
    made = {
        name: prepared(root / name, model, spec, lengths=OTHER_LENGTHS if "dataset" in spec else ROW_LENGTHS)
        for name, spec in jobs.items()
    }
    further = [context for context in made.values() if context.spec.lora.initial_adapter is not None]
    if further:
        earlier = prepared(root / "earlier", model, merged(PLAIN, {"training": {"maxSteps": 1, "warmupSteps": 0}}))
        sha256 = run(earlier).adapter_sha256
        for context in further:
            begins_with(context, earlier, sha256)
    return list(made.values())


def begins_with(context: StepContext, earlier: StepContext, sha256: str) -> None:
    """Note the adapter of an earlier job as what prepare has found for spec.lora.from."""
    shutil.copytree(earlier.workspace.trained, context.workspace.initial_adapter)
    path = context.workspace.completion("prepare")
    record = read_completion(path, PrepareRecord)
    assert record is not None
    status = InitialAdapterStatus(source="pvc://adapters/earlier", sha256=sha256)
    write_completion(path, record.model_copy(update={"initial_adapter": status}))


def together(
    jobs: list[StepContext],
    records: list[Recorded] | None = None,
    stop: StopRequest | None = None,
    monotonic: Callable[[], float] = lambda: 0.0,
) -> Any:
    """The results of training the jobs together."""
    records = records or [Recorded() for _ in jobs]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return train_together(jobs, records, stop=stop or StopRequest(), now=lambda: now, monotonic=monotonic)


def test_each_ends_as_alone(tiny_llama: Path, tmp_path: Path) -> None:
    jobs = contexts(tmp_path / "together", tiny_llama)
    for job, alone, result in zip(jobs, contexts(tmp_path / "alone", tiny_llama), together(jobs), strict=True):
        expected = run(alone)
        assert isinstance(result, TrainRecord)
        same = ("fingerprint", "training_step", "total_steps", "base_sha256")
        assert {name: getattr(result, name) for name in same} == {name: getattr(expected, name) for name in same}
        assert result.loss == pytest.approx(expected.loss, rel=1e-2)
        assert result.eval_loss == pytest.approx(expected.eval_loss, rel=1e-2)
        steps = [(line["step"], sorted(line)) for line in history(alone)]
        assert [(line["step"], sorted(line)) for line in history(job)] == steps
        assert apart(job, alone) < 0.02


def apart(job: StepContext, other: StepContext) -> float:
    """The distance of two adapters, relative to the norm of the second."""
    one, two = (
        torch.cat([t.flatten() for _, t in sorted(load_file(of.workspace.trained / ADAPTER_FILE).items())])
        for of in (job, other)
    )
    return float((one - two).norm() / two.norm())


# At the latter, all but the longest job have ended.
@pytest.mark.parametrize("step", [4, pytest.param(7, marks=pytest.mark.slow)])
def test_stopped_at_any_step_they_resume_to_the_same_bytes(step: int, tiny_llama: Path, tmp_path: Path) -> None:
    undisturbed = contexts(tmp_path / "undisturbed", tiny_llama)
    together(undisturbed)
    jobs, stop = contexts(tmp_path / "stopped", tiny_llama), StopRequest()
    records = [StopAtStep(step, stop) if name == "long" else Recorded() for name in JOBS]
    with pytest.raises(Interrupted):
        together(jobs, records, stop)
    together(jobs)
    assert [adapter_bytes(job) for job in jobs] == [adapter_bytes(job) for job in undisturbed]


class StopInEvaluation(Recorded):
    """Records that set a stop request while a job is evaluated, between two steps."""

    def __init__(self, stop: StopRequest) -> None:
        super().__init__()
        self._stop = stop

    def progress(self, record: Any, *, force: bool = False) -> None:
        super().progress(record, force=force)
        if record.activity == "evaluating" and record.training_step:
            self._stop.set()


@pytest.mark.slow
def test_a_stop_between_two_of_them_saves_those_that_have_passed_it_too(tiny_llama: Path, tmp_path: Path) -> None:
    rarely = {"lora": {"dropout": 0}, "training": {"evalEverySteps": 3, "saveEverySteps": 50}}
    specs = {"first": rarely, "second": merged(rarely, {"training": {"seed": 5}}), "third": rarely}
    undisturbed = contexts(tmp_path / "undisturbed", tiny_llama, specs)
    together(undisturbed)
    jobs, stop = contexts(tmp_path / "stopped", tiny_llama, specs), StopRequest()
    with pytest.raises(Interrupted) as interrupted:
        together(jobs, [Recorded(), StopInEvaluation(stop), Recorded()], stop)
    assert interrupted.value.training_step == 3
    saved = [[folder.name for folder in job.workspace.checkpoints.glob("step-*")] for job in jobs]
    assert saved == [["step-3"]] * 3
    together(jobs)
    assert [adapter_bytes(job) for job in jobs] == [adapter_bytes(job) for job in undisturbed]


def test_one_that_diverges_leaves_the_others_as_they_are(fluent: Path, tmp_path: Path) -> None:
    training = {"learningRate": 1.0, "maxSteps": 40, "scheduler": "constant", "warmupSteps": 0, "evalEverySteps": 40}
    wild = {"lora": {"dropout": 0}, "training": {**training, "divergencePatience": 6}}
    # The wild one is judged after step 7; nothing but training makes the adapter of the plain one active after that.
    plain = merged(PLAIN, {"training": {"maxSteps": 10, "evalEverySteps": 10, "saveEverySteps": 10}})
    specs = {"plain": plain, "wild": wild, "wide": JOBS["wide"]}
    jobs = contexts(tmp_path / "together", fluent, specs)
    first, failed, last = together(jobs)
    assert isinstance(failed, StepFailure)
    assert failed.exit_code.reason == "Diverged"
    assert isinstance(first, TrainRecord)
    assert isinstance(last, TrainRecord)
    norms = [line["gradNorm"] for line in history(jobs[0]) if "gradNorm" in line]
    assert len(norms) == 10
    assert min(norms) > 0
    alone = contexts(tmp_path / "alone", fluent, {"plain": plain})
    run(alone[0])
    assert apart(jobs[0], alone[0]) < 0.02


def test_a_leader_that_diverges_leaves_its_curves_on_the_page_of_its_sweep(fluent: Path, tmp_path: Path) -> None:
    """Its train step is this one; each of the others leaves them in its own."""
    wild = merged(PLAIN, {"training": {"learningRate": 1.0, "maxSteps": 1, "scheduler": "constant", "warmupSteps": 0}})
    jobs = contexts(tmp_path, fluent, {"wild": wild, "wild-too": wild})
    shared = tmp_path / "shared"
    failed = together([replace(job, mounts=replace(job.mounts, sweep=shared)) for job in jobs])
    assert [failure.exit_code.reason for failure in failed] == ["Diverged"] * 2
    assert ", diverged" in (shared / "report.html").read_text()
    assert len(list((shared / "cells").glob("*.json"))) == 1


@pytest.mark.parametrize("broken", ["report/metrics.jsonl", "checkpoints"])
def test_one_whose_files_cannot_be_written_ends_alone(broken: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The first job has a file in place of a folder, or a folder in place of a file."""
    jobs = contexts(tmp_path, tiny_llama, {"bad": PLAIN, "wide": JOBS["wide"]})
    path = jobs[0].workspace.root / broken
    if broken == "report/metrics.jsonl":
        path.mkdir(parents=True)
    else:
        path.write_text("")
    failed, record = together(jobs)
    assert isinstance(failed, StepFailure)
    assert failed.exit_code.reason == "InternalError"
    assert isinstance(record, TrainRecord)
    assert [attempt.ended for job in jobs for attempt in read_attempts(job.workspace.records)] == [
        "failed",
        "succeeded",
    ]


# As safetensors says it, and as a checkpoint that is read back.
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
CHANGED = ValueError("adapter.safetensors has another sha256")


@pytest.mark.parametrize(
    ("function", "error", "reason"),
    [
        ("loop.save_checkpoint", FULL, "StorageFull"),
        pytest.param("loop.save_checkpoint", CHANGED, "InternalError", marks=pytest.mark.slow),
        pytest.param("finishing.save_adapter", FULL, "StorageFull", marks=pytest.mark.slow),
    ],
)
def test_one_whose_volume_is_full_or_bad_ends_alone(
    function: str, error: Exception, reason: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "full": JOBS["wide"]})
    module = import_module(f"qlora_trainer.training.{function.partition('.')[0]}")
    real = getattr(module, function.partition(".")[2])

    def write(*arguments: Any) -> Any:
        if any(isinstance(given, Path) and given.is_relative_to(tmp_path / "full") for given in arguments):
            raise error
        return real(*arguments)

    monkeypatch.setattr(module, function.partition(".")[2], write)
    record, failed = together(jobs)
    assert isinstance(record, TrainRecord)
    assert isinstance(failed, StepFailure)
    assert failed.exit_code.reason == reason


class DeletingAfterStep(Recorded):
    """Records that delete a folder during the step after the given one."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__()
        self._step, self._folder, self._seen = step, folder, 0

    def progress(self, record: Any, *, force: bool = False) -> None:
        super().progress(record, force=force)
        self._seen += record.training_step == self._step
        if self._seen == 2:
            shutil.rmtree(self._folder, ignore_errors=True)


@pytest.mark.slow
def test_one_whose_workspace_disappears_ends_alone(tiny_llama: Path, tmp_path: Path) -> None:
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "gone": JOBS["wide"], "long": JOBS["long"]})
    minutes = count(step=60.0)
    records = [DeletingAfterStep(3, jobs[1].workspace.root), Recorded(), Recorded()]
    first, failed, last = together(jobs, records, monotonic=lambda: next(minutes))
    assert isinstance(failed, StepFailure)
    assert "No such file or directory" in failed.message
    assert (first.training_step, last.training_step) == (6, 9)


@pytest.mark.slow
def test_one_whose_data_is_damaged_ends_alone(tiny_llama: Path, tmp_path: Path) -> None:
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "damaged": JOBS["wide"]})
    path = jobs[1].workspace.data / "rows" / "train.safetensors"
    path.write_bytes(b"junk" * 25)
    record, failed = together(jobs)
    assert isinstance(record, TrainRecord)
    assert isinstance(failed, StepFailure)
    assert f"{path} is damaged" in failed.message
    assert failed.exit_code is ExitCode.BAD_DATASET
    assert failed.message.endswith("prepare makes the rows again")


@pytest.mark.slow
def test_one_whose_checkpoint_is_of_another_adapter_ends_alone(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "other": JOBS["wide"]})
    interrupted_at(jobs[1], 2)
    monkeypatch.setattr(Checkpoint, "tensors", lambda _checkpoint, _name: {})
    record, failed = together(jobs)
    assert isinstance(record, TrainRecord)
    assert isinstance(failed, StepFailure)
    assert "step-2 does not fit the job" in failed.message


@pytest.mark.slow
def test_one_whose_answers_cannot_be_scored_ends_alone(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise ValueError("no tokenizer")

    monkeypatch.setattr("qlora_trainer.training.prepared_job.AnswerTexts", broken)
    scored = merged(PLAIN, {"gate": {"score": {"check": "exactMatch"}}})
    jobs = contexts(tmp_path, tiny_llama, {"scored": scored, "plain": PLAIN})
    failed, record = together(jobs)
    assert isinstance(record, TrainRecord)
    assert isinstance(failed, StepFailure)
    assert "cannot be loaded to score answers (no tokenizer)" in failed.message
    assert [read_attempts(job.workspace.records)[-1].ended for job in jobs] == ["failed", "succeeded"]

    # Its own step scores what is trained, and trains nothing.
    adapter, records = adapter_bytes(jobs[0]), Recorded()
    monkeypatch.undo()
    assert run(jobs[0], records=records).score is not None
    assert {entry["trainingStep"] for entry in records.written} == {6}
    assert adapter_bytes(jobs[0]) == adapter
    assert [attempt.ended for attempt in read_attempts(jobs[0].workspace.records)] == ["failed", "succeeded"]


@pytest.mark.slow
def test_one_that_has_ended_is_over_while_the_others_train(tiny_llama: Path, tmp_path: Path) -> None:
    short = merged(PLAIN, {"training": {"maxSteps": 3, "samples": 1}})
    jobs, stop = contexts(tmp_path, tiny_llama, {"short": short, "long": JOBS["long"]}), StopRequest()
    with pytest.raises(Interrupted):
        together(jobs, [Recorded(), StopAtStep(6, stop)], stop)
    ended = [read_attempts(job.workspace.records)[-1].ended for job in jobs]
    assert ended == ["succeeded", "interrupted"]
    adapter, samples = adapter_bytes(jobs[0]), jobs[0].workspace.report / "samples.json"
    assert not samples.exists()
    run(jobs[0])
    assert len(json.loads(samples.read_text())["samples"]) == 1
    assert adapter_bytes(jobs[0]) == adapter


@pytest.mark.slow
def test_each_has_the_peak_memory_of_the_step_of_all(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing resets the peak that is measured, as on a GPU."""
    peak = 0

    def losses(*arguments: Any) -> Any:
        nonlocal peak
        peak = 1000
        return joint_losses(*arguments)

    def reset(_device: str) -> int:
        nonlocal peak
        was, peak = peak, 0
        return was

    monkeypatch.setattr("qlora_trainer.training.joint_training.joint_losses", losses)
    monkeypatch.setattr("qlora_trainer.training.loop.peak_memory_bytes", lambda _device: peak)
    monkeypatch.setattr("qlora_trainer.training.loop.memory_bytes", reset)
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "wide": JOBS["wide"]})
    ticks = count()
    assert [record.peak_memory_bytes for record in together(jobs, monotonic=lambda: float(next(ticks)))] == [1000] * 2
    lines = [
        [json.loads(line) for line in (job.workspace.report / "metrics.jsonl").read_text().splitlines()] for job in jobs
    ]
    steps = [[line for line in of_job if "loss" in line] for of_job in lines]
    assert {line["memoryBytes"] for of_job in steps for line in of_job} == {1000}


@pytest.mark.slow
def test_one_that_has_ended_keeps_no_memory_of_its_training(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[int, ...]] = []

    def watched(members: Sequence[Member]) -> Iterator[tuple[Member, Ended]]:
        for member, ended in run_together(members):
            yield member, ended
            # The state of all, when the next one has ended.
            kept.append(tuple(len(each.run.optimizer.state) for each in members))

    monkeypatch.setattr("qlora_trainer.steps.train_together.run_together", watched)
    short = merged(PLAIN, {"training": {"maxSteps": 3}})
    together(contexts(tmp_path, tiny_llama, {"short": short, "plain": PLAIN}))
    assert kept[0][0] > 0
    assert kept[1][0] == 0
    assert kept[1][1] > 0


@pytest.mark.slow
def test_one_that_is_left_is_not_trained_in_layers_that_cannot_tell_its_tokens(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_layer(_model: object) -> None:
        raise ModelError("a layer")

    monkeypatch.setattr("qlora_trainer.steps.train_together.require_apart", no_layer)
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "damaged": JOBS["wide"]})
    (jobs[1].workspace.data / "rows" / "train.safetensors").write_bytes(b"junk")
    with pytest.raises(StepFailure, match="tiny cannot be trained together") as failure:
        together(jobs)
    assert failure.value.exit_code.reason == "BadConfiguration"


@pytest.mark.slow
def test_the_threads_of_a_process_are_those_of_any_checkpoint(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, before = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "wide": JOBS["wide"]}), torch.get_num_threads()
    monkeypatch.setattr("qlora_trainer.training.open_run._own_threads", lambda _rank: 2)
    interrupted_at(jobs[1], 2)
    monkeypatch.setattr("qlora_trainer.training.open_run._own_threads", lambda _rank: 1)
    try:
        together(jobs)
    finally:
        torch.set_num_threads(before)
    threads = [json.loads((job.workspace.checkpoints / "step-6/state.json").read_text())["threads"] for job in jobs]
    assert threads == [2, 2]


def test_too_little_memory_for_all_says_how_many_they_were(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing raises what CUDA does."""

    def out_of_memory(_members: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qlora_trainer.steps.train_together.run_together", out_of_memory)
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "unprepared": PLAIN, "wide": JOBS["wide"]})
    jobs[1].workspace.completion("prepare").unlink()
    with pytest.raises(StepFailure, match=r"with 2 jobs on one base: train fewer of them together") as failure:
        together(jobs)
    assert failure.value.exit_code.reason == "GPUOutOfMemory"
    assert [read_attempts(job.workspace.records)[-1].ended for job in (jobs[0], jobs[2])] == ["failed", "failed"]


def test_one_that_another_pod_still_trains_is_left_to_that(tiny_llama: Path, tmp_path: Path) -> None:
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "wide": JOBS["wide"]})
    with only_attempt(jobs[1].workspace.records):
        record, busy = together(jobs)
    assert isinstance(record, TrainRecord)
    assert isinstance(busy, StepFailure)
    assert busy.exit_code.reason == "Unreachable"


def test_those_that_are_trained_already_take_no_part(tiny_llama: Path, tmp_path: Path) -> None:
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "wide": JOBS["wide"]})
    expected = run(jobs[0])
    again, _ = together(jobs)
    assert again == expected


def test_the_command_reports_each_job_by_uid_and_their_steps_find_them_trained(
    tiny_llama: Path, tmp_path: Path
) -> None:
    jobs = contexts(tmp_path / "lr=1e-4", tiny_llama, {"plain": PLAIN, "wide": JOBS["wide"]})
    documents = []
    for number, job in enumerate(jobs):
        metadata = {"name": f"job-{number}", "uid": f"uid-{number}"}
        documents.append(tmp_path / f"{number}.json")
        documents[-1].write_text(json.dumps({**job.document.dump(), "metadata": metadata}))
    first, second = (job.workspace.root for job in jobs)
    done = trained(documents[0], first, "--with", str(documents[1]), str(second))
    assert done.returncode == 0, done.stdout + done.stderr
    for uid in ("uid-0", "uid-1"):
        found = [decode_record(line, job_uid=uid, pod_uid=POD_UID) for line in done.stdout.splitlines()]
        steps = [record.training_step for record in found if isinstance(record, ProgressRecord)]
        assert steps[-1] == 6, uid
    attempts = [read_attempts(job.workspace.records)[-1].job_attempt for job in jobs]
    assert attempts == [1, 0], "five pods of the first that are killed do not keep the second from its own step"
    adapter = adapter_bytes(jobs[1])
    again = trained(documents[1], second)
    result = decode_record(again.stdout.splitlines()[-1], job_uid="uid-1", pod_uid=POD_UID)
    assert isinstance(result, ResultRecord)
    assert (result.exit_code, result.training_step) == (0, 6)
    assert "Loading weights" not in (second / "records" / "train.log").read_text()
    assert adapter_bytes(jobs[1]) == adapter


def trained(job: Path, workspace: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """The train step's process, after its end."""
    command = ["train", "--job", str(job), "--workspace", str(workspace), "--device", "cpu", "--pod-uid", POD_UID]
    return subprocess.run(
        [sys.executable, "-m", "qlora_trainer", *command, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"lora": {"dropout": 0.1}}, "spec.lora.dropout"),
        ({"lora": {"dropout": 0, "useDora": True}}, "spec.lora.useDora"),
        ({"lora": {"dropout": 0}, "quantization": {"type": "fp4"}}, "4-bit base"),
        ({"lora": {"dropout": 0}, "training": {"gradientCheckpointing": False}}, "gradientCheckpointing"),
    ],
)
def test_what_cannot_be_shared_is_named(spec: dict[str, Any], named: str, tiny_llama: Path, tmp_path: Path) -> None:
    jobs = contexts(tmp_path, tiny_llama, {"plain": PLAIN, "other": merged({}, spec)})
    with pytest.raises(StepFailure, match=named) as failure:
        together(jobs)
    assert failure.value.exit_code.reason == "BadConfiguration"


def test_a_workspace_is_of_one_job(tiny_llama: Path, tmp_path: Path) -> None:
    [job] = contexts(tmp_path, tiny_llama, {"plain": PLAIN})
    with pytest.raises(StepFailure, match="is the workspace of two jobs: give each job its own") as failure:
        together([job, job])
    assert failure.value.exit_code.reason == "BadConfiguration"
