"""A run on this machine is shown as a cluster would show it, from the records of its steps."""

from typing import Any, Literal

import pytest

from qlora_api.contract import ProgressRecord, Record, ResultRecord
from qlora_api.status import AdapterStatus, Phase, QLoRAJobStatus, StepName
from qlora_client.jobs.job import Job
from qlora_client.local_status import local_status

STARTED, TIME = "2026-01-02T03:04:05Z", "2026-01-02T03:05:00Z"
ADAPTER = AdapterStatus(
    uri="/runs/demo/adapter",
    sha256="a" * 64,
    size_bytes=1,
    base_model="hf://org/model",
    base_revision="c0ffee",
    rank=8,
    quantization="nf4",
)


def progress(step: StepName, **fields: Any) -> ProgressRecord:
    return ProgressRecord(job_uid="local", pod_uid="p", step=step, time=TIME, **fields)


def result(
    step: StepName, outcome: Literal["succeeded", "failed", "interrupted"] = "succeeded", **fields: Any
) -> ResultRecord:
    values = {"exit_code": 0, "reason": "Done", "message": f"{step} is done", **fields}
    return ResultRecord(job_uid="local", pod_uid="p", step=step, time=TIME, outcome=outcome, **values)


TRAINED = result("train", training_step=10, total_steps=10, loss=1.5, eval_loss=2.25, peak_memory_bytes=7)
PUBLISHED = result("publish", adapter=ADAPTER, report_sha256="b" * 64)


def shown(*records: Record, runs: bool = True, error: str = "") -> QLoRAJobStatus:
    return local_status(records, STARTED, runs=runs, error=error)


@pytest.mark.parametrize(
    ("records", "runs", "phase"),
    [
        ((), True, "Preparing"),
        ((progress("prepare", activity="tokenizing"),), True, "Preparing"),
        ((result("prepare"),), True, "Training"),
        ((result("prepare"), progress("train", training_step=3, total_steps=10)), True, "Training"),
        ((result("prepare"), TRAINED), True, "Publishing"),
        ((result("prepare"), TRAINED, PUBLISHED), False, "Succeeded"),
        ((result("train", "interrupted"),), False, "Suspended"),
        ((result("train", "interrupted"), TRAINED, PUBLISHED), False, "Succeeded"),
        ((result("train", "failed", exit_code=13, reason="GPUOutOfMemory"),), False, "Failed"),
        ((progress("train"),), False, "Failed"),
        ((), False, "Failed"),
    ],
)
def test_the_phase_is_that_of_the_latest_record(records: tuple[Record, ...], runs: bool, phase: Phase) -> None:
    assert shown(*records, runs=runs).phase == phase


def test_figures_are_those_of_a_cluster() -> None:
    running = shown(progress("train", training_step=3, total_steps=10, loss=2.0, remaining_seconds=70))
    assert running.progress is not None
    assert (running.progress.summary, running.progress.remaining) == ("30% 3/10", "1m10s")
    assert running.completion_time is None
    ended = shown(TRAINED, PUBLISHED, runs=False)
    assert ended.progress is not None
    assert (ended.progress.eval_loss, ended.progress.percent, ended.progress.remaining) == (2.25, 100, "")
    assert ended.adapter == ADAPTER
    assert ended.report is not None
    assert ended.report.uri == "/runs/demo/adapter/report.html"
    assert (ended.start_time, ended.completion_time) == (STARTED, TIME)


def message(status: QLoRAJobStatus) -> str:
    return Job({"metadata": {}, "status": status.dump()}).message


def test_a_failure_has_its_reason_and_a_process_that_was_killed_its_last_words() -> None:
    failed = shown(result("prepare", "failed", exit_code=11, reason="BadDataset", message="row 3"), runs=False)
    assert message(failed) == "BadDataset: row 3"
    assert failed.last_failure is not None
    assert (failed.last_failure.exit_code, failed.last_failure.step) == (11, "prepare")
    assert message(shown(progress("train"), runs=False, error="Killed")) == "Killed"
    assert message(shown(runs=False)) == "the process has ended without a result"


def test_a_job_whose_process_is_about_to_end_has_ended() -> None:
    ending = shown(TRAINED, PUBLISHED)
    assert (ending.phase, ending.completion_time) == ("Succeeded", TIME)
    assert [(condition.type, condition.status) for condition in ending.conditions] == [("Succeeded", "True")]
    assert shown(result("train", "interrupted"), runs=False).completion_time is None
