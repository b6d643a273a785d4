"""Of jobs that are trained together, one that fails or has ended leaves the others as they are."""

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from qlora_api.contract import ExitCode
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.failures import Interrupted, StepFailure, StopRequest
from qlora_trainer.evaluation.answers import Answering
from qlora_trainer.evaluation.held_out import mean_loss
from qlora_trainer.evaluation.prompts import Prompt
from qlora_trainer.training import guard_losses
from qlora_trainer.training.checkpoints.attempts import read_attempts
from qlora_trainer.training.checkpoints.checkpoint import Checkpoint
from tests.support.manifests import merged
from tests.support.models.tiny import Recorded
from tests.support.runs.together import JOBS, PLAIN, apart, contexts, together
from tests.support.training import StopAtStep, adapter_bytes, guard_by_held_out, history, interrupted_at, run


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


# As the operating system says it, as safetensors does, and as a checkpoint that is read back.
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
CHANGED = ValueError("adapter.safetensors has another sha256")


@pytest.mark.parametrize(
    ("function", "error", "reason"),
    [
        ("loop.save_checkpoint", NO_SPACE, "StorageFull"),
        pytest.param("loop.save_checkpoint", CHANGED, "InternalError", marks=pytest.mark.slow),
        pytest.param("finish_run.save_adapter", FULL, "StorageFull", marks=pytest.mark.slow),
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


def test_the_base_answers_rows_once_for_all_jobs_with_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = merged(PLAIN, {"gate": {"score": {"check": "exactMatch", "maxNewTokens": 4}}})
    longer = merged(scored, {"gate": {"score": {"maxNewTokens": 5}}})
    jobs = contexts(tmp_path, tiny_llama, {"one": scored, "two": merged(scored, {"lora": {"rank": 8}}), "long": longer})
    asked: list[tuple[bool, int]] = []
    answers = Answering.answers

    def counted(self: Answering, prompts: Sequence[Prompt], *, adapter: bool, max_new_tokens: int) -> list[str]:
        asked.append((adapter, max_new_tokens))
        return answers(self, prompts, adapter=adapter, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(Answering, "answers", counted)
    records = together(jobs)

    scores = [record.score for record in records if isinstance(record, TrainRecord)]
    assert [score is not None for score in scores] == [True] * 3
    # The adapters' samples are answered one by one, and not scored.
    assert [tokens for adapter, tokens in asked if not adapter and tokens in (4, 5)] == [4, 5]
    assert [tokens for adapter, tokens in asked if adapter and tokens in (4, 5)] == [4, 4, 5]


def test_guards_are_measured_before_answers_and_with_one_loss_of_the_base_for_all(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guards have the packed rows of the evaluation: after an answer, these would see each other."""
    guard = {"name": "near", "source": "pvc://data/near.jsonl", "maxLossIncrease": 1, "minScore": 0}
    guarded = merged(PLAIN, {"gate": {"score": {"check": "exactMatch", "maxNewTokens": 4}, "guards": [guard]}})
    jobs = contexts(tmp_path, tiny_llama, {"one": guarded, "two": merged(guarded, {"lora": {"rank": 8}})})
    computed = count()

    def counted(*arguments: Any) -> float:
        next(computed)
        return mean_loss(*arguments)

    monkeypatch.setattr(guard_losses, "mean_loss", counted)
    records = together([guard_by_held_out(job) for job in jobs])

    assert next(computed) == 3
    for record in records:
        assert isinstance(record, TrainRecord)
        (measured,) = record.guards
        assert measured.loss == pytest.approx(record.eval_loss, rel=1e-3)
        assert measured.base_loss == pytest.approx(record.initial_eval_loss, rel=1e-3)
        assert measured.tokens == record.eval_tokens
        assert measured.score == record.score


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
