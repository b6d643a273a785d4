"""The operator's passes against a real API server: whatever call a kill comes before or after, the end is the same.

There are no controllers and no node here: this test ends the Jobs itself, as the Job controller and a kubelet would.
"""

import asyncio
import copy
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from devcluster.controlplane import ControlPlane
from qlora_api.contract import ResultRecord, encode_record
from qlora_api.status import AdapterStatus, DatasetStatus, MemoryStatus, StepName
from qlora_operator.cluster import Cluster, connect
from qlora_operator.decisions.observe import Object
from qlora_operator.metrics import Metrics
from qlora_operator.reconcile import Reconciler
from qlora_operator.resync import Resync
from qlora_operator.starts import Starts
from qlora_operator.store import Store
from qlora_operator.transport import Transport
from qlora_operator.workqueue import Key, RetryError
from tests.support.builders import PROFILES

NAMESPACE = "team"
STEPS: tuple[StepName, ...] = ("prepare", "train", "publish")
ENDED = "2026-01-02T03:04:05Z"
FOUND: dict[StepName, dict[str, Any]] = {
    "prepare": {
        "model_revision": "c0ffee",
        "memory": MemoryStatus(estimate_bytes=10, low_bytes=9, high_bytes=11, verdict="unknown"),
        "dataset": DatasetStatus(format="chat", rows=12, used_rows=10),
    },
    "train": {"training_step": 10, "total_steps": 10, "loss": 1.25},
    "publish": {
        "adapter": AdapterStatus(
            uri="pvc://a/b",
            sha256="a" * 64,
            size_bytes=7,
            base_model="hf://org/model",
            base_revision="c0ffee",
            rank=48,
            served_rank=64,
            quantization="nf4",
        )
    },
}


class KilledError(Exception):
    """The operator's process is gone."""


class MortalCluster(Cluster):
    """Dies before or after its n-th call that changes something, as a process can."""

    def __init__(self, api: Transport, dies_at: float = float("inf"), *, after: bool = False) -> None:
        super().__init__(api)
        self.changes = 0
        self._dies_at = dies_at
        self._after = after

    async def _request(self, method: str, path: str, **request: Any) -> bytes:
        if method == "GET":
            return await super()._request(method, path, **request)
        self.changes += 1
        if self.changes == self._dies_at and not self._after:
            raise KilledError
        answer = await super()._request(method, path, **request)
        if self.changes == self._dies_at:
            raise KilledError
        return answer


class Api:
    """The API server as its administrator and its other clients use it."""

    def __init__(self, cluster: Cluster) -> None:
        self.client = cluster._transport
        self._cluster = cluster

    async def send(self, method: str, path: str, body: Object | None = None) -> dict[str, Any]:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        return json.loads(await self._cluster._request(method, path, body=body, content_type=kind))

    async def create(self, path: str, body: Object) -> dict[str, Any]:
        return await self.send("POST", path, body)

    async def job(self, name: str) -> dict[str, Any]:
        return await self.send("GET", f"/apis/qlora.dev/v1alpha1/namespaces/{NAMESPACE}/qlorajobs/{name}")

    async def children(self, name: str, kind: str = "/apis/batch/v1", plural: str = "jobs") -> list[dict[str, Any]]:
        listed = await self.send("GET", f"{kind}/namespaces/{NAMESPACE}/{plural}")
        return [item for item in listed["items"] if item["metadata"].get("labels", {}).get("qlora.dev/job") == name]

    async def apply(self, name: str) -> None:
        body = {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAJob",
            "metadata": {"name": name},
            "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}},
        }
        await self.create(f"/apis/qlora.dev/v1alpha1/namespaces/{NAMESPACE}/qlorajobs", body)

    async def end(self, job: dict[str, Any], uid: str) -> None:
        """Do as the Job controller and the kubelet do with a step that ends well."""
        template = copy.deepcopy(job["spec"]["template"])
        name, step = job["metadata"]["name"], job["metadata"]["labels"]["qlora.dev/step"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
        metadata = template["metadata"] | {"name": name, "ownerReferences": [owner | {"controller": True}]}
        pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
        pod = await self.create(pods, template | {"apiVersion": "v1", "kind": "Pod", "metadata": metadata})
        record = ResultRecord(
            job_uid=uid,
            pod_uid=pod["metadata"]["uid"],
            step=step,
            time=ENDED,
            outcome="succeeded",
            exit_code=0,
            reason="Done",
            **FOUND[step],
        )
        terminated = {
            "exitCode": 0,
            "reason": "Completed",
            "message": encode_record(record),
            "startedAt": ENDED,
            "finishedAt": ENDED,
        }
        container = {"name": "trainer", "image": "", "imageID": "", "ready": False, "restartCount": 0}
        status = {"phase": "Succeeded", "containerStatuses": [container | {"state": {"terminated": terminated}}]}
        await self.send("PATCH", f"{pods}/{name}/status", {"status": status})
        conditions = [
            {"type": kind, "status": "True", "lastTransitionTime": ENDED, "lastProbeTime": ENDED}
            for kind in ("SuccessCriteriaMet", "Complete")
        ]
        done = {"succeeded": 1, "startTime": ENDED, "completionTime": ENDED, "conditions": conditions}
        await self.send("PATCH", f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs/{name}/status", {"status": done})


@asynccontextmanager
async def connected(plane: ControlPlane) -> AsyncIterator[Api]:
    async with connect(plane.kubeconfig) as cluster:
        yield Api(cluster)


def operator(cluster: Cluster, store: Store | None = None) -> Reconciler:
    return Reconciler(
        cluster=cluster,
        profiles=PROFILES,
        progress=None,
        metrics=Metrics(),
        clock=lambda: datetime.now(UTC),
        store=store or Store(),
        starts=Starts(cluster.list_qlora_jobs, lambda _key: None, time.monotonic),
    )


async def settle(reconciler: Reconciler, key: Key) -> float | None:
    """Pass after pass until the operator wants to wait; how long."""
    for _ in range(10):
        if (again := await reconciler.reconcile(key)) is None or again > 1:
            return again
    raise AssertionError("the operator does not come to rest")


async def live(api: Api, name: str, first: MortalCluster) -> MortalCluster:
    """The whole life of a job, from a first operator and, when that dies, a second one."""
    await api.apply(name)
    key, cluster = (NAMESPACE, name), first
    uid = (await api.job(name))["metadata"]["uid"]
    for step in STEPS:
        try:
            await settle(operator(cluster), key)
        except KilledError:
            cluster = MortalCluster(api.client)
            await settle(operator(cluster), key)
        (job,) = [job for job in await api.children(name) if job["metadata"]["labels"]["qlora.dev/step"] == step]
        await api.end(job, uid)
    try:
        await settle(operator(cluster), key)
    except KilledError:
        cluster = MortalCluster(api.client)
        await settle(operator(cluster), key)
    return cluster


async def check_end(api: Api, name: str, *, killed: bool = False) -> None:
    job = await api.job(name)
    status = job["status"]
    assert status["phase"] == "Succeeded", status
    assert (status["adapter"]["sha256"], status["failures"], status["disruptions"]) == ("a" * 64, 0, 0)
    assert status["dataset"]["rows"] == 12
    children = await api.children(name)
    assert sorted(child["metadata"]["name"] for child in children) == sorted(f"{name}-{step}-1" for step in STEPS)
    assert len(await api.children(name, "/api/v1", "persistentvolumeclaims")) == 1
    assert set(job["metadata"]) & {"finalizers", "annotations"} == set()
    listed = await api.send("GET", f"/api/v1/namespaces/{NAMESPACE}/events")
    reasons = [event["reason"] for event in listed["items"] if event["involvedObject"]["uid"] == job["metadata"]["uid"]]
    # An Event follows the status that it is about: if the operator ends in between, it is missing, and never doubled.
    assert killed or sorted(reasons) == ["Preparing", "Publishing", "Queued", "Succeeded"]
    assert len(reasons) == len(set(reasons)), f"an Event was doubled: {reasons}"


@pytest.fixture(scope="module")
def namespace(plane: ControlPlane) -> ControlPlane:
    plane.kubectl("create", "namespace", NAMESPACE)
    plane.kubectl("create", "serviceaccount", "default", f"--namespace={NAMESPACE}")
    return plane


def test_a_job_lives_and_ends_and_then_nothing_is_written(namespace: ControlPlane) -> None:
    async def scenario() -> None:
        async with connected(namespace) as api:
            cluster = await live(api, "whole", MortalCluster(api.client))
            await check_end(api, "whole")
            before = cluster.changes
            managed = (await api.job("whole"))["metadata"]["managedFields"]
            owned = [entry["fieldsV1"] for entry in managed if entry.get("subresource") == "status"]
            assert owned == [{"f:status": {}}], "each write would compute and store the owner of each field"
            assert await settle(operator(cluster), (NAMESPACE, "whole")) is None
            assert cluster.changes == before

    asyncio.run(scenario())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_call_it_ends_the_same(namespace: ControlPlane, after: bool) -> None:
    async def scenario() -> None:
        async with connected(namespace) as api:
            for number in itertools.count(1):
                name = f"killed-{'after' if after else 'before'}-{number}"
                mortal = MortalCluster(api.client, number, after=after)
                last = await live(api, name, mortal)
                await check_end(api, name, killed=last is not mortal)
                if last is mortal:
                    assert number > 10, "no call was counted"
                    return

    asyncio.run(scenario())


def test_a_job_of_somebody_else_under_the_same_name_is_waited_for_and_left_alone(namespace: ControlPlane) -> None:
    async def scenario() -> None:
        async with connected(namespace) as api:
            jobs = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
            container = {"name": "other", "image": "example.org/other"}
            template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
            other = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "taken-prepare-1"}}
            await api.create(jobs, other | {"spec": {"template": template}})
            await api.apply("taken")
            reconciler = operator(Cluster(api.client))
            assert await settle(reconciler, (NAMESPACE, "taken")) == 5
            waiting = (await api.job("taken"))["status"]
            assert (waiting["phase"], waiting["step"]["jobUid"]) == ("Pending", "")
            assert [c["reason"] for c in waiting["conditions"] if c["type"] == "Succeeded"] == ["NameTaken"]
            await api.send("DELETE", f"{jobs}/taken-prepare-1", {"propagationPolicy": "Background"})
            await settle(reconciler, (NAMESPACE, "taken"))
            assert (await api.job("taken"))["status"]["phase"] == "Preparing"

    asyncio.run(scenario())


def test_what_changed_since_it_was_read_is_read_again_and_not_overwritten(namespace: ControlPlane) -> None:
    class Suspended(Cluster):
        """Somebody suspends the job between the operator's look and its write."""

        async def apply_status(self, job: Any, status: Object) -> Object:
            path = f"/apis/qlora.dev/v1alpha1/namespaces/{NAMESPACE}/qlorajobs/{job.name}"
            await Api(self).send("PATCH", path, {"spec": {"suspend": True}})
            return await super().apply_status(job, status)

    async def scenario() -> None:
        async with connected(namespace) as api:
            await api.apply("late")
            first = operator(Suspended(api.client))
            assert await first.reconcile((NAMESPACE, "late")) == 0
            with pytest.raises(RetryError, match="changed or deleted in the meantime"):
                await first.reconcile((NAMESPACE, "late"))
            for _ in ("stops the step that was started", "sees that it has stopped"):
                await settle(operator(Cluster(api.client)), (NAMESPACE, "late"))
            status = (await api.job("late"))["status"]
            assert (status["phase"], status["observedGeneration"]) == ("Suspended", 2)
            assert await api.children("late") == []

    asyncio.run(scenario())


def test_an_operator_whose_watches_show_nothing_is_late_and_never_wrong(namespace: ControlPlane) -> None:
    async def scenario() -> None:
        async with connected(namespace) as api:
            cluster, store = Cluster(api.client), Store()
            asked: dict[Key, None] = {}
            resync = Resync(
                cluster,
                (NAMESPACE,),
                lambda key, _: asked.setdefault(key),
                store=store,
                interval=300,
                monotonic=time.monotonic,
            )
            reconciler = operator(cluster, store)

            async def follow_the_lists() -> None:
                """List, and work on what that asks for, until nothing changes any more."""
                for _ in range(3):
                    asked.clear()
                    await resync.once()
                    for key in asked:
                        await settle(reconciler, key)

            await resync.fill()
            await api.apply("unseen")
            uid = (await api.job("unseen"))["metadata"]["uid"]
            for step in STEPS:
                await follow_the_lists()
                (job,) = [
                    job for job in await api.children("unseen") if job["metadata"]["labels"]["qlora.dev/step"] == step
                ]
                await api.end(job, uid)
            await follow_the_lists()
            await check_end(api, "unseen")
            asked.clear()
            await resync.once()
            assert (NAMESPACE, "unseen") not in asked, "a settled job is worked on at every resync"
            await api.send("DELETE", f"/apis/qlora.dev/v1alpha1/namespaces/{NAMESPACE}/qlorajobs/unseen")
            await follow_the_lists()
            assert store.held((NAMESPACE, "unseen")) is None

    asyncio.run(scenario())


def test_a_second_operator_with_an_old_view_starts_nothing_twice(namespace: ControlPlane) -> None:
    async def scenario() -> None:
        async with connected(namespace) as api:
            await api.apply("shared")
            key, body = (NAMESPACE, "shared"), await api.job("shared")
            stores = [Store(), Store()]
            for store in stores:
                store.job_changed(body, created=True)
            first, second = (operator(Cluster(api.client), store) for store in stores)
            await settle(first, key)
            # The second one's watches are so late that it still sees a new job.
            assert await second.reconcile(key) == 0
            with pytest.raises(RetryError, match="changed or deleted in the meantime"):
                await second.reconcile(key)
            await settle(second, key)
            job = await api.job("shared")
            assert (job["status"]["phase"], job["status"]["step"]["attempt"]) == ("Preparing", 1)
            assert len(await api.children("shared")) == 1
            (prepare,) = await api.children("shared")
            await api.end(prepare, job["metadata"]["uid"])
            for child in await api.children("shared"):
                stores[0].child_changed("jobs", child)
            await settle(first, key)
            await settle(second, key)
            assert len(await api.children("shared")) == 2

    asyncio.run(scenario())
