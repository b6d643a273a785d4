"""The pod of several cells: its start, its cells, and the cells without it."""

import json
from dataclasses import replace
from typing import Any

import pytest

from qlora_api.memory.estimate import GIB
from qlora_api.profile import Profile
from qlora_api.status import MemoryStatus, QLoRAJobStatus, Resolved, StepName
from qlora_operator.decisions.cleanup import cleanup_at
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Observed
from qlora_operator.decisions.observed.shared_pod import waits_for_sweep
from qlora_operator.decisions.plan import CreateJob, DeleteJob
from qlora_operator.decisions.status import next_status
from qlora_operator.decisions.sweeps.pods import MAX_DOCUMENTS, build_pod_job
from qlora_operator.decisions.usage.budget import budget_at
from tests.support.builders import (
    NOW,
    PROFILE,
    PROFILES,
    after,
    child,
    deleted,
    ended,
    message_of,
    pod,
    present,
    reason_of,
    result,
    running,
    time,
)
from tests.support.cluster.shared_pods import NAMES, POD, SWEEP, SWEEP_UID, UIDS, Pod, cell_body, cell_status, deleting

FIRST, SECOND, THIRD = NAMES
CHILD = f"{POD}-train-1"
CREATE = CreateJob("train", 1)
STEPS: tuple[StepName, ...] = ("prepare", "publish")


def started() -> Pod:
    """A pod that trains all three."""
    found = Pod()
    assert found.then().store_first
    assert found.then().actions == (CreateJob("train", 1),)
    found.then(child("train"), running(pod("train")))
    return found


def cell_status_of(found: Pod, name: str, at: float = 0) -> QLoRAJobStatus:
    facts = Facts(found.cell(name), Observed(), PROFILES, after(at), shared=found.shared(name))
    return next_status(facts).status


def test_which_cells_it_trains_is_stored_before_its_job_exists() -> None:
    found = Pod()
    first = found.then()
    assert (first.store_first, first.actions, first.status.cells) == (True, (), NAMES)
    second = found.then()
    assert (second.store_first, second.actions) == (False, (CreateJob("train", 1),))


def test_its_job_is_the_sweeps_and_trains_all_of_them() -> None:
    found = started()
    cells = [found.cell(name) for name in NAMES]
    manifest = build_pod_job(found.sweep(), POD, CreateJob("train", 1), cells)
    metadata = manifest["metadata"]
    owner = metadata["ownerReferences"][0]
    assert (metadata["name"], owner["kind"], owner["name"], owner["uid"]) == (CHILD, "QLoRASweep", SWEEP, SWEEP_UID)
    assert owner["controller"]
    template = manifest["spec"]["template"]
    # The label by which network policies isolate it.
    assert template["metadata"]["labels"]["qlora.dev/job"] == POD
    assert template["metadata"]["labels"]["qlora.dev/job-uid"] == SWEEP_UID
    assert template["metadata"]["annotations"]["qlora.dev/cells"] == ",".join(NAMES)
    arguments = template["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--workspace") + 1] == f"/workspace/{FIRST}-folder"
    assert [each for each in arguments if each.endswith(".json")][1:] == [
        f"/etc/qlora/with/{name}.json" for name in (SECOND, THIRD)
    ]


@pytest.mark.parametrize("doing", ["preparing", "new"])
def test_it_waits_for_cells_that_are_about_to_be_prepared(doing: str) -> None:
    found = Pod()
    found.cells[SECOND] = cell_body(doing, SECOND)
    planned = found.then()
    assert (planned.actions, planned.status.cells, planned.status.reason) == ((), (), "WaitingForSweep")
    assert planned.status.message.startswith(f"2 of 3 cells of this pod are prepared: waiting for {SECOND} (")
    status = cell_status_of(found, FIRST)
    assert (status.phase, reason_of(status)) == ("Queued", "WaitingForSweep")
    assert SECOND in message_of(status)


@pytest.mark.parametrize(
    "doing", ["failed", "suspended", "trained", "gone", "deleting", "cannot start", "never created"]
)
def test_a_cell_that_does_not_go_on_never_stops_the_others(doing: str) -> None:
    found = Pod()
    if doing in ("gone", "never created"):
        del found.cells[SECOND]
        found.known |= {SECOND: "" if doing == "never created" else UIDS[SECOND]}
    elif doing == "deleting":
        found.cells[SECOND] = deleting(found.cells[SECOND])
    elif doing == "cannot start":
        why = {"type": "Succeeded", "status": "Unknown", "reason": "JobLimitReached", "message": "x"}
        body = cell_body("new", SECOND)
        status = {"phase": "Pending", "conditions": [why | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]}
        found.cells[SECOND] = body | {"status": status}
    else:
        found.cells[SECOND] = cell_body(doing, SECOND)
    assert found.then().status.cells == (FIRST, THIRD)
    assert found.then().actions == (CreateJob("train", 1),)


def test_a_failed_cell_that_is_retried_is_waited_for() -> None:
    found = Pod()
    found.cells[SECOND] = cell_body("failed", SECOND, retry={"request": "a"})
    assert found.then().status.cells == ()


def test_a_job_that_a_queue_gives_to_another_cluster_is_deleted_and_its_cells_go_on_alone() -> None:
    found = started()
    elsewhere = child("train", Complete="x") | {"spec": {"managedBy": "kueue.x-k8s.io/multikueue"}}
    assert found.then(elsewhere).store_first
    assert found.then(elsewhere).actions == (DeleteJob(CHILD, f"uid-{CHILD}"),)
    assert found.then().status.alone == NAMES


def test_the_last_of_a_pod_is_trained_alone() -> None:
    found = Pod()
    for name in (FIRST, SECOND):
        found.cells[name] = cell_body("suspended", name)
    planned = found.then()
    assert (planned.status.alone, planned.status.cells, planned.actions) == ((THIRD,), (), ())
    assert found.shared(THIRD) is not None
    assert waits_for_sweep(found.cell(THIRD).status, found.shared(THIRD)) is None


@pytest.mark.parametrize(("topology", "count"), [("zonal", 1), ("shared", 0), ("node-local", 0)])
def test_all_pods_of_its_cells_go_to_one_node_if_the_volume_is_zonal(topology: str, count: int) -> None:
    profile = Profile.model_validate(PROFILE.dump() | {"workspace": {"topology": topology}})
    found = Pod()
    cells = [found.cell(name) for name in NAMES]
    cells = [replace(cell, status=with_profile(present(cell.status.resolved), profile)) for cell in cells]
    steps = [build_job(cells[1], present(cells[1].status.resolved), step, 1) for step in STEPS]
    templates = [job["spec"]["template"] for job in (build_pod_job(found.sweep(), POD, CREATE, cells), *steps)]
    selectors = [selector for template in templates for selector in same_node(template)]
    assert len(selectors) == count * len(templates)
    for selector in selectors:
        assert all(selector.items() <= template["metadata"]["labels"].items() for template in templates)


def with_profile(fixed: Resolved, profile: Profile) -> QLoRAJobStatus:
    return QLoRAJobStatus(resolved=fixed.model_copy(update={"profile": profile}))


def same_node(template: dict[str, Any]) -> list[dict[str, str]]:
    """The labels of the pods that must run on the node of this one."""
    terms = template["spec"].get("affinity", {}).get("podAffinity", {})
    return [
        term["labelSelector"]["matchLabels"]
        for term in terms.get("requiredDuringSchedulingIgnoredDuringExecution", ())
        if term["topologyKey"] == "kubernetes.io/hostname"
    ]


def test_a_suspended_sweep_starts_no_pod_and_stops_the_one_that_runs() -> None:
    found = Pod(spec={"suspend": True})
    assert (found.then().actions, found.then().status.cells) == ((), ())
    found = started()
    found.spec = {"suspend": True}
    assert found.then(child("train"), running(pod("train"))).actions == (DeleteJob(CHILD, f"uid-{CHILD}"),)
    saved = deleted(running(pod("train")), requested=0)
    assert found.then(saved).actions == ()
    assert found.then(at=60).actions == ()
    assert present(found.stored).reason == "Suspended"
    found.spec = {}
    while not (planned := found.then(at=90)).actions:
        assert planned.store_first
    assert planned.actions == (CreateJob("train", 2),)


def test_each_cell_shows_that_the_pod_trains_it() -> None:
    found = started()
    for name in NAMES:
        status = cell_status_of(found, name)
        assert status.phase == "Training"
        assert message_of(status) == f"QLoRASweep {SWEEP} trains the adapter in pod {CHILD}-pod1"
    found.then(child("train"), pod("train"))
    status = cell_status_of(found, FIRST)
    assert (status.phase, reason_of(status)) == ("Queued", "WaitingForSweep")
    assert CHILD in message_of(status)


@pytest.mark.parametrize("doing", ["suspended", "failed", "canceled", "gone"])
def test_the_running_pod_goes_on_for_the_others(doing: str) -> None:
    found = started()
    if doing == "gone":
        del found.cells[FIRST]
    elif doing == "canceled":
        found.cells[FIRST] = cell_body(name=FIRST, cancel=True)
        found.store_status(FIRST, cell_status_of(found, FIRST))
        ended_cell = cell_status_of(found, FIRST)
        assert (ended_cell.phase, reason_of(ended_cell)) == ("Failed", "Cancelled")
        # The pod may still write to its folder: the sweep cleans up.
        assert cleanup_at(found.cell(FIRST), ended_cell) is None
    else:
        found.cells[FIRST] = cell_body(doing, FIRST)
    assert found.then(child("train"), running(pod("train"))).actions == ()
    # Its next pod would train that cell too: it is left out of the next Job.
    between = (child("train"), ended(pod("train"), 143), pod("train", 1, 2))
    assert found.then(*between, at=30).store_first
    assert found.then(*between, at=30).actions == (DeleteJob(CHILD, f"uid-{CHILD}"),)
    assert found.then(deleted(pod("train", 1, 2), requested=30), at=35).actions == ()
    assert found.then(at=40).status.cells == (SECOND, THIRD)
    assert found.then(at=40).actions == (CreateJob("train", 2),)


def test_a_pod_whose_cells_are_all_deleted_counts_until_its_end() -> None:
    found = started()
    before = found.gpu_seconds()
    found.cells.clear()
    assert found.then(child("train"), running(pod("train"))).actions == (DeleteJob(CHILD, f"uid-{CHILD}"),)
    found.then(deleted(ended(pod("train"), 143, end=30), requested=0), at=40)
    (entry,) = present(present(found.stored).usage).pods
    assert (entry.end, found.gpu_seconds() - before) == ("suspension", 30)


def test_the_next_job_is_created_after_the_one_before_is_deleted() -> None:
    found = started()
    found.cells[FIRST] = cell_body("suspended", FIRST)
    between = (child("train"), ended(pod("train"), 143))
    assert found.then(*between, at=30).store_first
    assert found.then(*between, at=30).actions == (DeleteJob(CHILD, f"uid-{CHILD}"),)


def test_the_sweep_counts_the_part_of_a_cell_whose_deletion_is_held_up() -> None:
    found = started()
    assert found.gpu_seconds() == 0
    found.cells[FIRST] = deleting(found.cells[FIRST])
    found.then(child("train"), running(pod("train")), at=900)
    assert found.gpu_seconds() == 300


def test_a_pod_of_which_no_cell_is_left_is_stopped() -> None:
    found = started()
    for name in NAMES:
        found.cells[name] = cell_body("suspended", name)
    assert found.then(child("train"), running(pod("train"))).actions == (DeleteJob(CHILD, f"uid-{CHILD}"),)
    found = started()
    found.cells = {}
    assert found.then(child("train"), running(pod("train"))).actions == (DeleteJob(CHILD, f"uid-{CHILD}"),)


def test_a_cell_that_has_used_its_gpu_hours_fails_when_its_pod_has_ended() -> None:
    found, status = Pod(), cell_status("prepared") or pytest.fail("it has one")
    fixed = status.resolved or pytest.fail("it has started")
    limited = fixed.model_copy(update={"gpu_hours": 0.5}).dump()
    # The record of the progress comes from a pod: it never exempts the cell.
    last = {"step": 10, "totalSteps": 10}
    found.cells[FIRST] = cell_body(name=FIRST, status={"resolved": limited, "progress": last})
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": time(-7199)}
    observed = child("train"), running(pod("train", conditions=[scheduled]))
    for bodies in ((), (), observed, observed):
        found.then(*bodies)
    spent = cell_status_of(found, FIRST)
    assert (spent.phase, present(spent.usage).gpu_seconds > 1800) == ("Training", True)
    assert budget_at(replace(found.cell(FIRST), status=spent), spent, Observed(), NOW) is None
    found.store_status(FIRST, spent)
    # Its Job was deleted: as long as its pod saves, no clean-up of the cell may begin.
    stopped = replace(found)
    stopped.then(deleted(observed[1], requested=0))
    assert present(stopped.stored).step.attempt == 2
    assert cell_status_of(stopped, FIRST).phase == "Queued"
    for _ in range(2):
        found.then(*done())
    failed = cell_status_of(found, FIRST)
    assert (failed.phase, reason_of(failed)) == ("Failed", "BudgetExceeded")
    assert cell_status_of(found, SECOND).phase != "Failed"


def test_cells_that_come_later_are_trained_by_the_next_job() -> None:
    found = Pod()
    found.cells[THIRD] = cell_body("suspended", THIRD)
    found.then()
    found.then()
    found.then(child("train"), running(pod("train")))
    found.cells[THIRD] = cell_body(name=THIRD)
    assert found.then(child("train"), running(pod("train"))).status.waiting == (THIRD,)
    assert reason_of(cell_status_of(found, THIRD)) == "WaitingForSweep"
    for name in (FIRST, SECOND):
        found.cells[name] = cell_body("suspended", name)
    found.then(child("train"), running(pod("train")))
    assert found.then(at=60).status.alone == (THIRD,), "it is the only one by now"


def done(code: int = 0, uid: str = UIDS[FIRST]) -> tuple[dict[str, Any], dict[str, Any]]:
    body = pod("train")
    condition: dict[str, Any] = {"Complete": "Done"} if code == 0 else {"Failed": "PodFailurePolicy"}
    told = result(body, "train", code, job_uid=uid, pod_uid=f"uid-{CHILD}-pod1", training_step=10, reason="Why")
    return child("train", **condition), ended(body, code, told)


@pytest.mark.parametrize("code", [0, 14], ids=["done", "the first has diverged"])
def test_after_its_end_each_cell_has_a_train_step_of_its_own(code: int) -> None:
    found = started()
    over = found.then(*done(code))
    assert (over.store_first, over.status.ended) == (True, True)
    assert cell_status_of(found, FIRST).phase == "Queued", "not before no pod of it is left"
    left = found.then(*done(code))
    assert (left.status.alone, left.status.cells, left.status.ended) == (NAMES, (), False)
    assert left.status.step.job_name == f"{POD}-train-2"
    for name in NAMES:
        assert waits_for_sweep(found.cell(name).status, present(found.shared(name))) is None
    # However they end, no later Job of the sweep trains them.
    assert found.then(*done(code)).actions == ()


def test_a_pod_that_still_runs_when_its_job_is_over_is_waited_for() -> None:
    found = started()
    over = [child("train", Failed="DeadlineExceeded"), running(pod("train"))]
    found.cells = {name: cell_body(name=name, status={"disruptions": 0}) for name in NAMES}
    assert found.stored is not None
    found.stored = found.stored.model_copy(update={"ended": True})
    assert found.then(*over).status.alone == ()
    assert "must end before" in found.stored.message
    assert found.then(child("train", Failed="DeadlineExceeded"), at=60).status.alone == NAMES


def test_a_job_that_a_user_has_deleted_is_created_again() -> None:
    found = started()
    planned = found.then(at=30)
    while not planned.actions:
        planned = found.then(at=60)
    assert planned.actions == (CreateJob("train", 2),)
    assert planned.status.cells == NAMES


def test_interruptions_have_a_limit_after_which_the_cells_go_on_alone() -> None:
    found = started()
    limit = found.sweep().spec.template.spec.retry.max_disruptions
    found.stored = present(found.stored).model_copy(update={"disruptions": limit})
    evicted = ended(pod("train"), 143)
    planned = found.then(child("train"), evicted, at=10)
    assert planned.status.ended
    assert present(planned.status.last_failure).reason == "RetriesExhausted"
    assert found.then(child("train"), evicted, at=20).actions == (DeleteJob(CHILD, f"uid-{CHILD}"),)
    assert found.then(evicted, at=30).status.alone == NAMES


def memory(gib: float) -> dict[str, Any]:
    found = MemoryStatus(
        estimate_bytes=int(gib * GIB),
        low_bytes=int(gib * 0.8 * GIB),
        high_bytes=int(gib * 1.2 * GIB),
        shared_bytes=5 * GIB,
        verdict="tight",
    )
    return {"memory": found.dump()}


def test_as_many_are_trained_together_as_fit_the_gpu() -> None:
    found = Pod()
    card: dict[str, Any] = {"resources": {"gpuMemory": "32Gi"}}
    found.cells = {name: cell_body(name=name, status=memory(18), **card) for name in NAMES}
    assert found.then().status.cells == (FIRST, SECOND)
    assert present(found.stored).waiting == (THIRD,)
    found = Pod(cells={name: cell_body(name=name, status=memory(30), **card) for name in NAMES})
    assert found.then().status.alone == (FIRST,), "one that fits with no other is trained alone"


def test_a_pod_trains_as_many_as_its_annotations_have_room_for() -> None:
    found = Pod()
    status = cell_status("prepared") or pytest.fail("it has one")
    fixed = status.resolved or pytest.fail("it has started")
    document = json.loads(fixed.document) | {"spec": "x" * (MAX_DOCUMENTS // 2 - 100)}
    large = fixed.model_copy(update={"document": json.dumps(document)})
    found.cells = {name: cell_body(name=name, status={"resolved": large.dump()}) for name in NAMES}
    assert found.then().status.cells == (FIRST, SECOND)


def test_cells_whose_base_or_trainer_differs_are_not_trained_together() -> None:
    found = Pod()
    base = {"origin": "cache", "bytesFetched": 1, "seconds": 1}
    for name, digest in zip(NAMES, "aab", strict=True):
        found.cells[name] = cell_body(name=name, status={"base": base | {"sha256": digest * 64}})
    assert found.then().status.cells == (FIRST, SECOND)


def test_a_retry_of_a_cell_that_is_trained_alone_stays_so() -> None:
    found = started()
    found.then(*done())
    found.then(*done())
    found.cells[SECOND] = cell_body(name=SECOND)
    assert found.then(*done()).actions == ()
    assert SECOND in present(found.stored).alone
