"""Decisions that a live read confirms."""

import asyncio
from typing import Any

import pytest

from qlora_api.artifact_status import MergedStatus
from qlora_operator.reconcile.profile_limit import SECONDS_BETWEEN_LOOKS
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.watch.store import Store
from tests.support.builders import (
    ADAPTER,
    NAME,
    after,
    child,
    ended,
    job_body,
    pod,
    present,
    reason_of,
    result,
    running,
    status_in,
    step_status,
    succeeded,
    with_resolved,
)
from tests.support.cluster.memory_cluster import (
    FAILED,
    KEY,
    MemoryCluster,
    full,
    operator,
    reconcile,
    shown,
    stored,
    until_it_waits,
)


def test_the_first_job_of_a_job_older_than_the_watch_is_looked_up_first() -> None:
    cluster = MemoryCluster(job_body())
    store = shown(cluster)
    cluster.jobs = [with_resolved(child("prepare"), image="example.org/old")]
    reconcile(cluster, store)
    assert (cluster.writes, cluster.reads) == (["status", "Event"], 3)
    assert present(cluster.status.resolved).profile.image == "example.org/old"


def test_the_first_job_of_another_operator_has_the_resolved_spec() -> None:
    cluster = MemoryCluster(job_body())
    store = shown(cluster, created=True)
    cluster.existing = with_resolved(child("prepare"), image="example.org/other")
    reconcile(cluster, store)
    assert present(cluster.status.resolved).profile.image == "example.org/other"


@pytest.mark.parametrize("before_the_answer", [False, True])
def test_a_first_job_that_is_deleted_before_the_status_is_stored_is_remembered(before_the_answer: bool) -> None:
    cluster = MemoryCluster(job_body())
    store = shown(cluster, created=True)
    reconciler = operator(cluster, store)

    def delete() -> None:
        store.child_changed("jobs", {**cluster.jobs.pop(), "status": {}}, deleted=True)

    cluster.after_create = delete if before_the_answer else None
    assert asyncio.run(reconciler.reconcile(KEY)) == 0
    cluster.after_create = None
    if not before_the_answer:
        delete()
    reconcile(cluster, store)
    assert cluster.status.step == step_status("prepare", 2)


def test_a_job_that_the_store_has_missed_is_not_created_again() -> None:
    cluster = stored(status_in("train"))
    store = shown(cluster)
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    reconcile(cluster, store)
    assert "Job" not in cluster.writes
    assert (present(cluster.status.step).job_name, cluster.reads) == (step_status("train").job_name, 3)


def test_an_end_that_the_watch_has_shown_is_read_again_before_it_is_stored() -> None:
    cluster = stored(status_in("publish"))
    cluster.jobs, cluster.pods = [child("publish", Complete="")], [succeeded("publish")]
    reconcile(cluster, shown(cluster))
    assert (cluster.status.phase, cluster.reads) == ("Succeeded", 3)


@pytest.mark.parametrize("number", ["1e999", "-Infinity", "NaN"])
def test_a_result_with_a_number_that_is_no_json_is_an_unreadable_result(number: str) -> None:
    """As a status it would be rejected for ever, and the job would stay in its phase."""

    def published(attempt: int) -> dict[str, Any]:
        body = pod("publish", attempt)
        merged = MergedStatus(uri="pvc://out/merged", sha256="b" * 64, size_bytes=14, eval_loss=1.625)
        message = result(body, "publish", adapter=ADAPTER, merged=merged).replace("1.625", number)
        return ended(body, 0, message)

    cluster = stored(status_in("publish"), output={"merged": {}})
    cluster.jobs = [child("publish", attempt, Complete="") for attempt in (1, 2)]
    cluster.pods = [published(attempt) for attempt in (1, 2)]
    reconcile(cluster)
    assert (cluster.status.phase, reason_of(cluster.status)) == ("Failed", "ResultUnreadable")


def test_a_job_that_lost_its_label_is_not_created_again() -> None:
    cluster = stored(status_in("train"))
    cluster.existing = child("train", owner="")
    reconcile(cluster)
    assert "Job" not in cluster.writes
    assert present(cluster.status.step).attempt == 1


def test_a_failed_job_that_waits_for_a_place_is_still_cleaned_up() -> None:
    cluster = MemoryCluster(job_body(FAILED.dump(), cleanupAfterSeconds=0, retry={"request": "a"}))
    until_it_waits(full(cluster, Store()))
    assert cluster.writes[0] == "Job"
    assert cluster.status.phase == "Failed"


def test_a_request_that_only_a_live_read_shows_waits_for_a_place_too() -> None:
    cluster = MemoryCluster(job_body(FAILED.dump(), cleanupAfterSeconds=0))
    store = shown(cluster)
    asked = {"spec": cluster.job["spec"] | {"retry": {"request": "a"}}}
    cluster.job |= asked | {"metadata": cluster.job["metadata"] | {"generation": 2, "resourceVersion": "8"}}
    assert until_it_waits(full(cluster, store, after(10))) == SECONDS_BETWEEN_LOOKS
    assert (cluster.status.phase, reason_of(cluster.status, "Stalled")) == ("Failed", "JobLimitReached")
    assert [body["metadata"]["name"] for body in cluster.jobs] == [f"{NAME}-clean-1"]


def test_a_suspension_that_was_taken_back_deletes_nothing() -> None:
    cluster = stored(status_in("train"), suspend=True)
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    store = shown(cluster)
    del cluster.job["spec"]["suspend"]
    reconcile(cluster, store)
    assert [write for write in cluster.writes if write.startswith("deletion")] == []


def test_after_a_conflict_the_job_is_read_live() -> None:
    cluster = stored(status_in("train"))
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    store = shown(cluster)
    cluster.conflicts = 1
    with pytest.raises(RetryError, match="changed or deleted in the meantime"):
        asyncio.run(operator(cluster, store).reconcile(KEY))
    assert cluster.reads == 0
    reconcile(cluster, store)
    assert (cluster.status.phase, cluster.reads) == ("Training", 3)
