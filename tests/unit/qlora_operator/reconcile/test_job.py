"""One pass over a job, against a cluster in memory: its writes, and its requeue."""

import asyncio
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from qlora_api.artifact_status import MergedStatus
from qlora_api.naming import JOB_UID_LABEL
from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.manifests.objects import document
from qlora_operator.decisions.observed.objects import Object, QLoRAJob
from qlora_operator.decisions.observed.parsing import controller_uid
from qlora_operator.kube.errors import (
    AlreadyExistsError,
    ClusterError,
    ConflictError,
    NotFoundError,
    RejectedError,
    UnavailableError,
)
from qlora_operator.kube.listing import ChildList, ChildView, child_view
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.reconcile.profile_limit import SECONDS_BETWEEN_LOOKS
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.watch.store import Store
from tests.support.builders import (
    ADAPTER,
    NAME,
    NOW,
    PROFILES,
    UID,
    after,
    child,
    condition,
    deleted,
    ended,
    failed,
    follow,
    job_body,
    make_job,
    message_of,
    node,
    pod,
    reason_of,
    result,
    running,
    starts,
    status_in,
    step_status,
    succeeded,
    time,
    with_resolved,
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
        self.workload: Object | ClusterError | None = NotFoundError("page not found")
        self.asked: list[str] = []
        self.writes: list[str] = []
        self.reads = 0
        self.conflicts = 0
        self.keeps_status = True
        self.existing: Object | None = None
        self.after_create: Callable[[], None] | None = None
        self.version = 100
        self.contended = False
        """Whether a quota changes while the API server counts a new Service or NetworkPolicy."""
        self._rejected = rejected

    @property
    def status(self) -> QLoRAJobStatus:
        return QLoRAJobStatus.model_validate(self.job["status"])

    def _write(self, kind: str) -> None:
        self.writes.append(kind)
        if kind in self._rejected:
            raise RejectedError("exceeded quota: team")

    async def get_qlora_job(self, namespace: str, name: str) -> Object | None:
        self.reads += 1
        return self.job or None

    async def list_jobs(self, namespace: str, job_name: str, job_uid: str) -> ChildList:
        self.reads += 1
        return ChildList([child_view("jobs", body) for body in self.jobs], str(self.version))

    async def list_pods(self, namespace: str, job_uid: str) -> ChildList:
        self.reads += 1
        return ChildList(self._pods(has_label), str(self.version))

    async def list_pods_of_child(self, namespace: str, child_uid: str) -> list[ChildView]:
        self.reads += 1
        return self._pods(lambda body: controller_uid(body) == child_uid)

    async def list_pods_named(self, namespace: str, name: str) -> list[ChildView]:
        self.reads += 1
        return self._pods(lambda body: body["metadata"]["name"] == name)

    def _pods(self, matches: Callable[[Object], bool]) -> list[ChildView]:
        return [child_view("pods", body) for body in self.pods if matches(body)]

    async def find_workload(self, namespace: str, child_uid: str) -> Object | None:
        self.asked.append(child_uid)
        if isinstance(self.workload, ClusterError):
            raise self.workload
        return self.workload

    async def create_job(self, namespace: str, manifest: dict[str, Any]) -> Object:
        self._write("Job")
        if self.existing is not None:
            raise AlreadyExistsError("already exists")
        made = {"uid": f"uid-{manifest['metadata']['name']}", "creationTimestamp": time(), **self._next()}
        self.jobs.append(manifest | {"metadata": manifest["metadata"] | made})
        created = self.jobs[-1]
        if self.after_create is not None:
            self.after_create()
        return created

    async def get_job(self, namespace: str, name: str) -> Object:
        if self.existing is None:
            raise NotFoundError(name)
        return self.existing

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        self._write(f"deletion of {name}")

    async def create_claim(self, namespace: str, manifest: dict[str, Any]) -> None:
        self._write("PersistentVolumeClaim")
        if manifest["metadata"]["name"] in self.claims:
            raise AlreadyExistsError("already exists")
        self.claims[manifest["metadata"]["name"]] = manifest

    async def get_claim(self, namespace: str, name: str) -> Object:
        return self.claims[name]

    async def create_service(self, namespace: str, manifest: Object) -> None:
        self._connect("Service")

    async def create_network_policy(self, namespace: str, manifest: Object) -> None:
        self._connect("NetworkPolicy")

    def _connect(self, kind: str) -> None:
        if self.contended:
            raise ConflictError('Operation cannot be fulfilled on resourcequotas "team"')
        self._write(kind)

    async def create_event(self, namespace: str, manifest: Object) -> None:
        self._write("Event")

    async def apply_status(self, job: QLoRAJob, status: Object) -> Object:
        if self.conflicts:
            self.conflicts -= 1
            raise ConflictError("the object has been modified")
        self._write("status")
        try:
            json.dumps(status, allow_nan=False)
        except ValueError as error:
            raise RejectedError("the request is no JSON") from error
        if not self.keeps_status:
            return self.job
        self.job = self.job | {"status": status, "metadata": self.job["metadata"] | self._next()}
        return self.job

    def _next(self) -> dict[str, str]:
        self.version += 1
        return {"resourceVersion": str(self.version)}


def reconcile(cluster: MemoryCluster, store: Store | None = None, now: datetime = NOW) -> float | None:
    """Seconds until the operator's next pass, as soon as it waits."""
    return until_it_waits(operator(cluster, store or Store(), now))


def until_it_waits(reconciler: Reconciler) -> float | None:
    for _ in range(10):
        if (again := asyncio.run(reconciler.reconcile(KEY))) != 0:
            return again
    raise AssertionError("the operator does not come to rest")


def operator(cluster: MemoryCluster, store: Store, now: datetime = NOW) -> Reconciler:
    return Reconciler(cluster, PROFILES, None, Metrics(), lambda: now, starts(), store)  # type: ignore[arg-type]


def full(cluster: MemoryCluster, store: Store, now: datetime = NOW) -> Reconciler:
    """The operator with a profile that allows one job at a time, and one such job."""
    limited = {"default": Profile.model_validate(PROFILES["default"].dump() | {"limits": {"jobs": 1}})}
    other = starts(job_body(status_in("train").dump()))
    return Reconciler(cluster, limited, None, Metrics(), lambda: now, other, store)  # type: ignore[arg-type]


def has_label(body: Object) -> bool:
    return JOB_UID_LABEL in (body["metadata"].get("labels") or {})


def shown(cluster: MemoryCluster, *, created: bool = False) -> Store:
    """Objects that the watches have shown, if no others exist."""
    store = Store()
    store.job_changed(cluster.job, created=created)
    for body in cluster.jobs:
        store.child_changed("jobs", body)
    for body in filter(has_label, cluster.pods):
        store.child_changed("pods", body)
    return store


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


def _taken(cluster: MemoryCluster) -> None:
    cluster.existing = child("prepare", owner="another")


def _unwatched(cluster: MemoryCluster) -> None:
    cluster.existing = without_labels(child("prepare"))


def _quota(kind: str) -> Callable[[MemoryCluster], None]:
    def exceed(cluster: MemoryCluster) -> None:
        cluster._rejected = (kind,)

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
    cluster.existing, cluster._rejected = None, ()
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


def test_a_rejected_deletion_under_a_finalizer_is_retried_with_backoff() -> None:
    cluster = stored(status_in("train"))
    cluster.job["metadata"] |= {"deletionTimestamp": time(), "finalizers": ["example.org/audit"]}
    cluster.jobs, cluster._rejected = [child("train")], (f"deletion of {NAME}-train-1",)
    reconciler = operator(cluster, shown(cluster))
    assert [asyncio.run(reconciler.reconcile(KEY)) for _ in range(3)] == [5, 10, 20]
    assert reason_of(cluster.status) == "JobRejected"


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


@pytest.mark.parametrize("spec", [{}, {"cleanupAfterSeconds": 0}, {"retry": {"request": 1}}], ids=str)
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


FAILED = follow(make_job(status_in("prepare")), child("prepare", Failed="x"), failed("prepare", 11, "BadDataset", ""))


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


@pytest.mark.parametrize("status", [FINISHED, FAILED], ids=["succeeded", "failed"])
def test_a_finished_job_without_clean_up_is_not_requeued(status: QLoRAJobStatus) -> None:
    cluster = stored(status)
    store = shown(cluster)
    assert reconcile(cluster, store) is None
    assert (cluster.writes, cluster.reads) == ([], 0)
    assert store.is_settled(KEY)


@pytest.mark.parametrize("document", [document(make_job()), None], ids=["begun by this release", "by an earlier one"])
def test_a_finished_job_of_another_release_is_cleaned_up_if_its_pods_can_read_it(
    document: str | None,
) -> None:
    assert FINISHED.resolved is not None
    fixed = FINISHED.resolved.model_copy(update={"document": document})
    cluster = stored(FINISHED.model_copy(update={"resolved": fixed}), cleanupAfterSeconds=0)
    cluster.job["spec"]["model"] = {"source": "nfs://server/model"}
    reconcile(cluster, now=after(10))
    assert [body["metadata"]["name"] for body in cluster.jobs] == ([f"{NAME}-clean-1"] if document else [])


def test_the_running_step_of_a_failed_job_is_deleted() -> None:
    cluster = stored(FAILED)
    cluster.jobs = [child("train")]
    store = shown(cluster)
    assert reconcile(cluster, store) is None
    assert cluster.writes == [f"deletion of {NAME}-train-1"]
    assert not store.is_settled(KEY)


def test_a_new_job_takes_four_calls_and_its_event_has_the_stored_message() -> None:
    cluster = MemoryCluster(job_body())
    assert reconcile(cluster, shown(cluster, created=True)) == 60
    assert (cluster.writes, cluster.reads) == (["PersistentVolumeClaim", "Job", "status", "Event"], 0)
    assert (cluster.status.phase, cluster.status.step) == ("Preparing", step_status("prepare"))


def test_the_first_job_of_a_job_older_than_the_watch_is_looked_up_first() -> None:
    cluster = MemoryCluster(job_body())
    store = shown(cluster)
    cluster.jobs = [with_resolved(child("prepare"), image="example.org/old")]
    reconcile(cluster, store)
    assert (cluster.writes, cluster.reads) == (["status", "Event"], 3)
    assert cluster.status.resolved is not None
    assert cluster.status.resolved.profile.image == "example.org/old"


def test_the_first_job_of_another_operator_has_the_resolved_spec() -> None:
    cluster = MemoryCluster(job_body())
    store = shown(cluster, created=True)
    cluster.existing = with_resolved(child("prepare"), image="example.org/other")
    reconcile(cluster, store)
    assert cluster.status.resolved is not None
    assert cluster.status.resolved.profile.image == "example.org/other"


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
    assert cluster.status.step is not None
    assert (cluster.status.step.job_name, cluster.reads) == (step_status("train").job_name, 3)


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
    assert cluster.status.step is not None
    assert cluster.status.step.attempt == 1


def test_a_failed_job_that_waits_for_a_place_is_still_cleaned_up() -> None:
    cluster = MemoryCluster(job_body(FAILED.dump(), cleanupAfterSeconds=0, retry={"request": 1}))
    until_it_waits(full(cluster, Store()))
    assert cluster.writes[0] == "Job"
    assert cluster.status.phase == "Failed"


def test_a_request_that_only_a_live_read_shows_waits_for_a_place_too() -> None:
    cluster = MemoryCluster(job_body(FAILED.dump(), cleanupAfterSeconds=0))
    store = shown(cluster)
    asked = {"spec": cluster.job["spec"] | {"retry": {"request": 1}}}
    cluster.job |= asked | {"metadata": cluster.job["metadata"] | {"generation": 2, "resourceVersion": "8"}}
    assert until_it_waits(full(cluster, store, after(10))) == SECONDS_BETWEEN_LOOKS
    assert (cluster.status.phase, reason_of(cluster.status, "Ready")) == ("Failed", "JobLimitReached")
    assert [body["metadata"]["name"] for body in cluster.jobs] == [f"{NAME}-clean-1"]


def test_a_deletion_that_the_api_server_rejects_is_reported() -> None:
    cluster = stored(status_in("train"), suspend=True)
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    cluster._rejected = (f"deletion of {NAME}-train-1",)
    assert reconcile(cluster) == 5
    assert reason_of(cluster.status) == "JobRejected"


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
        return reconciler.metrics.registry.get_sample_value("qlora_operator_status_write_errors_total")

    assert errors() == 1
    cluster.conflicts = 1
    assert errors() == 1


def test_a_change_of_phase_stores_its_time_and_measures_the_phase_before() -> None:
    queued = status_in("train", phase="Queued", phaseSince=time(-90))
    cluster = MemoryCluster(job_body(queued.dump()))
    cluster.jobs, cluster.pods = [child("train")], [running(pod("train"))]
    reconciler = operator(cluster, shown(cluster))
    asyncio.run(reconciler.reconcile(KEY))
    assert (cluster.status.phase, cluster.status.phase_since) == ("Training", time())
    found = reconciler.metrics.registry.get_sample_value
    labels = {"phase": "Queued", "profile": "default"}
    assert found("qlora_job_phase_duration_seconds_sum", labels) == 90
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


def without_labels(body: Object) -> dict[str, Any]:
    return {**body, "metadata": {**body["metadata"], "labels": {}}}


def without_owner(body: Object) -> dict[str, Any]:
    """As the Job controller leaves it after it has lost the labels that its Job selects it by."""
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
    _spec_changed(cluster, activeDeadlineSeconds=1000, retry={"request": 1})
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
    assert cluster.status.step is not None
    assert cluster.status.step.running_pod_name == f"{NAME}-train-2-pod1"


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
    assert cluster.status.step is not None
    assert (cluster.status.step.attempt, f"deletion of {NAME}-train-1" in cluster.writes) == (2, True)
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
    assert cluster.status.step is not None
    assert cluster.status.step.running_pod_name == f"{NAME}-train-1-pod1"


def test_a_new_pod_that_the_watch_is_about_to_show_is_not_taken_for_detached() -> None:
    cluster = stored(status_in("train"))
    cluster.jobs = [{**child("train"), "status": {"active": 1}}]
    store = shown(cluster)
    cluster.pods = [running(pod("train"))]
    reconcile(cluster, store)
    assert [write for write in cluster.writes if write.startswith("deletion")] == []
    assert cluster.status.phase == "Training"
