"""A cluster in memory, and an operator that reconciles in it."""

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from qlora_api.naming import JOB_UID_LABEL
from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
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
from qlora_operator.kube.listing import ChildList, ChildView, child_view, unfinished_of_earlier
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.watch.store import Store
from tests.support.builders import (
    NAME,
    NOW,
    PROFILES,
    REVISIONS,
    child,
    failed,
    follow,
    job_body,
    make_job,
    revision_body,
    starts,
    status_in,
    time,
)

KEY = ("team", NAME)


class MemoryCluster:
    """Keeps one QLoRAJob and its children. `rejected`: kinds that it does not admit."""

    def __init__(self, job: dict[str, Any], *, rejected: tuple[str, ...] = ()) -> None:
        self.job = job
        self.jobs: list[Object] = []
        self.pods: list[Object] = []
        self.claims: dict[str, Object] = {}
        name = job.get("status", {}).get("currentRevision")
        self.revisions: dict[str, Object] = {} if name is None else {name: revision_body(REVISIONS[name], name)}
        self.workload: Object | ClusterError | None = NotFoundError("page not found")
        self.asked: list[str] = []
        self.writes: list[str] = []
        self.reads = 0
        self.conflicts = self.unavailable = 0
        self.patches: list[Sequence[Object]] = []
        self.keeps_status = True
        self.existing: Object | None = None
        self.after_create: Callable[[], None] | None = None
        self.version = 100
        self.contended = False
        """Whether a quota changes while the API server counts a new Service or NetworkPolicy."""
        self.managed_by: str | None = None
        """The controller that a webhook gives Jobs to."""
        self.tried, self.queue_rejects = 0, False
        self.rejected = rejected

    @property
    def status(self) -> QLoRAJobStatus:
        return QLoRAJobStatus.model_validate(self.job["status"])

    def _write(self, kind: str) -> None:
        self.writes.append(kind)
        if kind in self.rejected:
            raise RejectedError("exceeded quota: team")

    async def get_qlora_job(self, namespace: str, name: str) -> Object | None:
        self.reads += 1
        return self.job or None

    async def list_jobs(self, namespace: str, job_uid: str) -> ChildList:
        self.reads += 1
        labelled = [body for body in self.jobs if body["metadata"]["labels"][JOB_UID_LABEL] == job_uid]
        return ChildList([child_view("jobs", body) for body in labelled], str(self.version))

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
        self.jobs.append(self._webhook(manifest) | {"metadata": manifest["metadata"] | made})
        created = self.jobs[-1]
        if self.after_create is not None:
            self.after_create()
        return created

    async def try_job(self, namespace: str, manifest: dict[str, Any]) -> Object:
        self.tried += 1
        if self.queue_rejects:
            raise RejectedError("failed calling webhook")
        return self._webhook(manifest)

    def _webhook(self, manifest: dict[str, Any]) -> dict[str, Any]:
        return manifest | {"spec": manifest["spec"] | {"managedBy": self.managed_by}}

    async def get_job(self, namespace: str, name: str) -> Object:
        if self.existing is None:
            raise NotFoundError(name)
        return self.existing

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        self._write(f"deletion of {name}")

    async def delete_qlora_job(self, job: QLoRAJob) -> None:
        self._write(f"deletion of {job.name} {job.uid} {job.resource_version}")
        self.job = {}

    async def patch_config_map(self, namespace: str, name: str, patch: Sequence[Object]) -> None:
        self.unavailable -= 1
        if self.unavailable >= 0:
            raise UnavailableError("no answer")
        self.patches.append(patch)

    async def list_revisions(self, namespace: str, job_uid: str) -> list[Object]:
        self.reads += 1
        return list(self.revisions.values())

    async def get_revision(self, namespace: str, name: str) -> Object:
        self.reads += 1
        if name not in self.revisions:
            raise NotFoundError(name)
        return self.revisions[name]

    async def create_revision(self, namespace: str, manifest: Object) -> None:
        self._write("ControllerRevision")
        if manifest["metadata"]["name"] in self.revisions:
            raise AlreadyExistsError("already exists")
        self.revisions[manifest["metadata"]["name"]] = manifest

    async def list_unfinished_of_earlier(self, namespace: str, job_name: str, uid: str) -> list[str]:
        self.reads += 2
        pods = [unfinished_of_earlier("pods", job_name, uid, body) for body in self.pods]
        jobs = [unfinished_of_earlier("jobs", job_name, uid, body) for body in self.jobs]
        return [name for name in (*pods, *jobs) if name is not None]

    async def adopt_revision(self, namespace: str, name: str, version: str, owner: Object) -> Object:
        self._write("owner of a ControllerRevision")
        labels = {"labels": {JOB_UID_LABEL: owner["uid"]}}
        metadata = self.revisions[name]["metadata"] | labels | {"ownerReferences": [owner]}
        self.revisions[name] = {**self.revisions[name], "metadata": metadata}
        return self.revisions[name]

    async def change_claim_owners(self, namespace: str, claim: Object, owners: Sequence[Object]) -> None:
        self._write("owners of a claim")
        metadata = claim["metadata"] | {"ownerReferences": list(owners)}
        self.claims[metadata["name"]] = {**claim, "metadata": metadata}

    async def create_claim(self, namespace: str, manifest: dict[str, Any]) -> None:
        self._write("PersistentVolumeClaim")
        if manifest["metadata"]["name"] in self.claims:
            raise AlreadyExistsError("already exists")
        self.claims[manifest["metadata"]["name"]] = manifest

    async def get_claim(self, namespace: str, name: str) -> Object:
        if name not in self.claims:
            raise NotFoundError(name)
        return self.claims[name]

    async def create_service(self, namespace: str, manifest: Object) -> None:
        self._connect("Service")

    async def apply_network_policy(self, namespace: str, manifest: Object) -> None:
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
    """Objects that the watches have shown, and the revision that was read, if no others exist."""
    store = Store()
    store.job_changed(cluster.job, created=created)
    if name := cluster.job["status"].get("currentRevision"):
        store.note_revision((KEY[0], cluster.job["metadata"]["uid"]), cluster.revisions[name])
    for body in cluster.jobs:
        store.child_changed("jobs", body)
    for body in filter(has_label, cluster.pods):
        store.child_changed("pods", body)
    return store


def stored(status: QLoRAJobStatus, **spec: Any) -> MemoryCluster:
    return MemoryCluster(job_body(status.dump(), **spec))


FAILED = follow(make_job(status_in("prepare")), child("prepare", Failed="x"), failed("prepare", 11, "BadDataset", ""))


def without_labels(body: Object) -> dict[str, Any]:
    return {**body, "metadata": {**body["metadata"], "labels": {}}}
