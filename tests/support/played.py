"""QLoRAJobs whose Jobs a test ends itself, as the Job controller and a kubelet would, and one operator's passes."""

import copy
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from devcluster.controlplane import ControlPlane
from qlora_api.contract import ResultRecord, encode_record
from qlora_api.status import AdapterStatus, DatasetStatus, MemoryStatus, StepName
from qlora_operator.cluster import Cluster, connect
from qlora_operator.decisions.observe import Object
from qlora_operator.metrics import Metrics
from qlora_operator.reconcile import Reconciler
from qlora_operator.starts import Starts
from qlora_operator.store import Store
from qlora_operator.workqueue import Key
from tests.support.builders import PROFILES

NAMESPACE = "team"
STEPS: tuple[StepName, ...] = ("prepare", "train", "publish")
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_CONTAINER = {"name": "trainer", "image": "", "imageID": "", "ready": False, "restartCount": 0}
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
        selector = f"labelSelector=qlora.dev%2Fjob%3D{name}"
        listed = await self.send("GET", f"{kind}/namespaces/{NAMESPACE}/{plural}?{selector}")
        return list(listed["items"])

    async def apply(self, name: str, **spec: Any) -> None:
        body = {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAJob",
            "metadata": {"name": name},
            "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}, **spec},
        }
        await self.create(f"/apis/qlora.dev/v1alpha1/namespaces/{NAMESPACE}/qlorajobs", body)

    async def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do as the Job controller and the kubelet do with a step that runs. Returns its pod."""
        template = copy.deepcopy(job["spec"]["template"])
        name = job["metadata"]["name"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
        metadata = template["metadata"] | {"name": name, "ownerReferences": [owner | {"controller": True}]}
        await self.create(_PODS, template | {"apiVersion": "v1", "kind": "Pod", "metadata": metadata})
        container = _CONTAINER | {"state": {"running": {"startedAt": ENDED}}}
        status = {"phase": "Running", "containerStatuses": [container]}
        return await self.send("PATCH", f"{_PODS}/{name}/status", {"status": status})

    async def end(self, job: dict[str, Any], uid: str, code: int = 0, *, runs: bool = False) -> None:
        """The step ends well, or badly for good. `runs`: its pod runs already."""
        name, step = job["metadata"]["name"], job["metadata"]["labels"]["qlora.dev/step"]
        pod = await (self.send("GET", f"{_PODS}/{name}") if runs else self.run(job))
        record = ResultRecord(
            job_uid=uid,
            pod_uid=pod["metadata"]["uid"],
            step=step,
            time=ENDED,
            outcome="failed" if code else "succeeded",
            exit_code=code,
            reason="BadDataset" if code else "Done",
            **({} if code else FOUND.get(step, {})),
        )
        terminated = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "message": encode_record(record),
            "startedAt": ENDED,
            "finishedAt": ENDED,
        }
        phase, kinds = (
            ("Failed", ("FailureTarget", "Failed")) if code else ("Succeeded", ("SuccessCriteriaMet", "Complete"))
        )
        status = {"phase": phase, "containerStatuses": [_CONTAINER | {"state": {"terminated": terminated}}]}
        await self.send("PATCH", f"{_PODS}/{name}/status", {"status": status})
        conditions = [
            {"type": kind, "status": "True", "reason": "Test", "lastTransitionTime": ENDED, "lastProbeTime": ENDED}
            for kind in kinds
        ]
        done: dict[str, Any] = {"startTime": ENDED, "conditions": conditions}
        done |= {"failed": 1} if code else {"succeeded": 1, "completionTime": ENDED}
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


def prepared(plane: ControlPlane) -> ControlPlane:
    """The API server with the namespace, once for all modules."""
    existing = plane.kubectl("get", "namespace", NAMESPACE, "--ignore-not-found", "--output=name")
    if not existing:
        plane.kubectl("create", "namespace", NAMESPACE)
        plane.kubectl("create", "serviceaccount", "default", f"--namespace={NAMESPACE}")
    return plane
