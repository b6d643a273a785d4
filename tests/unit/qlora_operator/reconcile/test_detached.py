"""Pods that a user has detached from their Job or hidden from the watches."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_operator.decisions.observed.objects import Object
from tests.support.builders import (
    NAME,
    after,
    child,
    condition,
    deleted,
    ended,
    message_of,
    pod,
    present,
    reason_of,
    running,
    status_in,
    step_status,
    time,
)
from tests.support.cluster.memory_cluster import MemoryCluster, reconcile, shown, stored, without_labels


def without_owner(body: Object) -> dict[str, Any]:
    """Drop a pod's owner, as the Job controller does after its labels are lost."""
    return {**body, "metadata": {**body["metadata"], "ownerReferences": []}}


def both(body: Object) -> dict[str, Any]:
    return without_owner(without_labels(body))


TAKEN = pytest.mark.parametrize("taken", [without_labels, without_owner, both], ids=["labels", "owner", "both"])


def training(taken: Callable[[Object], dict[str, Any]], **spec: Any) -> MemoryCluster:
    """The train pod was seen running, and now an object is taken away from it."""
    cluster = stored(status_in("train"), **spec)
    cluster.jobs, cluster.pods = [{**child("train"), "status": {"active": 1}}], [running(pod("train"))]
    reconcile(cluster)
    cluster.writes.clear()
    cluster.pods = [taken(cluster.pods[0])]
    return cluster


@TAKEN
def test_a_detached_running_pod_still_counts_against_the_deadline(
    taken: Callable[[Object], dict[str, Any]],
) -> None:
    cluster = training(taken, activeDeadlineSeconds=100)
    reconcile(cluster, shown(cluster))
    cluster.jobs = []
    reconcile(cluster, shown(cluster), after(39))
    assert cluster.status.last_failure is None
    reconcile(cluster, shown(cluster), after(41))
    assert (cluster.status.phase, cluster.status.active_seconds) == ("Failed", 101)
    assert reason_of(cluster.status, "Failed") == "DeadlineExceeded"


@TAKEN
def test_a_detached_pod_and_another_one_of_its_job_never_write_at_the_same_time(
    taken: Callable[[Object], dict[str, Any]],
) -> None:
    cluster = training(taken)
    detached = dict(cluster.pods[0])
    assert reconcile(cluster, shown(cluster)) == 15
    assert (cluster.writes, cluster.status.active_seconds) == ([f"deletion of {NAME}-train-1", "status"], 0)
    assert (reason_of(cluster.status), detached["metadata"]["name"] in message_of(cluster.status)) == (
        "PodDetached",
        True,
    )
    cluster.jobs = []
    for body in (detached, deleted(detached, -5)):
        cluster.pods = [body]
        reconcile(cluster, shown(cluster))
        assert (len(cluster.jobs), cluster.status.step and cluster.status.step.attempt) == (0, 1)
    cluster.pods = []
    reconcile(cluster, shown(cluster))
    assert [body["metadata"]["name"] for body in cluster.jobs] == [f"{NAME}-train-2"]
    assert (cluster.status.active_seconds, cluster.status.disruptions, cluster.status.failures) == (55, 0, 0)


def test_a_pod_without_an_owner_does_not_belong_to_a_step_without_a_job() -> None:
    cluster = stored(status_in("train", step=step_status("train", jobUid="").dump()))
    cluster.pods = [without_owner(running(pod("train")))]
    reconcile(cluster, shown(cluster))
    assert cluster.status.step is not None
    assert (cluster.status.step.running_pod, cluster.status.step.running_since) == ("", None)


def _created(cluster: MemoryCluster) -> list[str]:
    return [body["metadata"]["name"] for body in cluster.jobs if body["metadata"]["resourceVersion"] != "5"]


def _spec_changed(cluster: MemoryCluster, **spec: Any) -> None:
    newer = {"generation": 2, "resourceVersion": str(cluster.version)}
    cluster.job |= {"spec": cluster.job["spec"] | spec, "metadata": cluster.job["metadata"] | newer}


@TAKEN
def test_a_retried_job_waits_for_the_detached_pod_of_its_failure(
    taken: Callable[[Object], dict[str, Any]],
) -> None:
    cluster = training(taken, activeDeadlineSeconds=100)
    detached = dict(cluster.pods[0])
    reconcile(cluster, shown(cluster))
    cluster.jobs = []
    reconcile(cluster, shown(cluster), after(41))
    assert cluster.status.phase == "Failed"
    _spec_changed(cluster, activeDeadlineSeconds=1000, retry={"request": "a"})
    for second in (42, 43, 58):
        assert reconcile(cluster, shown(cluster), after(second)) == 15
        assert (_created(cluster), reason_of(cluster.status)) == ([], "PodDetached")
    cluster.pods = [ended(detached, 143, start=-60, end=61)]
    reconcile(cluster, shown(cluster), after(62))
    assert _created(cluster) == [f"{NAME}-train-2"]
    assert cluster.status.active_seconds == 121
    # The step has the name of its pod now.
    cluster.pods = [*cluster.pods, running(pod("train", 2), since=63)]
    reconcile(cluster, shown(cluster), after(64))
    assert (cluster.status.phase, cluster.status.disruptions, cluster.status.failures) == ("Training", 0, 0)
    assert present(cluster.status.step).running_pod_name == f"{NAME}-train-2-pod1"


def test_a_restart_waits_for_its_stopped_pod_although_that_is_detached() -> None:
    stalled = step_status(
        "train",
        runningPod=f"uid-{NAME}-train-1-pod1",
        runningPodName=f"{NAME}-train-1-pod1",
        runningSince=time(-4000),
        progressedAt=time(-4000),
    )
    conditions = [condition("Prepared", "True"), condition("Progressing", "False")]
    cluster = stored(status_in("train", step=stalled.dump(), conditions=conditions), retry={"onNoProgress": "restart"})
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"), since=-4000)]
    reconcile(cluster, shown(cluster))
    assert (present(cluster.status.step).attempt, f"deletion of {NAME}-train-1" in cluster.writes) == (2, True)
    hidden, cluster.jobs = both(cluster.pods[0]), []
    for suspended in (False, True, False):
        _spec_changed(cluster, suspend=suspended)
        cluster.pods = [hidden]
        reconcile(cluster, shown(cluster))
        assert _created(cluster) == []
    cluster.pods = []
    reconcile(cluster, shown(cluster))
    assert _created(cluster) == [f"{NAME}-train-2"]


@pytest.mark.parametrize("end", [[], [ended(pod("train", 4), 143)]], ids=["gone", "ended"])
def test_the_deletion_of_a_detached_pods_job_is_not_blamed_on_a_user(end: list[dict[str, Any]]) -> None:
    """Each time, the operator deletes that Job itself, and replaces it immediately."""
    cluster = stored(status_in("train", 4))
    cluster.jobs, cluster.pods = [child("train", 4)], [running(pod("train", 4))]
    reconcile(cluster)
    cluster.pods = [without_owner(cluster.pods[0])]
    reconcile(cluster, shown(cluster))
    assert reason_of(cluster.status) == "PodDetached"
    cluster.jobs, cluster.pods = [], [without_owner(body) for body in end]
    reconcile(cluster, shown(cluster))
    assert [body["metadata"]["name"] for body in cluster.jobs] == [f"{NAME}-train-5"]


def test_the_time_of_a_detached_pod_counts_although_its_job_has_another_pod() -> None:
    cluster = training(without_owner)
    detached = dict(cluster.pods[0])
    cluster.pods = [ended(detached, 0, start=-60, end=-10), running(pod("train", number=2), since=-5)]
    reconcile(cluster, shown(cluster))
    assert cluster.status.active_seconds == 50


def test_a_pod_without_labels_is_found_by_the_labels_of_its_job() -> None:
    cluster = stored(status_in("train"))
    cluster.jobs = [{**child("train"), "status": {"active": 1}}]
    cluster.pods = [without_labels(running(pod("train")))]
    reconcile(cluster, shown(cluster))
    assert cluster.writes[0] == f"deletion of {NAME}-train-1"
    assert present(cluster.status.step).running_pod_name == f"{NAME}-train-1-pod1"


def test_a_new_pod_that_the_watch_is_about_to_show_is_not_taken_for_detached() -> None:
    cluster = stored(status_in("train"))
    cluster.jobs = [{**child("train"), "status": {"active": 1}}]
    store = shown(cluster)
    cluster.pods = [running(pod("train"))]
    reconcile(cluster, store)
    assert [write for write in cluster.writes if write.startswith("deletion")] == []
    assert cluster.status.phase == "Training"
