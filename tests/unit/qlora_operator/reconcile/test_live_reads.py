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
    PROFILE,
    REVISION,
    after,
    child,
    ended,
    follow,
    job_body,
    make_job,
    pod,
    present,
    reason_of,
    resolved,
    result,
    revision_body,
    running,
    status_in,
    step_status,
    succeeded,
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

OLD = resolved(PROFILE.model_copy(update={"image": "example.org/old"}))


@pytest.mark.parametrize("is_shown", [False, True])
def test_a_job_with_its_first_job_and_no_status_keeps_what_its_revision_fixed(is_shown: bool) -> None:
    cluster = MemoryCluster(job_body())
    cluster.revisions = {REVISION: revision_body(OLD)}
    store = shown(cluster)
    cluster.jobs = [child("prepare")]
    store = shown(cluster) if is_shown else store
    reconcile(cluster, store)
    assert (cluster.writes, cluster.reads) == (["status", "Event"], 4)
    assert (cluster.status.current_revision, cluster.status.step) == (REVISION, step_status("prepare"))


def test_a_job_with_an_emptied_status_keeps_its_latest_revision() -> None:
    cluster = MemoryCluster(job_body({}))
    later, foreign = f"{NAME}-12-0123456789", f"{NAME}-13-0123456789"
    other = revision_body(resolved(), foreign)
    other["metadata"]["ownerReferences"][0]["uid"] = "other"
    cluster.revisions = {name: revision_body(OLD, name) for name in (REVISION, later)} | {foreign: other}
    reconcile(cluster)
    assert cluster.status.current_revision == later
    assert cluster.jobs[0]["spec"]["template"]["spec"]["containers"][0]["image"] == "example.org/old"


def test_a_revision_that_a_user_has_deleted_is_made_again_with_the_next_number() -> None:
    cluster = stored(status_in("train"))
    cluster.jobs, cluster.pods, cluster.revisions = [child("train")], [running(pod("train"))], {}
    reconcile(cluster)
    (made,) = cluster.revisions
    assert (made.startswith(f"{NAME}-2-"), cluster.status.current_revision) == (True, made)
    assert present(cluster.status.step).job_name == f"{NAME}-train-1"
    assert "Job" not in cluster.writes


def test_no_job_is_created_before_the_revision_that_its_quota_rejects() -> None:
    cluster = MemoryCluster(job_body(), rejected=("ControllerRevision",))
    reconcile(cluster)
    assert "Job" not in cluster.writes
    assert (reason_of(cluster.status), cluster.status.current_revision) == ("RevisionRejected", None)


def test_a_revision_of_that_name_that_another_user_made_is_not_used() -> None:
    cluster = MemoryCluster(job_body())
    reconcile(cluster)
    (name,) = cluster.revisions
    taken = MemoryCluster(job_body())
    forged = revision_body(OLD, name)
    taken.revisions = {name: forged | {"metadata": forged["metadata"] | {"ownerReferences": []}}}
    reconcile(taken)
    assert ("Job" not in taken.writes, reason_of(taken.status)) == (True, "RevisionRejected")


def test_a_retry_whose_revision_is_rejected_is_still_to_be_taken_up() -> None:
    failed = follow(
        make_job(status_in("prepare", resolved=OLD.dump())), child("prepare", Failed="x"), ended(pod("prepare"), 10)
    )
    cluster = MemoryCluster(job_body(failed.dump(), retry={"request": "a"}), rejected=("ControllerRevision",))
    reconcile(cluster)
    assert (cluster.status.phase, reason_of(cluster.status, "Stalled")) == ("Failed", "RevisionRejected")
    admitted = MemoryCluster(cluster.job)
    reconcile(admitted)
    assert admitted.jobs[-1]["spec"]["template"]["spec"]["containers"][0]["image"] == PROFILE.image


def test_a_finished_job_without_its_revision_ends_as_it_should() -> None:
    spec: dict[str, Any] = {"cleanupAfterSeconds": 0, "ttlSecondsAfterFinished": 60}
    done = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))
    cluster = stored(done, **spec)
    cluster.revisions = {}
    reconcile(cluster)
    assert reason_of(cluster.status, "CleanedUp") == "CleanupFailed"
    reconcile(cluster, now=after(100))
    assert cluster.job == {}


def test_a_finished_job_needs_no_revision() -> None:
    cluster = stored(follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish")))
    cluster.revisions = {}
    assert (reconcile(cluster), cluster.writes, cluster.reads) == (None, [], 3)


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
