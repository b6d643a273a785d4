"""What a sweep does next, and what its table, its choice and its conditions show."""

from collections.abc import Mapping
from typing import Any

import pytest

from qlora_api.profile import Profile
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decisions.observed.objects import Reason
from qlora_operator.decisions.observed.stored_job import UnreadableJobError
from qlora_operator.decisions.sweeps.objection import objection_to_sweep
from qlora_operator.decisions.sweeps.plan import CreateCell, SetSuspend, next_status, plan, table
from qlora_operator.decisions.sweeps.sweep import (
    CellJob,
    QLoRASweep,
    parse_cell,
    parse_sweep,
    suspension,
)
from tests.support.builders import NOW, PROFILE, PROFILES, UID, after, condition, job_body, present
from tests.support.sweeps import SWEEP, TEMPLATE

NAME = "rates"
SHARED = Profile.model_validate(PROFILE.dump() | {"workspace": {"topology": "shared", "accessMode": "ReadWriteMany"}})
ON_ONE_NODE = Profile.model_validate(PROFILE.dump() | {"workspace": {"topology": "node-local"}})
OWNER = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "name": NAME, "uid": UID, "controller": True}


def make(status: QLoRASweepStatus | None = None, template: dict[str, Any] | None = None, **spec: Any) -> QLoRASweep:
    content = SWEEP["spec"] | {"template": {"spec": TEMPLATE | (template or {})}} | spec
    metadata = {"namespace": "team", "name": NAME, "uid": UID, "generation": 2, "resourceVersion": "7"}
    return parse_sweep({"metadata": metadata, "spec": content, "status": status.dump() if status else {}})


def cell(number: int, phase: str = "Training", **fields: Any) -> CellJob:
    values: dict[str, Any] = {"suspend": False, "suspended_by_sweep": False, **fields}
    return CellJob(name=f"{NAME}-{number:02}", uid=f"uid-{number}", phase=phase, **values)  # type: ignore[arg-type]


def done(number: int, eval_loss: float | None, **fields: Any) -> CellJob:
    uri = f"pvc://{NAME}/{number}"
    return cell(number, "Succeeded", eval_loss=eval_loss, adapter=uri, sha256="a" * 64, **fields)


def by_name(*jobs: CellJob) -> dict[str, CellJob]:
    return {job.name: job for job in jobs}


def created(sweep: QLoRASweep, *jobs: CellJob, objection: Reason | None = None) -> list[str]:
    actions = plan(sweep, sweep.cells(), by_name(*jobs), objection)
    return [action.cell.name for action in actions if isinstance(action, CreateCell)]


def status_of(sweep: QLoRASweep, *jobs: CellJob, **why: Reason | None) -> QLoRASweepStatus:
    lines = table(sweep, sweep.cells(), by_name(*jobs))
    return next_status(sweep, lines, why.get("objection"), why.get("blocked"), NOW)


def of(status: QLoRASweepStatus, kind: str) -> tuple[str, str, str]:
    (found,) = [entry for entry in status.conditions if entry.type == kind]
    return found.status, found.reason, found.message


def objection_to(sweep: QLoRASweep, profiles: Mapping[str, Profile]) -> Reason | None:
    return objection_to_sweep(sweep, sweep.cells(), profiles)


def test_cells_are_created_in_order_and_no_more_at_a_time_than_asked_for() -> None:
    assert created(make()) == ["rates-00"]
    assert created(make(), cell(0)) == []
    assert created(make(parallelism=3)) == ["rates-00", "rates-01", "rates-02"]
    assert created(make(parallelism=3), done(0, 1.0), cell(1), cell(2, "Failed")) == ["rates-03"]
    assert created(make(parallelism=1), cell(0), cell(1)) == [], "parallelism was lowered"
    assert created(make(), objection=Reason("ProfileNotFound", "")) == []


def test_the_cells_of_a_pod_are_created_together_and_pods_are_counted() -> None:
    grid = {"rank": [4, 8, 16, 32, 64]}
    assert created(make(grid=grid, cellsPerPod=2)) == ["rates-00", "rates-01"]
    assert created(make(grid=grid, cellsPerPod=2, parallelism=2)) == [f"rates-{number:02}" for number in range(4)]
    # The first pod's second cell could not be created, and the others wait for it.
    assert created(make(grid=grid, cellsPerPod=2), cell(0)) == ["rates-01"]
    assert created(make(grid=grid, cellsPerPod=2), done(0, 1.0), cell(1)) == []
    assert created(make(grid=grid, cellsPerPod=2), done(0, 1.0), cell(1, "Failed")) == ["rates-02", "rates-03"]
    ended = [done(number, 1.0) for number in range(4)]
    assert created(make(grid=grid, cellsPerPod=2), *ended) == ["rates-04"]


def test_a_deleted_cell_is_not_created_again_and_an_ended_one_keeps_its_line() -> None:
    before = status_of(make(), done(0, 1.5), cell(1))
    sweep = make(before)
    lines = table(sweep, sweep.cells(), {})
    assert [line.phase for line in lines] == ["Succeeded", "Deleted", "Pending", "Pending"]
    assert created(sweep) == ["rates-02"]
    status = status_of(sweep)
    assert status.best is not None
    assert (status.best.cell, status.best.eval_loss, status.best.adapter) == ("rates-00", 1.5, "pvc://rates/0")
    assert (status.succeeded, status.failed, status.running, status.pending) == (1, 1, 0, 2)


def test_a_suspended_sweep_suspends_its_cells_and_takes_back_only_what_it_has_done() -> None:
    theirs = cell(1, "Suspended", suspend=True)
    running, ended = cell(0), cell(2, "Failed")
    sweep = make(suspend=True, parallelism=4)
    actions = list(plan(sweep, sweep.cells(), by_name(running, theirs, ended), None))
    assert actions == [SetSuspend(running, True)]
    ours = cell(0, "Suspended", suspend=True, suspended_by_sweep=True)
    resumed = make(parallelism=2)
    actions = list(plan(resumed, resumed.cells(), by_name(ours, theirs), None))
    assert actions == [SetSuspend(ours, False)]
    resumed_by_the_user = cell(0, suspended_by_sweep=True)
    assert list(plan(resumed, resumed.cells(), by_name(resumed_by_the_user, theirs), None)) == [
        SetSuspend(resumed_by_the_user, False)
    ]
    assert suspension(ours, True)["metadata"] == {
        "uid": "uid-0",
        "resourceVersion": "",
        "annotations": {"qlora.dev/suspended-by-sweep": "true"},
    }
    assert suspension(ours, False)["metadata"]["annotations"] == {"qlora.dev/suspended-by-sweep": None}


def test_the_best_is_the_cell_with_the_lowest_loss_of_those_that_have_succeeded() -> None:
    unfinished = cell(2, eval_loss=0.1)
    status = status_of(make(), done(0, 1.5), done(1, 1.25), unfinished, cell(3, "Failed", eval_loss=0.2, adapter="x"))
    assert present(status.best).cell == "rates-01"
    assert [line.rank for line in status.cells] == [2, 1, None, None]
    tied = status_of(make(), done(0, 1.5), done(1, 1.5))
    assert present(tied.best).cell == "rates-00"


def test_the_best_by_score_has_the_highest_and_of_two_the_lower_loss() -> None:
    gate = {"gate": {"score": {"check": "exactMatch"}}}
    jobs = (done(0, 1.0, score=0.5), done(1, 1.5, score=0.75), done(2, 1.25, score=0.75), done(3, 0.5))
    status = status_of(make(template=gate, best="score"), *jobs)
    assert status.best is not None
    assert (status.best.cell, status.best.score, status.best.eval_loss) == ("rates-02", 0.75, 1.25)
    assert [line.rank for line in status.cells] == [3, 2, 1, None]
    assert "with loss 1.25 on the held-out rows, score 0.75, its adapter" in of(status, "Succeeded")[2]
    by_loss = status_of(make(template=gate), *jobs)
    assert present(by_loss.best).cell == "rates-03"


def test_a_sweep_ends_when_its_last_cell_does() -> None:
    status = status_of(make(), done(0, 1.5), done(1, 1.25), done(2, 2.0), cell(3, "Failed", reason="Diverged"))
    assert (status.phase, status.summary) == ("Succeeded", "4/4")
    value, reason, message = of(status, "Succeeded")
    assert (value, reason) == ("True", "Succeeded")
    assert "the best is rates-01 (rank=8 learningRate=0.0002) with loss 1.25" in message
    assert "1 of 4 cells have failed" in message
    assert (of(status, "Failed")[0], of(status, "Stalled")[0]) == ("False", "False")
    assert status.completion_time is not None
    assert status.report == "pvc://rates-0a1b2c3d/rates-0a1b2c3d.sweep/report.html"


def test_a_sweep_without_a_cell_that_has_succeeded_has_failed() -> None:
    status = status_of(make(), *(cell(number, "Failed", reason="BadDataset") for number in range(4)))
    assert status.phase == "Failed"
    assert of(status, "Succeeded")[:2] == ("False", "AllCellsFailed")
    assert of(status, "Failed")[0] == of(status, "Stalled")[0] == "True"
    assert "(BadDataset)" in of(status, "Failed")[2]
    assert status.report is None, "none has left its curves"


TWO_TASKS: dict[str, Any] = {"grid": None, "cells": [{}, {"dataset": {"source": "pvc://data/other.jsonl"}}]}


def test_a_sweep_without_a_choice_has_all_adapters_and_succeeds_if_every_cell_does() -> None:
    sweep = make(select="all", **TWO_TASKS)
    status = status_of(sweep, done(0, 1.5), done(1, None))
    assert (status.phase, status.best, [line.rank for line in status.cells]) == ("Succeeded", None, [None, None])
    assert [line.adapter for line in status.cells] == ["pvc://rates/0", "pvc://rates/1"]
    assert of(status, "Succeeded")[2] == "2 of 2 cells have succeeded: status.cells has their adapters"
    failed = status_of(sweep, done(0, 1.5), cell(1, "Failed", reason="Diverged"))
    assert (failed.phase, of(failed, "Succeeded")[1]) == ("Failed", "CellsFailed")
    assert of(failed, "Succeeded")[2] == (
        "1 of 2 cells have failed (Diverged); status.cells has the adapters of the others; "
        "spec.retry.request of a failed cell's QLoRAJob retries it: rates-01"
    )


def test_a_sweep_without_a_choice_separates_cells_that_failed_from_deleted_ones() -> None:
    spec: dict[str, Any] = {"select": "all"} | TWO_TASKS
    before = status_of(make(**spec), cell(0), cell(1))
    found = status_of(make(before, **spec), cell(0, "Failed", reason="BadDataset"))
    assert of(found, "Succeeded")[1] == "CellsFailed"
    assert of(found, "Succeeded")[2] == (
        "1 of 2 cells have failed (BadDataset) and 1 of 2 cells were deleted before their end; "
        "spec.retry.request of a failed cell's QLoRAJob retries it: rates-00; deleted: rates-01"
    )
    deleted = status_of(make(before, **spec), done(0, 1.5))
    assert of(deleted, "Succeeded")[2] == (
        "1 of 2 cells were deleted before their end; status.cells has the adapters of the others; deleted: rates-01"
    )


@pytest.mark.parametrize("fields", [{"reason": "GateFailed"}, {"reason": "Diverged"}])
def test_a_cell_that_was_trained_and_failed_has_its_curves_in_the_report(fields: dict[str, Any]) -> None:
    status = status_of(make(), cell(0, "Failed", **fields), cell(1))
    assert status.report == "pvc://rates-0a1b2c3d/rates-0a1b2c3d.sweep/report.html"
    assert status_of(make(), cell(0, **fields), cell(1)).report is None, "it is retried, and was not seen before"
    assert status_of(make(status), cell(0), cell(1)).report == status.report


def test_a_failed_cell_whose_retry_is_about_to_begin_has_its_place() -> None:
    def failed(request: str | None, seen: str) -> CellJob:
        conditions = [condition("Failed", "True"), condition("Succeeded", "False")]
        body = job_body({"phase": "Failed", "conditions": conditions, "retryRequest": seen}, retry={"request": request})
        body["metadata"] |= {"ownerReferences": [OWNER], "name": "rates-00"}
        return present(parse_cell(body, UID))

    assert created(make(), failed("1", "1")) == created(make(), failed(None, "1")) == ["rates-01"]
    assert created(make(), failed("1", "2")) == []
    assert created(make(parallelism=2), failed("2", "1")) == ["rates-01"]


def test_a_failed_cell_that_is_retried_starts_its_sweep_again() -> None:
    ended = make(status_of(make(), *(cell(number, "Failed", reason="BadDataset") for number in range(4))))
    status = status_of(ended, cell(0), *(cell(number, "Failed") for number in range(1, 4)))
    assert (status.phase, status.completion_time, of(status, "Failed")[0]) == ("Running", None, "False")


@pytest.mark.parametrize(
    ("jobs", "spec", "phase", "reason", "reconciling"),
    [
        ((), {}, "Pending", "Pending", "True"),
        ((cell(0),), {}, "Running", "Running", "False"),
        ((cell(0),), {"suspend": True}, "Running", "Suspending", "False"),
        ((cell(0, "Suspended", suspend=True),), {"suspend": True}, "Suspended", "Suspended", "False"),
        ((), {"suspend": True}, "Suspended", "Suspended", "False"),
    ],
)
def test_the_phase_on_the_way(
    jobs: tuple[CellJob, ...], spec: dict[str, Any], phase: str, reason: str, reconciling: str
) -> None:
    status = status_of(make(**spec), *jobs)
    assert (status.phase, of(status, "Succeeded")[:2]) == (phase, ("Unknown", reason))
    assert of(status, "Reconciling")[0] == reconciling


def test_the_reason_of_a_waiting_cell_is_reported_and_time_changes_nothing() -> None:
    why = Reason("CellRejected", "the quota is used up")
    status = status_of(make(), done(0, 1.0), blocked=why)
    assert of(status, "Succeeded") == ("Unknown", "CellRejected", "the quota is used up")
    lines = table(make(status), make().cells(), by_name(done(0, 1.0)))
    assert next_status(make(status), lines, None, why, after(60)) == status
    all_created = status_of(make(), *(cell(number) for number in range(4)), objection=why)
    assert of(all_created, "Succeeded")[1] == "Running"


def test_the_settings_of_the_administrator_bind_a_sweep_as_a_job() -> None:
    assert objection_to(make(), PROFILES) is None
    unknown = present(objection_to(make(template={"scheduling": {"profileName": "other"}}), PROFILES))
    assert unknown.word == "ProfileNotFound"
    limited = Profile.model_validate(PROFILE.dump() | {"limits": {"workspaceSize": "1Gi"}})
    too_large = present(objection_to(make(template={"workspace": {"size": "2Gi"}}), {"default": limited}))
    assert too_large.word == "LimitExceeded"
    few = {"default": Profile.model_validate(SHARED.dump() | {"limits": {"jobs": 2}})}
    too_many = present(objection_to(make(cellsPerPod=4), few))
    assert "spec.cellsPerPod is 4, and profile 'default' allows 2 jobs at a time" in too_many.sentence
    assert objection_to(make(cellsPerPod=2), few) is None
    # What keeps each cell from starting keeps the sweep from creating them.
    prompt = {"systemPrompt": {"text": "a" + "\x01" * 16_000}}
    score = {"check": "jsonSchema", "schema": "\x01" * 8192}
    texts = {"dataset": TEMPLATE["dataset"] | prompt, "gate": {"minScore": 0.5, "score": score}}
    assert present(objection_to(make(template=texts), PROFILES)).word == "SpecTooLarge"


def test_what_keeps_one_cell_from_starting_keeps_its_sweep_from_creating_it() -> None:
    proxy = {"httpsProxy": "http://proxy:3128", "proxySecretName": "proxy"}
    proxied = {"default": Profile.model_validate(PROFILE.dump() | proxy)}
    other = {"source": "s3://data/other.jsonl", "secretRef": {"name": "proxy"}}
    spec: dict[str, Any] = {"select": "all", "grid": None, "cells": [{}, {"dataset": other}]}
    sweep = make(**spec)
    found = present(objection_to(sweep, proxied))
    assert found.word == "SecretNotAllowed"
    assert found.sentence.startswith("cell rates-01 (dataset")
    assert "could not start: spec.dataset.secretRef names" in found.sentence
    assert objection_to(make(status_of(sweep, cell(0), cell(1)), **spec), proxied) is None


def test_the_line_of_a_cell_that_has_not_started_has_the_reason() -> None:
    limit = Reason("JobLimitReached", "4 jobs have started")
    before = status_of(make(), cell(0, "Pending", waits=limit))
    assert (before.cells[0].reason, before.cells[0].message) == ("JobLimitReached", "4 jobs have started")
    deleted = status_of(make(before)).cells[0]
    assert (deleted.phase, deleted.reason, deleted.message) == ("Deleted", "", "")


@pytest.mark.parametrize(
    ("profile", "workspace", "spec", "waits"),
    [
        (PROFILE, {}, {}, ""),
        (PROFILE, {}, {"parallelism": 2}, "spec.parallelism is 2"),
        (PROFILE, {"claimName": "mine"}, {"parallelism": 2}, "spec.parallelism is 2"),
        (SHARED, {}, {"parallelism": 2}, ""),
        (SHARED, {"claimName": "mine"}, {"parallelism": 2}, ""),
        (SHARED, {"accessModes": ["ReadWriteOnce"]}, {"parallelism": 2}, "it would be ReadWriteOnce"),
        # Each cell of a pod is prepared by another pod, all on one node.
        (PROFILE, {}, {"cellsPerPod": 4}, ""),
        (PROFILE, {}, {"cellsPerPod": 2, "parallelism": 2}, "spec.parallelism is 2"),
        (SHARED, {"accessModes": ["ReadWriteOnce"]}, {"cellsPerPod": 4}, "spec.cellsPerPod is 4"),
        (SHARED, {}, {"cellsPerPod": 4}, ""),
        (ON_ONE_NODE, {}, {"cellsPerPod": 4, "parallelism": 2}, ""),
        (PROFILE, {}, {"cellsPerPod": 4, "grid": {"rank": [8]}}, ""),
    ],
)
def test_cells_that_could_not_mount_their_workspace_together_wait(
    profile: Profile, workspace: dict[str, Any], spec: dict[str, Any], waits: str
) -> None:
    sweep = make(template={"workspace": workspace}, **spec)
    found = objection_to(sweep, {"default": profile})
    assert (found is not None and found.word == "WorkspaceNotShared") == bool(waits)
    assert found is None or waits in found.sentence


def test_a_sweep_of_another_release_is_said_to_be_unreadable() -> None:
    with pytest.raises(UnreadableJobError, match="newer: Extra inputs"):
        make(newer={})


def test_the_gpu_time_of_all_cells_is_added_up_and_stays_when_one_is_deleted() -> None:
    used: dict[str, Any] = {"gpu_seconds": 3600, "lost_gpu_seconds": 60, "cost": "2.50 EUR"}
    first = status_of(make(), done(0, 1.5, **used), cell(1, **used))
    assert first.usage is not None
    assert (first.usage.gpu_seconds, first.usage.lost_gpu_seconds) == (7200, 120)
    assert first.usage.cost == "5.00 EUR"
    later = status_of(make(first), cell(1, **(used | {"gpu_seconds": 7200, "cost": "5.00 USD"})))
    assert later.usage is not None
    assert (later.usage.gpu_seconds, later.usage.cost) == (10_800, None)
    assert status_of(make(), cell(0)).usage is None


def test_the_cost_of_a_sweep_is_not_that_of_some_of_its_cells() -> None:
    used: dict[str, Any] = {"gpu_seconds": 3600, "lost_gpu_seconds": 60, "cost": "2.50 EUR"}
    part = present(status_of(make(), done(0, 1.5, **used), cell(1, **(used | {"cost": None}))).usage)
    assert (part.gpu_seconds, part.cost) == (7200, None)
    assert present(status_of(make(), done(0, 1.5, **used), cell(1)).usage).cost == "2.50 EUR"
