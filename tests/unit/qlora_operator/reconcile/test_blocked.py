"""Actions that the API server rejects or a missing object blocks, and their retries."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from qlora_api.naming import JOB_UID_LABEL
from qlora_operator.reconcile.profile_limit import SECONDS_BETWEEN_LOOKS
from qlora_operator.reconcile.queue import RetryError
from tests.support.builders import (
    NAME,
    UID,
    child,
    job_body,
    message_of,
    node,
    pod,
    reason_of,
    running,
    starts,
    status_in,
    step_status,
    time,
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
    without_labels,
)

CLAIM = f"{NAME}-0a1b2c3d"


@pytest.mark.parametrize(
    ("labels", "adopted"), [({JOB_UID_LABEL: UID}, True), ({JOB_UID_LABEL: "another"}, False), (None, False)]
)
def test_a_claim_of_the_workspaces_name_is_used_only_if_it_was_created_for_the_job(
    labels: dict[str, str] | None, adopted: bool
) -> None:
    cluster = MemoryCluster(job_body())
    cluster.claims[CLAIM] = {"metadata": {"name": CLAIM} | ({"labels": labels} if labels else {})}
    again = reconcile(cluster)
    assert bool(cluster.jobs) == adopted
    if not adopted:
        assert (again, reason_of(cluster.status)) == (5, "ClaimNameTaken")
        assert CLAIM in message_of(cluster.status)


def test_a_queue_that_gives_jobs_to_another_cluster_is_found_before_anything_is_prepared() -> None:
    cluster = MemoryCluster(job_body(scheduling={"queueName": "gpus"}))
    cluster.managed_by = "kueue.x-k8s.io/multikueue"
    assert reconcile(cluster) == 5
    assert (cluster.writes, reason_of(cluster.status), cluster.status.phase) == (
        ["ControllerRevision", "status", "Event"],
        "QueueNotSupported",
        "Pending",
    )
    assert f"LocalQueue 'gpus' gives Job {NAME}-train-1" in message_of(cluster.status)
    # The administrator changes the queue.
    cluster.managed_by = None
    reconcile(cluster)
    assert [body["metadata"]["name"] for body in cluster.jobs] == [f"{NAME}-prepare-1"]


def test_a_train_job_that_goes_to_another_cluster_is_deleted_without_any_event() -> None:
    cluster = stored(status_in("train"))
    cluster.managed_by = "kueue.x-k8s.io/multikueue"
    assert reconcile(cluster, shown(cluster)) is None
    assert (cluster.status.phase, reason_of(cluster.status)) == ("Failed", "QueueNotSupported")
    assert cluster.writes[-1] == f"deletion of {cluster.jobs[-1]['metadata']['name']}"


def test_a_queue_that_cannot_be_tried_is_no_reason_to_wait() -> None:
    cluster = MemoryCluster(job_body(scheduling={"queueName": "gpus"}))
    cluster.queue_rejects = True
    reconcile(cluster)
    assert (len(cluster.jobs), cluster.tried) == (1, 1)
    # Without a queue, nothing is asked.
    cluster = MemoryCluster(job_body())
    reconcile(cluster)
    assert (len(cluster.jobs), cluster.tried) == (1, 0)


def _taken(cluster: MemoryCluster) -> None:
    cluster.existing = child("prepare", owner="another")


def _unwatched(cluster: MemoryCluster) -> None:
    cluster.existing = without_labels(child("prepare"))


def _quota(kind: str) -> Callable[[MemoryCluster], None]:
    def exceed(cluster: MemoryCluster) -> None:
        cluster.rejected = (kind,)

    return exceed


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (_taken, "NameTaken"),
        (_unwatched, "NameTaken"),
        (_quota("Job"), "JobRejected"),
        (_quota("PersistentVolumeClaim"), "ClaimRejected"),
    ],
)
def test_creation_retries_back_off_and_the_backoff_resets_after_success(
    block: Callable[[MemoryCluster], None], reason: str
) -> None:
    cluster = MemoryCluster(job_body())
    block(cluster)
    store = shown(cluster)
    reconciler = operator(cluster, store)
    assert [until_it_waits(reconciler) for _ in range(9)] == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert reason_of(cluster.status) == reason
    assert ("exceeded quota: team" in message_of(cluster.status)) == reason.endswith("Rejected")
    cluster.existing, cluster.rejected = None, ()
    until_it_waits(reconciler)
    assert cluster.status.phase == "Preparing"
    assert reconciler.blocked.next(KEY) == 5


def test_a_job_whose_first_job_no_watch_shows_is_retried_with_backoff() -> None:
    cluster = MemoryCluster(job_body())
    store = shown(cluster, created=True)
    cluster.existing = child("prepare")
    store.child_changed("jobs", cluster.existing, deleted=True)
    reconciler = operator(cluster, store)
    assert [until_it_waits(reconciler) for _ in range(3)] == [5, 10, 20]


def test_status_writes_back_off_if_the_api_server_drops_them() -> None:
    cluster = MemoryCluster(job_body())
    cluster.keeps_status = False
    reconciler = full(cluster, shown(cluster))
    reconciler.starts.profiles_in_use = starts().profiles_in_use
    assert [until_it_waits(reconciler) for _ in range(3)] == [5, 10, 20]


def test_a_step_of_a_job_that_waits_for_a_place_is_stopped() -> None:
    cluster = MemoryCluster(job_body())
    cluster.jobs = [child("train")]
    assert until_it_waits(full(cluster, shown(cluster))) == SECONDS_BETWEEN_LOOKS
    assert cluster.writes == [f"deletion of {NAME}-train-1", "status", "Event"]
    assert reason_of(cluster.status) == "JobLimitReached"


@pytest.mark.parametrize("kind", ["Service", "NetworkPolicy"])
def test_peers_service_and_policy_are_created_before_their_train_pods(kind: str) -> None:
    ready = status_in("train", 1, step=step_status("train", jobUid="").dump())
    cluster = MemoryCluster(job_body(ready.dump(), resources={"nodes": 2}), rejected=(kind,))
    assert reconcile(cluster) == 5
    assert reason_of(cluster.status) == "PeersRejected"
    assert f"{kind} qlora-{UID}" in message_of(cluster.status)
    assert cluster.jobs == []

    cluster = MemoryCluster(job_body(ready.dump(), resources={"nodes": 2}))
    reconcile(cluster)
    assert cluster.writes[:3] == ["NetworkPolicy", "Service", "Job"]


def test_peers_service_and_policy_are_retried_after_a_quota_change() -> None:
    ready = status_in("train", 1, step=step_status("train", jobUid="").dump())
    cluster = MemoryCluster(job_body(ready.dump(), resources={"nodes": 2}))
    cluster.contended = True
    with pytest.raises(RetryError, match="resourcequotas"):
        reconcile(cluster)
    assert cluster.jobs == []


def test_service_and_policy_of_peers_are_restored_while_a_pod_starts() -> None:
    """A user may have deleted or changed it while their Job waited in a queue."""
    cluster = stored(status_in("train"), resources={"nodes": 2})
    cluster.jobs, cluster.pods = [child("train")], [running(node(0)), node(1)]
    reconcile(cluster)
    assert cluster.writes[:2] == ["NetworkPolicy", "Service"]

    cluster = stored(cluster.status, resources={"nodes": 2})
    cluster.jobs, cluster.pods = [child("train")], [running(node(0)), running(node(1))]
    reconcile(cluster)
    assert set(cluster.writes) <= {"status", "Event"}


def test_a_rejected_deletion_under_a_finalizer_is_retried_with_backoff() -> None:
    cluster = stored(status_in("train"))
    cluster.job["metadata"] |= {"deletionTimestamp": time(), "finalizers": ["example.org/audit"]}
    cluster.jobs, cluster.rejected = [child("train")], (f"deletion of {NAME}-train-1",)
    reconciler = operator(cluster, shown(cluster))
    assert [asyncio.run(reconciler.reconcile(KEY)) for _ in range(3)] == [5, 10, 20]
    assert reason_of(cluster.status) == "JobRejected"


@pytest.mark.parametrize(
    ("job", "kind", "waiting"),
    [
        (job_body(), "Succeeded", "the prepare step of this job starts"),
        (
            job_body(status_in("publish", step=step_status("publish", jobUid="").dump()).dump()),
            "Succeeded",
            "the publish step of this job starts",
        ),
        (job_body(FAILED.dump(), cleanupAfterSeconds=0), "CleanedUp", "the clean-up of this job starts"),
    ],
)
def test_a_taken_name_is_reported_with_the_object_that_needs_it(job: dict[str, Any], kind: str, waiting: str) -> None:
    cluster = MemoryCluster(job)
    _taken(cluster)
    reconcile(cluster)
    assert reason_of(cluster.status, kind) == "NameTaken"
    assert f": {waiting} when that Job is gone" in message_of(cluster.status, kind)


def test_a_deletion_that_the_api_server_rejects_is_reported() -> None:
    cluster = stored(status_in("train"), suspend=True)
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    cluster.rejected = (f"deletion of {NAME}-train-1",)
    assert reconcile(cluster) == 5
    assert reason_of(cluster.status) == "JobRejected"
