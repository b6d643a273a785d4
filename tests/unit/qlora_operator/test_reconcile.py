"""One pass over a job, against a cluster in memory: what is written, what is left alone, and when it looks again."""

import asyncio
from typing import Any

import pytest

from qlora_api.naming import JOB_UID_LABEL
from qlora_api.status import QLoRAJobStatus
from qlora_operator.cluster import ConflictError, NotFoundError, RejectedError
from qlora_operator.decisions.observe import Object, QLoRAJob
from qlora_operator.metrics import Metrics
from qlora_operator.reconcile import Reconciler
from tests.support.builders import (
    NAME,
    NOW,
    PROFILES,
    UID,
    child,
    follow,
    job_body,
    make_job,
    message_of,
    pod,
    reason_of,
    running,
    status_in,
    succeeded,
    time,
)

KEY = ("team", NAME)
CLAIM = f"{NAME}-0a1b2c3d"


class MemoryCluster:
    """Keeps one QLoRAJob and its children. `rejected`: kinds that the API server does not admit."""

    def __init__(self, job: dict[str, Any], *, rejected: tuple[str, ...] = ()) -> None:
        self.job = job
        self.jobs: list[Object] = []
        self.pods: list[Object] = []
        self.claims: dict[str, Object] = {}
        self.workloads: list[Object] | None = None
        self.asked: list[str] = []
        self.writes: list[str] = []
        self.lists = 0
        self._rejected = rejected

    @property
    def status(self) -> QLoRAJobStatus:
        return QLoRAJobStatus.model_validate(self.job["status"])

    def _write(self, kind: str) -> None:
        self.writes.append(kind)
        if kind in self._rejected:
            raise RejectedError("exceeded quota: team")

    async def get_qlora_job(self, namespace: str, name: str) -> Object:
        return self.job

    async def list_jobs(self, namespace: str, job_uid: str) -> list[Object]:
        self.lists += 1
        return self.jobs

    async def list_pods(self, namespace: str, job_uid: str) -> list[Object]:
        return self.pods

    async def list_workloads(self, namespace: str, child_uid: str) -> list[Object] | None:
        self.asked.append(child_uid)
        return self.workloads

    async def create_job(self, namespace: str, manifest: dict[str, Any]) -> Object:
        self._write("Job")
        made = {"uid": f"uid-{manifest['metadata']['name']}", "creationTimestamp": time()}
        self.jobs.append(manifest | {"metadata": manifest["metadata"] | made})
        return self.jobs[-1]

    async def get_job(self, namespace: str, name: str) -> Object:
        raise NotFoundError(name)

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        self._write(f"deletion of {name}")

    async def create_claim(self, namespace: str, manifest: dict[str, Any]) -> None:
        self._write("PersistentVolumeClaim")
        if manifest["metadata"]["name"] in self.claims:
            raise ConflictError("already exists")
        self.claims[manifest["metadata"]["name"]] = manifest

    async def get_claim(self, namespace: str, name: str) -> Object:
        return self.claims[name]

    async def create_event(self, namespace: str, manifest: Object) -> None:
        self._write("Event")

    async def apply_status(self, job: QLoRAJob, status: Object) -> None:
        self._write("status")
        self.job = self.job | {"status": status}


def reconcile(cluster: MemoryCluster) -> float | None:
    """Seconds until the operator looks again, as soon as it waits."""
    reconciler = Reconciler(cluster, PROFILES, None, Metrics(), lambda: NOW)  # type: ignore[arg-type]
    for _ in range(10):
        if (again := asyncio.run(reconciler.reconcile(KEY))) != 0:
            return again
    raise AssertionError("the operator does not come to rest")


def stored(status: QLoRAJobStatus, **spec: Any) -> MemoryCluster:
    return MemoryCluster(job_body(status.dump(), **spec))


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


@pytest.mark.parametrize(("kind", "reason"), [("Job", "JobRejected"), ("PersistentVolumeClaim", "ClaimRejected")])
def test_an_object_that_the_api_server_rejects_is_reported_in_its_words_and_tried_again(kind: str, reason: str) -> None:
    cluster = MemoryCluster(job_body(), rejected=(kind,))
    assert reconcile(cluster) == 30
    assert (cluster.status.phase, reason_of(cluster.status)) == ("Pending", reason)
    assert "exceeded quota: team" in message_of(cluster.status)
    assert cluster.jobs == []


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    cluster = stored(status_in("train"))
    cluster.job["metadata"]["deletionTimestamp"] = time()
    cluster.pods = [running(pod("train"))]
    assert reconcile(cluster) is None
    assert (cluster.writes, cluster.lists) == ([], 0)


FINISHED = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))


def test_a_finished_job_with_a_clean_up_to_come_is_looked_at_when_that_is_due() -> None:
    cluster = stored(FINISHED, cleanupAfterSeconds=100)
    assert reconcile(cluster) == 100
    assert reason_of(cluster.status, "CleanedUp") == "Scheduled"


def test_a_finished_job_without_clean_up_is_not_looked_at_any_more() -> None:
    cluster = stored(FINISHED)
    assert reconcile(cluster) is None
    assert (cluster.writes, cluster.lists) == ([], 0)


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
    cluster.workloads = [{"spec": {"queueName": "gpus"}, "status": {"conditions": [evicted]}}]
    reconcile(cluster)
    assert (reason_of(cluster.status), message_of(cluster.status)) == (
        "WaitingForQueue",
        "Kueue: Preempted to accommodate a workload",
    )
    assert set(cluster.asked) == {f"uid-{NAME}-train-1"}
