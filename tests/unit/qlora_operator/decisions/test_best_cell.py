"""With spec.publish: best, one more QLoRAJob publishes the adapter of the best cell."""

from typing import Any

import pytest

from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decisions.observed.objects import Reason
from qlora_operator.decisions.sweeps.best_cell import cells_to_publish, published
from qlora_operator.decisions.sweeps.plan import CreateCell, SetCleanup, SetSuspend, next_status, plan, table
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep, cleanup, parse_cell, parse_sweep
from tests.support.builders import ADAPTER, NOW, UID, condition, job_body, present
from tests.support.sweeps import TEMPLATE

OUTPUT = {"destination": "hf://org/adapter", "secretRef": {"name": "hub"}, "merged": {"destination": "hf://org/merged"}}
HERE = "pvc://rates/adapter"
OWNER = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "name": "rates", "uid": UID, "controller": True}


def sweep(status: QLoRASweepStatus | None = None, **spec: Any) -> QLoRASweep:
    template = TEMPLATE | {"output": OUTPUT, "cleanupAfterSeconds": 60}
    cells = [{"rank": 8}, {"rank": 16}, {"rank": 32}]
    content = {"template": {"spec": template}, "cells": cells, "publish": "best", "parallelism": 3, **spec}
    metadata = {"namespace": "team", "name": "rates", "uid": UID, "generation": 1, "resourceVersion": "7"}
    return parse_sweep({"metadata": metadata, "spec": content, "status": status.dump() if status else {}})


def cell(number: int, eval_loss: float = 0.0, phase: str = "Succeeded", **fields: Any) -> CellJob:
    found = {"eval_loss": eval_loss, "adapter": f"pvc://rates/{number}"} if phase == "Succeeded" else {}
    values = {"suspend": False, "suspended_by_sweep": False, **found, **fields}
    return CellJob(f"rates-{number:02}", f"uid-{number}", phase, **values)  # type: ignore[arg-type]


def publisher(phase: str = "Training", **fields: Any) -> CellJob:
    values = {"suspend": False, "suspended_by_sweep": False, "continues": "rates-01", **fields}
    return CellJob("rates-best", "uid-best", phase, **values)  # type: ignore[arg-type]


CELLS = (cell(0, 1.5), cell(1, 1.25), cell(2, phase="Failed"))


def actions(stored: QLoRASweep, *jobs: CellJob, objection: Reason | None = None) -> list[Any]:
    return list(plan(stored, stored.cells(), {job.name: job for job in jobs}, objection))


def status_of(stored: QLoRASweep, *jobs: CellJob) -> QLoRASweepStatus:
    by_name = {job.name: job for job in jobs}
    lines = table(stored, stored.cells(), by_name)
    return next_status(stored, lines, None, None, NOW, published(stored, lines, by_name))


def succeeded(status: QLoRASweepStatus) -> tuple[str, str]:
    (found,) = [entry for entry in status.conditions if entry.type == "Succeeded"]
    return found.reason, found.message


def test_cells_publish_nowhere_and_keep_their_checkpoints() -> None:
    for each in sweep().cells():
        assert each.spec.output.dump() == {}
        assert each.spec.cleanup_after_seconds is None
        assert each.spec.workspace.claim_name == "rates-0a1b2c3d"


def test_when_all_have_ended_one_job_resumes_the_best_run_and_publishes_it() -> None:
    assert actions(sweep(status_of(sweep(), *CELLS[:2])), *CELLS[:2], cell(2, phase="Training")) == []
    retried = cell(2, phase="Failed", retried=True)
    assert actions(sweep(status_of(sweep(), *CELLS)), *CELLS[:2], retried) == []
    stored = sweep(status_of(sweep(), *CELLS))
    assert (stored.status.phase, stored.status.completion_time) == ("Running", None)
    assert actions(stored, *CELLS, objection=Reason("ProfileNotFound", "")) == []
    (action,) = actions(stored, *CELLS)
    assert isinstance(action, CreateCell)
    best = action.cell
    assert (best.name, best.spec.continues, best.spec.lora.rank) == ("rates-best", "rates-01", 16)
    assert best.spec.output.dump() == OUTPUT
    assert best.spec.cleanup_after_seconds == 60
    assert best.spec.workspace.claim_name == "rates-0a1b2c3d"
    assert actions(stored, *CELLS, publisher()) == []


def test_it_is_made_of_the_current_best_cell() -> None:
    stored = sweep(status_of(sweep(), *CELLS))
    status = {"phase": "Succeeded", "adapter": ADAPTER.dump(), "progress": {"evalLoss": 1.25}}
    body = job_body(status, resources={"memory": "64Gi"})
    body["metadata"] |= {"name": "rates-01", "ownerReferences": [OWNER]}
    (action,) = actions(stored, CELLS[0], present(parse_cell(body, UID)), CELLS[2])
    assert (action.cell.spec.resources.memory, action.cell.spec.model.revision) == ("64Gi", ADAPTER.base_revision)


def test_the_sweep_ends_with_that_job_and_has_its_address() -> None:
    status = status_of(sweep(), *CELLS, publisher())
    assert (status.phase, status.summary) == ("Running", "3/3")
    assert succeeded(status) == ("Running", "QLoRAJob rates-best publishes the adapter of rates-01")
    done = publisher("Succeeded", adapter="hf://org/adapter", sha256="a" * 64)
    status = status_of(sweep(status), *CELLS, done)
    assert status.phase == "Succeeded"
    assert status.completion_time is not None
    assert status.published is not None
    assert (status.published.cell, status.published.adapter) == ("rates-01", "hf://org/adapter")
    assert "its adapter is at hf://org/adapter; 1 of 3 cells have failed" in succeeded(status)[1]
    # It is not published again, although its job is deleted or another cell is the best now.
    later = (*CELLS[:2], cell(2, 1.0))
    assert actions(sweep(status), *later) == []
    assert status_of(sweep(status), *later).published == status.published


def test_then_the_cells_are_cleaned_up_as_in_the_template() -> None:
    done = publisher("Succeeded", adapter="hf://org/adapter")
    stored = sweep(status_of(sweep(), *CELLS, done))
    assert actions(stored, *CELLS, done) == [SetCleanup(each, 60) for each in CELLS]
    this_one = {"uid": "uid-0", "resourceVersion": ""}
    assert cleanup(CELLS[0], 60) == {"metadata": this_one, "spec": {"cleanupAfterSeconds": 60}}
    cleaned = [cell(number, 1.0, cleanup_after_seconds=60) for number in range(3)]
    assert actions(stored, *cleaned, done) == []
    assert actions(stored, *CELLS, publisher("Failed")) == []


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ((*CELLS, publisher("Failed", reason="Unreachable")), "has failed (Unreachable): its condition Failed"),
        (CELLS, "was deleted before its end: create a QLoRAJob with the spec of rates-01"),
    ],
    ids=["failed", "deleted"],
)
def test_a_best_adapter_that_could_not_be_published_fails_the_sweep(jobs: Any, message: str) -> None:
    stored = sweep(status_of(sweep(), *CELLS, publisher()))
    status = status_of(stored, *jobs)
    assert status.phase == "Failed"
    reason, sentence = succeeded(status)
    assert reason == "BestNotPublished"
    assert message in sentence
    assert status.best is not None
    retried = status_of(sweep(status), *CELLS, publisher("Training"))
    assert retried.phase == "Running"


def test_the_run_of_a_deleted_best_cell_cannot_be_resumed() -> None:
    stored = sweep(status_of(sweep(), *CELLS[:2], cell(2, phase="Training")))
    left = (CELLS[0], CELLS[2])
    assert actions(stored, *left) == []
    status = status_of(stored, *left)
    assert (status.phase, succeeded(status)[0]) == ("Failed", "BestNotPublished")
    assert "its run cannot be taken up" in succeeded(status)[1]


def test_the_next_best_cell_is_published_after_a_deletion() -> None:
    stored = sweep(status_of(sweep(), *CELLS[:2], cell(2, phase="Training")))
    stored = sweep(status_of(stored, CELLS[0], cell(2, phase="Failed")))
    assert stored.status.published is not None
    assert (stored.status.published.cell, stored.status.published.phase) == ("rates-01", "Deleted")
    better = (CELLS[0], cell(2, 1.0))
    (action,) = [each for each in actions(stored, *better) if isinstance(each, CreateCell)]
    assert (action.cell.name, action.cell.spec.continues) == ("rates-best", "rates-02")
    assert cells_to_publish(sweep(status_of(stored, *better))) == ["rates-02"]
    assert status_of(stored, *better).phase == "Running"


def test_it_is_suspended_with_its_sweep() -> None:
    suspended = sweep(status_of(sweep(), *CELLS, publisher()), suspend=True)
    assert actions(suspended, *CELLS, publisher()) == [SetSuspend(publisher(), True)]
    assert actions(sweep(status_of(sweep(), *CELLS), suspend=True), *CELLS) == []


def test_a_suspended_sweep_is_suspended_when_that_job_is_too() -> None:
    suspended = sweep(status_of(sweep(), *CELLS, publisher()), suspend=True)
    saving = status_of(suspended, *CELLS, publisher(suspend=True))
    assert (saving.phase, succeeded(saving)[0]) == ("Running", "Suspending")
    assert status_of(suspended, *CELLS, publisher("Suspended", suspend=True)).phase == "Suspended"
    assert status_of(sweep(suspend=True), *CELLS).phase == "Suspended", "it is not created now"


def test_the_sweep_reports_why_that_job_does_not_start() -> None:
    stored = sweep(status_of(sweep(), *CELLS))
    why = Reason("JobLimitReached", "3 jobs of profile 'default' have started")
    status = status_of(stored, *CELLS, publisher("Pending", waits=why))
    assert (status.phase, succeeded(status)[0]) == ("Running", "JobLimitReached")
    assert f"rates-best, which is to publish the adapter of rates-01, waits: {why.sentence}" in succeeded(status)[1]
    assert status.published is not None
    assert (status.published.reason, status.published.message) == (why.word, why.sentence)
    longer = status_of(stored, *CELLS, publisher("Pending", waits=Reason("ContinuedJobNotFound", "a" * 1024)))
    assert QLoRASweepStatus.model_validate(longer.dump()) == longer


def test_the_reason_of_a_waiting_job_is_read_until_it_starts() -> None:
    def waits(reason: str, phase: str = "Pending", **status: Any) -> Reason | None:
        conditions = [condition("Succeeded", "Unknown", reason=reason) | {"message": "it waits"}]
        body = job_body({"phase": phase, "conditions": conditions, **status})
        body["metadata"] |= {"ownerReferences": [OWNER]}
        found = present(parse_cell(body, UID))
        assert found.started == ("currentRevision" in status)
        return found.waits

    assert waits("ContinuedJobRunning") == Reason("ContinuedJobRunning", "it waits")
    assert waits("Pending") is None, "nothing keeps it"
    assert waits("Retrying", "Preparing") is None
    assert waits("JobRejected", currentRevision="tune-1-0") == Reason("JobRejected", "it waits")


def test_without_an_adapter_no_job_is_created_to_publish_it() -> None:
    failed = [cell(number, phase="Failed") for number in range(3)]
    status = status_of(sweep(), *failed)
    assert (status.phase, succeeded(status)[0]) == ("Failed", "AllCellsFailed")
    assert actions(sweep(status), *failed) == []
