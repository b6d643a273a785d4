"""QLoRAJobs whose Jobs a test ends itself, and one operator's passes."""

import copy
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from devcluster.controlplane import ControlPlane
from qlora_api.contract import ExitCode, ResultRecord, encode_record
from qlora_api.profile import Profile
from qlora_api.status import DatasetStatus, StepName
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.connection import connect
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.reconcile.profile_limit import Starts
from qlora_operator.watch.store import Store
from tests.support.builders import ADAPTER, MEMORY, PROFILE, PROFILES

NAMESPACE, SHARED = "team", "shared"
_SHARED = Profile.model_validate(PROFILE.dump() | {"workspace": {"topology": "shared", "accessMode": "ReadWriteMany"}})
"""The profile of that name, for jobs of several nodes."""
STEPS: tuple[StepName, ...] = ("prepare", "train", "publish")
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_CONTAINER = {"name": "trainer", "image": "", "imageID": "", "ready": False, "restartCount": 0}
ENDED = "2026-01-02T03:04:05Z"
FOUND: dict[StepName, dict[str, Any]] = {
    "prepare": {
        "model_revision": "c0ffee",
        "memory": MEMORY,
        "dataset": DatasetStatus(format="chat", rows=12, used_rows=10),
    },
    "train": {"training_step": 10, "total_steps": 10, "loss": 1.25},
    "publish": {"adapter": ADAPTER.model_copy(update={"uri": "pvc://a/b"})},
}


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
        return await self.send("GET", f"/apis/qlora.dev/v1beta1/namespaces/{NAMESPACE}/qlorajobs/{name}")

    async def children(self, name: str, kind: str = "/apis/batch/v1", plural: str = "jobs") -> list[dict[str, Any]]:
        selector = f"labelSelector=qlora.dev%2Fjob%3D{name}"
        listed = await self.send("GET", f"{kind}/namespaces/{NAMESPACE}/{plural}?{selector}")
        return list(listed["items"])

    async def apply(self, name: str, **spec: Any) -> None:
        body = {
            "apiVersion": "qlora.dev/v1beta1",
            "kind": "QLoRAJob",
            "metadata": {"name": name},
            "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}, **spec},
        }
        await self.create(f"/apis/qlora.dev/v1beta1/namespaces/{NAMESPACE}/qlorajobs", body)

    async def run(self, job: dict[str, Any]) -> None:
        """Act as Job controller and kubelet for a step that runs on all of its nodes."""
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": job["metadata"]["name"],
            "uid": job["metadata"]["uid"],
        }
        names = _names(job)
        for number, name in enumerate(names):
            template = copy.deepcopy(job["spec"]["template"])
            metadata = template["metadata"] | {"name": name, "ownerReferences": [owner | {"controller": True}]}
            if len(names) > 1:
                metadata["annotations"] |= {"batch.kubernetes.io/job-completion-index": str(number)}
            await self.create(_PODS, template | {"apiVersion": "v1", "kind": "Pod", "metadata": metadata})
            await self._report(name, "Running", {"running": {"startedAt": ENDED}})

    async def end(self, job: dict[str, Any], uid: str, code: int = 0, *, runs: bool = False) -> None:
        """The step ends well, or badly for good. `runs`: its pods run already."""
        if not runs:
            await self.run(job)
        for name in _names(job):
            await self._terminate(job, uid, name, code, "BadDataset" if code else "Done")
        kinds = ("FailureTarget", "Failed") if code else ("SuccessCriteriaMet", "Complete")
        await self._finish(job, kinds, {"failed": 1} if code else {"succeeded": 1, "completionTime": ENDED})

    async def lose(self, job: dict[str, Any], uid: str) -> None:
        """Of several running pods, the last vanishes with its node; the others notice."""
        *others, lost = _names(job)
        for name in others:
            await self._terminate(job, uid, name, int(ExitCode.PEER_LOST), ExitCode.PEER_LOST.reason)
        await self.send("DELETE", f"{_PODS}/{lost}?gracePeriodSeconds=0")
        await self._finish(job, ("FailureTarget", "Failed"), {"failed": len(others) + 1})

    async def _terminate(self, job: dict[str, Any], uid: str, name: str, code: int, reason: str) -> None:
        pod = await self.send("GET", f"{_PODS}/{name}")
        step = job["metadata"]["labels"]["qlora.dev/step"]
        record = ResultRecord(
            job_uid=uid,
            pod_uid=pod["metadata"]["uid"],
            step=step,
            time=ENDED,
            outcome="failed" if code else "succeeded",
            exit_code=code,
            reason=reason,
            **({} if code else FOUND.get(step, {})),
        )
        terminated = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "message": encode_record(record),
            "startedAt": ENDED,
            "finishedAt": ENDED,
        }
        await self._report(name, "Failed" if code else "Succeeded", {"terminated": terminated})

    async def _report(self, name: str, phase: str, state: Object) -> None:
        status = {"phase": phase, "containerStatuses": [_CONTAINER | {"state": state}]}
        await self.send("PATCH", f"{_PODS}/{name}/status", {"status": status})

    async def _finish(self, job: dict[str, Any], kinds: Iterable[str], counts: Object) -> None:
        conditions = [
            {"type": kind, "status": "True", "reason": "Test", "lastTransitionTime": ENDED, "lastProbeTime": ENDED}
            for kind in kinds
        ]
        path = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs/{job['metadata']['name']}/status"
        await self.send("PATCH", path, {"status": {"startTime": ENDED, "conditions": conditions, **counts}})


def _names(job: dict[str, Any]) -> list[str]:
    """The names of the step's pods."""
    name, nodes = job["metadata"]["name"], job["spec"]["completions"]
    return [name] if nodes == 1 else [f"{name}-{number}" for number in range(nodes)]


@asynccontextmanager
async def connected(plane: ControlPlane) -> AsyncIterator[Api]:
    async with connect(plane.kubeconfig) as cluster:
        yield Api(cluster)


def operator(cluster: Cluster, store: Store | None = None) -> Reconciler:
    return Reconciler(
        cluster=cluster,
        profiles=PROFILES | {SHARED: _SHARED},
        progress=None,
        metrics=Metrics(),
        clock=lambda: datetime.now(UTC),
        store=store or Store(),
        starts=Starts(cluster.profiles_in_use, lambda _key: None, time.monotonic),
    )


async def settle(reconciler: Reconciler, key: Key) -> float | None:
    """Pass after pass until the operator wants to wait; how long."""
    for _ in range(10):
        if (again := await reconciler.reconcile(key)) is None or again > 1:
            return again
    raise AssertionError("the operator does not come to rest")


def prepared(plane: ControlPlane) -> ControlPlane:
    """The API server with the namespace, once for all modules."""
    existing = plane.kubectl("get", "namespace", NAMESPACE, "--ignore-not-found", "--output=name")
    if not existing:
        plane.kubectl("create", "namespace", NAMESPACE)
        plane.kubectl("create", "serviceaccount", "default", f"--namespace={NAMESPACE}")
    return plane
