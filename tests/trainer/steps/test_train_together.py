"""Jobs that are trained together end as each of them does alone."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_api.contract import ProgressRecord, WorkspaceLayout, decode_record
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.context import load_document
from qlora_trainer.core.cpu import ENV_COMPUTE_TYPE
from qlora_trainer.core.failures import Interrupted, StepFailure, StopRequest
from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.joint import joint_losses
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.training import joint_training
from qlora_trainer.training.checkpoints.attempts import only_attempt, read_attempts
from qlora_trainer.training.joint_training import Ended, Member, run_together
from tests.support.manifests import merged
from tests.support.models.tiny import POD_UID, Recorded, chat_row, write_rows
from tests.support.resolved import OPEN
from tests.support.runs.forked_step import start_forked
from tests.support.runs.together import JOBS, PLAIN, apart, contexts, together
from tests.support.training import StopAtStep, adapter_bytes, context_of, history, interrupted_at, run
from tests.trainer.conftest import MakeContext


@pytest.mark.parametrize("compute_type", ["bfloat16", "float32"])
def test_each_ends_as_alone(
    compute_type: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_COMPUTE_TYPE, compute_type)
    jobs = contexts(tmp_path / "together", tiny_llama)
    for job, alone, result in zip(jobs, contexts(tmp_path / "alone", tiny_llama), together(jobs), strict=True):
        expected = run(alone)
        assert isinstance(result, TrainRecord)
        assert expected.compute_type == compute_type
        same = ("fingerprint", "training_step", "total_steps", "base_sha256", "compute_type")
        assert {name: getattr(result, name) for name in same} == {name: getattr(expected, name) for name in same}
        assert result.loss == pytest.approx(expected.loss, rel=1e-2)
        assert result.eval_loss == pytest.approx(expected.eval_loss, rel=1e-2)
        steps = [(line["step"], sorted(line)) for line in history(alone)]
        assert [(line["step"], sorted(line)) for line in history(job)] == steps
        assert apart(job, alone) < 0.02


def test_a_joint_pass_that_runs_out_of_memory_is_repeated_in_parts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, jobs = contexts(tmp_path / "undisturbed", tiny_llama), contexts(tmp_path / "short", tiny_llama)
    together(undisturbed)
    passes, after = count(1), list[int]()

    def limited(model: Any, batches: Mapping[str, Batch]) -> Any:
        number = next(passes)
        if number > 6:
            after.append(len(batches))
        elif number == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return joint_losses(model, batches)

    monkeypatch.setattr(joint_training, "joint_losses", limited)
    together(jobs)
    assert set(after) == {1}
    for job, expected in zip(jobs, undisturbed, strict=True):
        assert [line["step"] for line in history(job)] == [line["step"] for line in history(expected)]
        assert apart(job, expected) < 0.02


def test_jobs_that_leave_settings_open_are_trained_together(make_context: MakeContext, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods") for n in range(8)])
    jobs = []
    for name, steps in (("first", 2), ("second", 3)):
        context = make_context(merged(OPEN, {"training": {"maxSteps": steps}}))
        jobs.append(replace(context, workspace=WorkspaceLayout(tmp_path / name), group_size=2))
        settings = {each.name: each.parsed for each in prepare(jobs[-1], Recorded()).settings}
        assert settings["autoMicroBatch"] is False
    assert [record.training_step for record in together(jobs)] == [2, 3]


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


@pytest.mark.usefixtures("one_thread")
def test_the_command_reports_each_job_by_uid_and_their_steps_find_them_trained(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = contexts(tmp_path / "lr=1e-4", tiny_llama, {"plain": PLAIN, "wide": JOBS["wide"]})
    documents = []
    for number, job in enumerate(jobs):
        metadata = {"name": f"job-{number}", "uid": f"uid-{number}"}
        documents.append(tmp_path / f"{number}.json")
        documents[-1].write_text(json.dumps({**job.document.dump(), "metadata": metadata}))
    first, second = (job.workspace.root for job in jobs)
    command = ["--job", str(documents[0]), "--workspace", str(first), "--with", str(documents[1]), str(second)]
    command = ["python", "-m", "qlora_trainer", "train", *command, "--device", "cpu", "--pod-uid", POD_UID]
    process = start_forked(command, os.environ, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    for uid in ("uid-0", "uid-1"):
        found = [decode_record(line, job_uid=uid, pod_uid=POD_UID) for line in output.splitlines()]
        steps = [record.training_step for record in found if isinstance(record, ProgressRecord)]
        assert steps[-1] == 6, uid
    attempts = [read_attempts(job.workspace.records)[-1].job_attempt for job in jobs]
    assert attempts == [1, 0], "five pods of the first that are killed do not keep the second from its own step"
    # The step of the second job loads nothing.
    monkeypatch.setattr("qlora_trainer.steps.train.open_run", None)
    assert run(context_of(second, load_document(documents[1]))).training_step == 6


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
