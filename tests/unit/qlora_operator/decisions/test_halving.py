"""The cells of a sweep that continue after a rung, the stopped ones, and their status in the sweep."""

from typing import Any

import pytest

from qlora_api.contract import MAX_PROGRESS_BYTES, ProgressRecord, ResultRecord, encode_record
from qlora_api.figures import with_progress, with_training_facts
from qlora_api.status_types import MAX_RUNGS
from qlora_api.sweep.halving import HalvingSpec
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.stored_job import parse_job
from qlora_operator.decisions.sweeps.halving import has_new_verdict
from qlora_operator.decisions.sweeps.plan import CreateCell, SetSuspend, StopCell, next_status, plan, table
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep, build_cell, parse_cell, parse_sweep, stop
from qlora_operator.kube.listing import compact
from tests.support.builders import ADAPTER, NOW, UID, job_body, present, progress, resolved, status_in, time
from tests.support.sweeps import SWEEP, TEMPLATE

TRAINING = {"training": {"maxSteps": 100, "evalEverySteps": 10}}
OWNER = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "name": "rates", "uid": UID, "controller": True}
WHY = "stopped at step 20: 3rd of 4, the best 2 go on"


def sweep(status: QLoRASweepStatus | None = None, **spec: Any) -> QLoRASweep:
    content = SWEEP["spec"] | {
        "template": {"spec": TEMPLATE | TRAINING},
        "halving": {"minSteps": 20, "factor": 2},
        "parallelism": 4,
        **spec,
    }
    metadata = {"namespace": "team", "name": "rates", "uid": UID, "generation": 1, "resourceVersion": "7"}
    return parse_sweep({"metadata": metadata, "spec": content, "status": status.dump() if status else {}})


def cell(number: int, *losses: float, phase: str = "Training", **fields: Any) -> CellJob:
    """A cell with its losses at the rungs 20, 40 and 80."""
    evaluations = tuple(zip((20, 40, 80), losses, strict=False))
    values = {"suspend": False, "suspended_by_sweep": False, "total_steps": 100, "evaluations": evaluations, **fields}
    return CellJob(f"rates-{number:02}", f"uid-{number}", phase, **values)  # type: ignore[arg-type]


def by_name(*jobs: CellJob) -> dict[str, CellJob]:
    return {job.name: job for job in jobs}


def after_pass(stored: QLoRASweep, *jobs: CellJob) -> QLoRASweep:
    """The sweep with the status that a pass has stored."""
    lines = table(stored, stored.cells(), by_name(*jobs))
    return sweep(
        next_status(stored, lines, None, None, NOW),
        parallelism=stored.spec.parallelism,
        suspend=stored.spec.suspend,
    )


def actions(stored: QLoRASweep, *jobs: CellJob) -> list[Any]:
    return list(plan(stored, stored.cells(), by_name(*jobs), None))


def verdicts(stored: QLoRASweep) -> list[list[tuple[int, int, int, bool]]]:
    return [
        [(rung.step, rung.rank, rung.cells, rung.goes_on) for rung in line.rungs or ()] for line in stored.status.cells
    ]


def test_rungs_are_a_factor_apart_and_end_before_the_run_does() -> None:
    halving = HalvingSpec(min_steps=10, factor=3)
    assert halving.rungs(270) == (10, 30, 90)
    assert len(halving.rungs()) == MAX_RUNGS
    assert [halving.kept(cells) for cells in (1, 2, 3, 8, 9)] == [1, 1, 1, 2, 3]


def test_cells_that_reach_a_rung_together_are_compared_and_the_better_continue() -> None:
    jobs = (cell(0, 1.4), cell(1, 1.1), cell(2, 1.3), cell(3, 1.2))
    assert has_new_verdict(sweep(), table(sweep(), sweep().cells(), by_name(*jobs)))
    stored = after_pass(sweep(), *jobs)
    assert verdicts(stored) == [[(20, 4, 4, False)], [(20, 1, 4, True)], [(20, 3, 4, False)], [(20, 2, 4, True)]]
    assert [action.cell.name for action in actions(stored, *jobs)] == ["rates-00", "rates-02"]
    assert all(isinstance(action, StopCell) for action in actions(stored, *jobs))
    assert actions(stored, *jobs)[1].why == WHY
    assert not has_new_verdict(stored, table(stored, stored.cells(), by_name(*jobs)))


def test_one_after_the_other_each_cell_is_compared_with_those_before_it() -> None:
    stored = sweep(parallelism=1)
    stored = after_pass(stored, cell(0, 1.5))
    assert verdicts(stored)[0] == [(20, 1, 1, True)], "the first has nobody to lose to"
    first = cell(0, 1.5, 1.4, 1.3, phase="Succeeded", eval_loss=1.3, adapter="pvc://a/b")
    stored = after_pass(stored, first, cell(1, 1.6))
    assert verdicts(stored)[1] == [(20, 2, 2, False)]
    stopped = cell(1, 1.6, phase="Suspended", suspend=True, stopped_by_sweep=True)
    stored = after_pass(stored, first, stopped, cell(2, 1.2))
    assert verdicts(stored)[2] == [(20, 1, 3, True)]
    assert verdicts(stored)[0] == [(20, 1, 1, True), (40, 1, 1, True), (80, 1, 1, True)]


def test_a_stored_verdict_stays() -> None:
    """An operator killed after the write must decide the same when it restarts."""
    stored = after_pass(sweep(), cell(0, 1.0), cell(1, 1.2))
    assert verdicts(stored)[1] == [(20, 2, 2, False)]
    later = (cell(0, 1.0), cell(1, 1.2), cell(2, 1.3), cell(3, 1.4))
    stored = after_pass(stored, *later)
    assert verdicts(stored)[1] == [(20, 2, 2, False)]
    assert [action.cell.name for action in actions(stored, *later)] == ["rates-01", "rates-02", "rates-03"]


def test_a_cell_that_ran_past_its_rung_is_stopped_by_that_rung() -> None:
    jobs = (cell(0, 1.0, 0.9, 0.8), cell(1, 1.2, 0.5, 0.4))
    stored = after_pass(sweep(), *jobs)
    assert verdicts(stored)[1] == [(20, 2, 2, False)]
    assert verdicts(stored)[0][1:] == [(40, 1, 1, True), (80, 1, 1, True)], "as if it had been stopped in time"
    (stopped,) = [action for action in actions(stored, *jobs) if isinstance(action, StopCell)]
    assert (stopped.cell.name, stopped.why) == ("rates-01", "stopped at step 20: 2nd of 2, the best goes on")


@pytest.mark.parametrize(
    "fields",
    [
        {"phase": "Publishing", "trained": True},
        {"phase": "Suspended", "suspend": True, "suspended_by_sweep": True, "trained": True},
        {"phase": "Succeeded", "adapter": "pvc://a/b"},
        {"phase": "Failed"},
        {"total_steps": 20},
        {"stopped_by_sweep": True},
    ],
    ids=[
        "trained",
        "suspended before it is published",
        "succeeded",
        "failed",
        "at its last step",
        "resumed by its user",
    ],
)
def test_trained_and_resumed_cells_are_not_stopped_and_count_at_the_rung(fields: dict[str, Any]) -> None:
    jobs = (cell(0, 1.0), cell(1, 1.2, **fields))
    stored = after_pass(sweep(), *jobs)
    assert verdicts(stored)[1] == [(20, 2, 2, False)]
    assert not [action for action in actions(stored, *jobs) if isinstance(action, StopCell)]


def test_a_stopped_cell_frees_its_place_and_does_not_block_the_sweeps_end() -> None:
    stored = after_pass(sweep(parallelism=2), cell(0, 1.0), cell(1, 1.2))
    stopping = cell(1, 1.2, suspend=True, stopped_by_sweep=True)
    assert actions(stored, cell(0, 1.0), stopping) == [], "it still saves, and holds its GPU"
    stored = after_pass(stored, cell(0, 1.0), stopping)
    assert (stored.status.cells[1].phase, stored.status.cells[1].reason) == ("Training", "NotAmongBest")
    stopped = cell(1, 1.2, phase="Suspended", suspend=True, stopped_by_sweep=True)
    (create,) = actions(stored, cell(0, 1.0), stopped)
    assert isinstance(create, CreateCell)
    assert create.cell.name == "rates-02"
    done = [cell(number, phase="Succeeded", eval_loss=1.0 + number, adapter="pvc://a/b") for number in (0, 2, 3)]
    stored = after_pass(stored, *done, stopped)
    status = stored.status
    assert (status.phase, status.summary, status.stopped, status.failed, status.running) == (
        "Succeeded",
        "4/4",
        1,
        0,
        0,
    )
    line = status.cells[1]
    assert (line.phase, line.reason, line.rank) == ("Stopped", "NotAmongBest", None)
    assert line.message == "stopped at step 20: 2nd of 2, the best goes on"
    assert present(status.best).cell == "rates-00"
    (succeeded,) = [entry for entry in status.conditions if entry.type == "Succeeded"]
    assert succeeded.message.endswith("; 1 were stopped")
    # Its table outlives its QLoRAJob.
    assert after_pass(stored, *done).status.cells[1] == line


def test_a_stopped_cell_that_a_user_resumes_runs_to_its_end() -> None:
    stored = after_pass(sweep(), cell(0, 1.0), cell(1, 1.2))
    resumed = cell(1, 1.2, stopped_by_sweep=True)
    assert not [action for action in actions(stored, cell(0, 1.0), resumed) if not isinstance(action, CreateCell)]
    line = after_pass(stored, cell(0, 1.0), resumed).status.cells[1]
    assert (line.phase, line.reason, line.message) == ("Training", "", "")


def test_a_continued_sweep_does_not_resume_its_stopped_cells() -> None:
    suspended = sweep(after_pass(sweep(), cell(0, 1.0), cell(1, 1.2)).status, suspend=True)
    held = cell(1, 1.2, suspend=True, suspended_by_sweep=True, phase="Suspended")
    (action,) = actions(suspended, cell(0, 1.0, suspend=True), held)
    assert action == StopCell(held, "stopped at step 20: 2nd of 2, the best goes on")
    assert stop(held, WHY) == {
        "metadata": {
            "uid": "uid-1",
            "resourceVersion": "",
            "annotations": {"qlora.dev/stopped-by-sweep": WHY, "qlora.dev/suspended-by-sweep": None},
        },
        "spec": {"suspend": True},
    }
    goes_on = sweep(suspended.status)
    stopped = cell(1, 1.2, suspend=True, stopped_by_sweep=True, phase="Suspended")
    assert not [action for action in actions(goes_on, cell(0, 1.0), stopped) if isinstance(action, SetSuspend)]


def test_a_sweep_with_only_stopped_cells_has_failed_with_a_remedy() -> None:
    stopped = [cell(n, 1.0 + n, phase="Suspended", suspend=True, stopped_by_sweep=True) for n in (1, 2, 3)]
    assert after_pass(sweep(), *stopped).status.report, "they have left their curves"
    status = after_pass(sweep(), cell(0, 1.0, phase="Failed", reason="GateFailed"), *stopped).status
    (failed,) = [entry for entry in status.conditions if entry.type == "Failed"]
    assert (status.phase, failed.reason) == ("Failed", "AllCellsFailed")
    assert "(GateFailed)" in failed.message
    assert "3 were stopped, and can be resumed" in failed.message


def test_only_train_of_a_cell_gets_the_rungs() -> None:
    manifest = build_cell(sweep(), sweep().cells()[0])
    assert manifest["metadata"]["annotations"] == {"qlora.dev/rungs": "20,40,80"}
    plain = sweep(halving=None)
    assert "annotations" not in build_cell(plain, plain.cells()[0])["metadata"]

    def rungs(step: Any, annotation: str) -> str | None:
        body = job_body()
        body["metadata"] |= {"annotations": {"qlora.dev/rungs": annotation, "other": "x" * 1000}}
        job = parse_job(compact(body))
        shared = resolved().model_copy(update={"shared_path": "rates.sweep"})
        (container,) = build_job(job, shared, step, 1)["spec"]["template"]["spec"]["containers"]
        return {entry["name"]: entry.get("value", "") for entry in container["env"]}.get("QLORA_RUNGS")

    assert rungs("train", "20,40,80") == "20,40,80"
    assert [rungs(step, "20,40,80") for step in ("prepare", "publish")] == [None, None]
    assert [rungs("train", text) for text in ("20,", "a", "20,40\n", ",".join(["1"] * 9), "1" * 9)] == [None] * 5


def test_losses_at_rungs_reach_the_cells_status_from_the_log_and_from_the_result() -> None:
    status = with_progress(status_in("train"), progress(training_step=25, evaluations=((20, 0.00034),)))
    status = with_progress(status, progress(training_step=30))
    end = {"outcome": "succeeded", "exit_code": 0, "reason": "Done", "evaluations": ((20, 0.00034), (40, 1 / 3))}
    status = with_training_facts(status, ResultRecord(job_uid=UID, pod_uid=UID, step="train", time=time(), **end))
    body = job_body(status.dump())
    body["metadata"] |= {"ownerReferences": [OWNER]}
    assert present(parse_cell(body, UID)).evaluations == ((20, 0.00034), (40, 0.333333333))


def test_losses_equal_in_four_decimals_are_distinguished() -> None:
    stored = sweep(parallelism=2)

    def cells(*losses: float, ended: bool) -> dict[str, CellJob]:
        found: dict[str, CellJob] = {}
        for number, loss in enumerate(losses):
            status = with_progress(status_in("train"), progress(training_step=25, evaluations=((20, loss),)))
            if ended:
                end: dict[str, Any] = {"outcome": "succeeded", "exit_code": 0, "reason": "Done", "eval_loss": loss}
                record = ResultRecord(job_uid=UID, pod_uid=UID, step="train", time=time(), **end)
                status = with_training_facts(status, record)
                status = status.model_copy(update={"phase": "Succeeded", "adapter": ADAPTER})
            body = job_body(status.dump())
            body["metadata"] |= {"name": f"rates-{number:02}", "ownerReferences": [OWNER]}
            job = present(parse_cell(body, UID))
            found[job.name] = job
        return found

    at_rung = table(stored, stored.cells(), cells(0.00034, 0.00026, ended=False))
    assert [line.rungs and line.rungs[0].rank for line in at_rung[:2]] == [2, 1]
    ended = table(stored, stored.cells(), cells(0.00034, 0.00026, ended=True))
    assert [line.rank for line in ended[:2]] == [2, 1]
    best = present(next_status(stored, ended, None, None, NOW).best)
    assert (best.cell, best.eval_loss) == ("rates-01", 0.00026)


def test_the_longest_progress_record_is_within_its_limit() -> None:
    number = -1.23456789e-05
    record = ProgressRecord(
        job_uid=UID,
        pod_uid=UID,
        step="train",
        time="2026-01-02T03:04:05Z",
        activity="a" * 128,
        training_step=10_000_000,
        total_steps=10_000_000,
        epoch=1000.1234,
        loss=number,
        eval_loss=number,
        learning_rate=number,
        grad_norm=number,
        tokens_per_second=1234567.1,
        remaining_seconds=1234567.1,
        peak_memory_bytes=10**11,
        micro_batch_size=1024,
        goodput=0.1234,
        reward_margin=number,
        accuracy=0.123456789,
        eval_accuracy=0.123456789,
        evaluations=tuple((1_000_000, number) for _ in range(MAX_RUNGS)),
        checkpoint_step=10_000_000,
        checkpoint_time="2026-01-02T03:04:05Z",
    )
    assert len(encode_record(record)) <= MAX_PROGRESS_BYTES
