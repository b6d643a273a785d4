"""One pass over a job, against a cluster in memory: its writes, and its requeue."""

import asyncio
from typing import Any

import pytest

from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.announcing import entry, with_announcement
from qlora_operator.decisions.observed.parsing import profile_in_use
from qlora_operator.kube.errors import ClusterError, NotFoundError, RejectedError, UnavailableError
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.watch.store import Store
from tests.support.builders import (
    ADAPTER,
    NAME,
    NOW,
    UID,
    after,
    child,
    condition,
    deleted,
    follow,
    job_body,
    make_job,
    message_of,
    pod,
    reason_of,
    running,
    status_in,
    step_status,
    succeeded,
    time,
)
from tests.support.cluster.memory_cluster import (
    FAILED,
    KEY,
    MemoryCluster,
    operator,
    reconcile,
    shown,
    stored,
    until_it_waits,
)


@pytest.mark.parametrize("status", [status_in("train"), status_in("publish")], ids=["train", "publish"])
def test_a_job_whose_deletion_a_finalizer_delays_runs_no_further(status: QLoRAJobStatus) -> None:
    assert status.step is not None
    cluster = stored(status)
    cluster.job["metadata"] |= {"deletionTimestamp": time(), "finalizers": ["example.org/audit"]}
    cluster.jobs, cluster.pods = [child(status.step.name)], [running(pod(status.step.name))]
    assert reconcile(cluster, shown(cluster)) is None
    assert cluster.writes == [f"deletion of {status.step.job_name}"]

    # Nothing is created in its place, and no request is sent any more.
    going = {**cluster.jobs[0], "metadata": {**cluster.jobs[0]["metadata"], "deletionTimestamp": time()}}
    stopping = deleted(dict(cluster.pods[0]), 0)
    cluster.writes.clear()
    for jobs, pods in (([going], [stopping]), ([], [stopping]), ([], [])):
        cluster.jobs, cluster.pods, cluster.reads = list(jobs), list(pods), 0
        store = shown(cluster)
        assert reconcile(cluster, store) is None
        assert (cluster.writes, cluster.reads, store.is_settled(KEY)) == ([], 0, True)


def test_a_job_of_another_controller_gets_nothing_and_counts_for_nothing() -> None:
    cluster = stored(status_in("train"), managedBy="kueue.x-k8s.io/multikueue")
    cluster.jobs = [child("train")]
    store = shown(cluster)
    for known in (store, Store()):
        assert reconcile(cluster, known) is None
    assert (cluster.writes, store.is_settled(KEY), store.jobs.of(["default"])) == ([], True, [])
    assert profile_in_use(cluster.job) is None
    assert profile_in_use(job_body(status_in("train").dump(), managedBy="qlora.dev/operator")) == "default"
    assert profile_in_use(job_body(status_in("train").dump(), scheduling={"profileName": "a100"})) == "a100"


def test_a_job_that_is_deleted_without_its_children_leaves_them_alone() -> None:
    cluster = stored(status_in("train"))
    cluster.job["metadata"] |= {"deletionTimestamp": time(), "finalizers": ["orphan"]}
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    assert reconcile(cluster, shown(cluster)) is None
    assert (cluster.writes, cluster.reads) == ([], 0)


def test_orphaned_children_are_left_alone_after_garbage_collection() -> None:
    cluster = stored(status_in("train"))
    cluster.job["metadata"] |= {"deletionTimestamp": time(), "finalizers": ["example.org/audit"]}
    cluster.existing = {**child("train"), "metadata": {**child("train")["metadata"], "ownerReferences": []}}
    assert reconcile(cluster) is None
    assert cluster.writes == []


def test_a_job_under_a_finalizer_loses_its_unlabeled_job_too() -> None:
    cluster = stored(status_in("train"))
    cluster.job["metadata"] |= {"deletionTimestamp": time(), "finalizers": ["example.org/audit"]}
    cluster.existing = {**child("train"), "metadata": {**child("train")["metadata"], "labels": {}}}
    reconcile(cluster)
    assert cluster.writes == [f"deletion of {NAME}-train-1"]


def test_a_replaced_job_is_not_counted_with_its_successor() -> None:
    cluster = stored(FINISHED)
    reconciler = operator(cluster, shown(cluster))
    earlier = job_body({"phase": "Training", "conditions": [condition("Progressing", "False")]})
    earlier["metadata"] |= {"uid": "earlier"}
    reconciler.metrics.jobs.show(earlier)
    reconciler.metrics.jobs.show(job_body({"phase": "Succeeded"}))
    asyncio.run(reconciler.reconcile(KEY))
    counted = reconciler.metrics.registry.get_sample_value
    phases = ("Training", "Succeeded")
    assert [counted("qlora_jobs", {"namespace": "team", "phase": phase}) for phase in phases] == [0, 1]
    assert counted("qlora_jobs_without_progress") == 0


@pytest.mark.parametrize("spec", [{}, {"cleanupAfterSeconds": 0}, {"retry": {"request": "a"}}], ids=str)
def test_nothing_is_created_for_a_job_that_is_being_deleted(spec: dict[str, Any]) -> None:
    for status in (QLoRAJobStatus(), status_in("train"), FAILED):
        cluster = stored(status, **spec)
        cluster.job["metadata"] |= {"deletionTimestamp": time(), "finalizers": ["example.org/audit"]}
        assert reconcile(cluster, shown(cluster, created=True), after(10)) is None
        assert cluster.writes == []


FINISHED = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))


def test_a_finished_job_is_requeued_for_its_clean_up() -> None:
    cluster = stored(FINISHED, cleanupAfterSeconds=100)
    assert reconcile(cluster) == 100
    assert reason_of(cluster.status, "CleanedUp") == "Scheduled"


@pytest.mark.parametrize("status", [FINISHED, FAILED], ids=["succeeded", "failed"])
def test_a_finished_job_without_clean_up_is_not_requeued(status: QLoRAJobStatus) -> None:
    cluster = stored(status)
    store = shown(cluster)
    assert reconcile(cluster, store) is None
    assert (cluster.writes, cluster.reads) == ([], 0)
    assert store.is_settled(KEY)


def test_a_finished_job_rests_until_it_is_deleted_in_the_version_that_was_decided_on() -> None:
    cluster = stored(FINISHED, ttlSecondsAfterFinished=100)
    store = shown(cluster)
    assert reconcile(cluster, store, after(40)) == 60
    assert (cluster.writes, cluster.reads, store.is_settled(KEY)) == ([], 0, True)
    assert reconcile(cluster, store, after(100)) is None
    assert cluster.writes == [f"deletion of {NAME} {UID} 7"]


def test_an_entry_for_servers_is_removed_with_its_job_or_by_the_next_of_its_name() -> None:
    spec: dict[str, Any] = {"output": {"announce": {"configMap": "adapters"}}}
    announced = with_announcement(FINISHED, make_job(FINISHED, **spec))
    for successor in ({}, job_body(status_in("train").dump()) | {"metadata": {**job_body()["metadata"], "uid": "new"}}):
        cluster = stored(announced, **spec)
        reconciler = operator(cluster, Store())
        until_it_waits(reconciler)
        assert cluster.patches == []
        cluster.job, cluster.unavailable = successor, 1
        reconciler.store.gone(KEY)
        with pytest.raises(RetryError):
            asyncio.run(reconciler.reconcile(KEY))
        for _ in range(2):
            asyncio.run(reconciler.reconcile(KEY))
        (patch,) = cluster.patches
        assert patch[-1] == {"op": "remove", "path": f"/data/{NAME}.json"}
        assert patch[1] == {"op": "test", "path": f"/data/{NAME}.json", "value": entry(NAME, ADAPTER)}


def test_a_finished_job_of_another_release_is_cleaned_up() -> None:
    cluster = stored(FINISHED, cleanupAfterSeconds=0)
    cluster.job["spec"]["model"] = {"source": "nfs://server/model"}
    reconcile(cluster, now=after(10))
    assert [body["metadata"]["name"] for body in cluster.jobs] == [f"{NAME}-clean-1"]


def test_the_running_step_of_a_failed_job_is_deleted() -> None:
    cluster = stored(FAILED)
    cluster.jobs = [child("train")]
    store = shown(cluster)
    assert reconcile(cluster, store) is None
    assert cluster.writes == [f"deletion of {NAME}-train-1"]
    assert not store.is_settled(KEY)


def test_a_new_job_takes_five_calls_and_its_event_has_the_stored_message() -> None:
    cluster = MemoryCluster(job_body())
    assert reconcile(cluster, shown(cluster, created=True)) == 60
    assert (cluster.writes, cluster.reads) == (
        ["ControllerRevision", "PersistentVolumeClaim", "Job", "status", "Event"],
        0,
    )
    assert (cluster.status.phase, cluster.status.step) == ("Preparing", step_status("prepare"))


def test_a_pass_that_changes_nothing_asks_the_api_server_for_nothing() -> None:
    cluster = stored(status_in("train"))
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    store = shown(cluster)
    reconcile(cluster, store)
    writes = list(cluster.writes)
    reconcile(cluster, store)
    assert (cluster.writes, cluster.reads, writes) == (writes, 0, ["status", "Event"])


def test_a_deleted_job_is_dropped() -> None:
    cluster = MemoryCluster(job_body())
    store = shown(cluster)
    store.distrust(KEY)
    cluster.job = {}
    reconciler = operator(cluster, store)
    reconciler.metrics.jobs.show(job_body({"phase": "Training"}))
    assert asyncio.run(reconciler.reconcile(KEY)) is None
    assert store.held(KEY) is None
    assert "qlora_jobs{" not in reconciler.metrics.page()[0].decode()


def test_rejected_status_writes_are_counted_and_conflicts_are_not() -> None:
    cluster = MemoryCluster(job_body(status_in("train").dump()), rejected=("status",))
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    reconciler = operator(cluster, shown(cluster))

    def errors() -> float | None:
        with pytest.raises(RetryError):
            asyncio.run(reconciler.reconcile(KEY))
        labels = {"kind": "QLoRAJob"}
        return reconciler.metrics.registry.get_sample_value("qlora_operator_status_write_errors_total", labels)

    assert errors() == 1
    cluster.conflicts = 1
    assert errors() == 1


def test_a_change_of_phase_stores_its_time_and_measures_the_phase_before() -> None:
    queued = status_in("train", phase="Queued", phaseSince=time(-90), waitedSeconds=10)
    cluster = MemoryCluster(job_body(queued.dump()))
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    reconciler = operator(cluster, shown(cluster))
    asyncio.run(reconciler.reconcile(KEY))
    assert (cluster.status.phase, cluster.status.phase_since) == ("Training", time())
    found = reconciler.metrics.registry.get_sample_value
    labels = {"namespace": "team", "phase": "Queued", "profile": "default"}
    assert found("qlora_job_phase_duration_seconds_sum", labels) == 90
    assert cluster.status.waited_seconds == 100
    running_job = {"namespace": "team", "name": NAME}
    assert found("qlora_job_last_progress_timestamp_seconds", running_job) == NOW.timestamp()
    asyncio.run(operator(cluster, shown(cluster), after(60)).reconcile(KEY))
    assert cluster.status.phase_since == time(), "it is still in that phase"


def test_a_workload_is_read_only_while_the_steps_job_is_suspended() -> None:
    cluster = stored(status_in("train"))
    train = child("train")
    cluster.jobs, cluster.pods = [train], [running(pod("train"))]
    reconcile(cluster)
    assert cluster.asked == []
    cluster.jobs, cluster.pods = [train | {"spec": {"suspend": True}}], []
    reconcile(cluster)
    assert "until a queue admits it" in message_of(cluster.status)
    evicted = {"type": "Evicted", "status": "True", "message": "Preempted to accommodate a workload"}
    cluster.workload = {"spec": {"queueName": "gpus"}, "status": {"conditions": [evicted]}}
    reconcile(cluster)
    assert (reason_of(cluster.status), message_of(cluster.status)) == (
        "WaitingForQueue",
        "Kueue: Preempted to accommodate a workload",
    )
    assert set(cluster.asked) == {f"uid-{NAME}-train-1"}


@pytest.mark.parametrize(
    "absence",
    [
        NotFoundError("page not found"),
        RejectedError('workloads.kueue.x-k8s.io is forbidden: cannot list resource "workloads"'),
        UnavailableError("status 500: conversion webhook for kueue.x-k8s.io/v1beta1, Kind=Workload failed"),
    ],
    ids=["no Kueue", "no right", "its webhook away"],
)
def test_a_queued_job_is_suspended_although_its_workload_cannot_be_read(absence: ClusterError) -> None:
    cluster = stored(status_in("train"), suspend=True)
    cluster.jobs = [child("train") | {"spec": {"suspend": True}}]
    cluster.workload = absence
    reconcile(cluster, shown(cluster))
    assert f"deletion of {NAME}-train-1" in cluster.writes
