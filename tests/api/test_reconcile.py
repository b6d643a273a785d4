"""The operator's passes against a real API server: what they write, wait for and leave alone.

There are no controllers and no node here: these tests end the Jobs themselves, as the Job controller and a kubelet
would. Faults at each write are in test_crash_sweep.py.
"""

import asyncio
import time
from typing import Any

import pytest

from devcluster.controlplane import ControlPlane
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.watch.resync import Resync
from qlora_operator.watch.store import Store
from tests.support.played import NAMESPACE, STEPS, Api, connected, operator, prepared, settle


class CountingCluster(Cluster):
    """Counts its calls that change something."""

    changes = 0

    async def _request(self, method: str, path: str, **request: Any) -> bytes:
        self.changes += method != "GET"
        return await super()._request(method, path, **request)


async def live(api: Api, name: str) -> CountingCluster:
    """The whole life of a job. Each step is begun by an operator that has just been started."""
    cluster = CountingCluster(api.client)
    await api.apply(name)
    uid = (await api.job(name))["metadata"]["uid"]
    for step in STEPS:
        await settle(operator(cluster), (NAMESPACE, name))
        (job,) = [job for job in await api.children(name) if job["metadata"]["labels"]["qlora.dev/step"] == step]
        await api.end(job, uid)
    await settle(operator(cluster), (NAMESPACE, name))
    return cluster


async def check_end(api: Api, name: str) -> None:
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
    assert sorted(reasons) == ["Preparing", "Publishing", "Queued", "Succeeded"]


@pytest.fixture(scope="module")
def namespace(plane: ControlPlane) -> ControlPlane:
    return prepared(plane)


def test_a_job_lives_and_ends_and_then_nothing_is_written(namespace: ControlPlane) -> None:
    async def scenario() -> None:
        async with connected(namespace) as api:
            cluster = await live(api, "whole")
            await check_end(api, "whole")
            before = cluster.changes
            managed = (await api.job("whole"))["metadata"]["managedFields"]
            owned = [entry["fieldsV1"] for entry in managed if entry.get("subresource") == "status"]
            assert owned == [{"f:status": {}}], "each write would compute and store the owner of each field"
            assert await settle(operator(cluster), (NAMESPACE, "whole")) is None
            assert cluster.changes == before

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
