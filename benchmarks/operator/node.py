"""Simulates a node: binds pods, reports their starts and ends, and answers requests for their logs as a kubelet does.

Nothing runs in the pods. The duration of each step is an option; reports are records as the real trainer writes them.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from aiohttp import web

from benchmarks.operator import site
from benchmarks.operator.client import Client, Object, connect, watch
from benchmarks.operator.objects import COPIED_LABEL, CORE
from devcluster.addresses import LOOPBACK, free_port
from devcluster.controlplane import ControlPlane
from qlora_api.artifact_status import AdapterStatus
from qlora_api.contract import (
    MIN_SECONDS_BETWEEN_PROGRESS,
    TRAINER_CONTAINER,
    ProgressRecord,
    ResultRecord,
    encode_record,
)
from qlora_api.naming import JOB_UID_LABEL, STEP_LABEL
from qlora_api.status import DatasetStatus, MemoryStatus, StepName

NAME = "played"
ENDLESS = float("inf")
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_RENEW_SECONDS = 10.0
_AT_A_TIME = 16


@dataclass(frozen=True)
class _Pod:
    namespace: str
    name: str
    uid: str
    job_uid: str
    step: StepName
    started: datetime

    @property
    def path(self) -> str:
        return f"{CORE}/namespaces/{self.namespace}/pods/{self.name}"


class Node:
    """One node without an end to its capacity."""

    def __init__(self, client: Client, seconds: Mapping[StepName, float]) -> None:
        self._client = client
        self._seconds = dict(seconds)
        self._known: set[str] = set()
        self._running: dict[tuple[str, str], _Pod] = {}
        self._gate = asyncio.Semaphore(_AT_A_TIME)
        self._stopped: datetime | None = None

    def stop_reporting(self) -> None:
        """Stop the growth of logs."""
        self._stopped = datetime.now(UTC)

    def report_again(self) -> None:
        """Let logs grow again."""
        self._stopped = None

    def set_seconds(self, step: StepName, seconds: float) -> None:
        """Set the duration of the step's pods that start from now on."""
        self._seconds[step] = seconds

    async def register(self, port: int) -> None:
        """Register the node, with the port for logs."""
        await self._client.create(f"{CORE}/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME}})
        status = {
            "addresses": [{"type": "InternalIP", "address": LOOPBACK}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            "conditions": [{"type": "Ready", "status": "True", "reason": "Played", "message": ""}],
        }
        await self._client.merge(f"{CORE}/nodes/{NAME}/status", {"status": status})
        await self._client.create(_LEASES, self._lease() | {"metadata": {"name": NAME}})

    async def stay_alive(self) -> None:
        """Renew the node's Lease: pods of a node that does not are evicted."""
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            await self._client.merge(f"{_LEASES}/{NAME}", self._lease())

    async def play(self, plane: ControlPlane) -> None:
        """Simulate every pod of a job, from its creation to its end."""
        async with asyncio.TaskGroup() as group:
            async for event in watch(plane.kubeconfig, "pods"):
                metadata = event.body["metadata"]
                if event.kind == "DELETED":
                    self._running.pop((metadata["namespace"], metadata["name"]), None)
                # The watch restarts from time to time, and shows everything once more.
                elif _is_of_a_job(metadata) and metadata["uid"] not in self._known:
                    self._known.add(metadata["uid"])
                    group.create_task(self._play(metadata))

    async def read_log(self, request: web.Request) -> web.Response:
        """The kubelet's answer to a request for a container's log."""
        pod = self._running.get((request.match_info["namespace"], request.match_info["pod"]))
        if pod is None:
            return web.Response(status=404)
        now = self._stopped or datetime.now(UTC)
        return web.Response(text=_train_log(pod.job_uid, pod.uid, pod.step, pod.started, now))

    async def _play(self, metadata: Object) -> None:
        labels = metadata["labels"]
        step = cast("StepName", labels[STEP_LABEL])
        now = datetime.now(UTC)
        pod = _Pod(metadata["namespace"], metadata["name"], metadata["uid"], labels[JOB_UID_LABEL], step, now)
        async with self._gate:
            target = {"apiVersion": "v1", "kind": "Node", "name": NAME}
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod.name}, "target": target}
            await self._client.create(f"{pod.path}/binding", binding)
            seconds = self._seconds.get(step, 0.0)
            # A kubelet polls once a second: a pod that ends immediately is not reported as running.
            if seconds > 0:
                self._running[pod.namespace, pod.name] = pod
                await self._report(pod, "Running", {"running": {"startedAt": _timestamp(pod.started)}})
        if seconds == ENDLESS:
            return
        await asyncio.sleep(seconds)
        async with self._gate:
            ended = datetime.now(UTC)
            terminated = {
                "exitCode": 0,
                "reason": "Completed",
                "message": _result(pod.job_uid, pod.uid, step, ended),
                "startedAt": _timestamp(pod.started),
                "finishedAt": _timestamp(ended),
            }
            await self._report(pod, "Succeeded", {"terminated": terminated})
        self._running.pop((pod.namespace, pod.name), None)

    async def _report(self, pod: _Pod, phase: str, state: Object) -> None:
        ready = "True" if phase == "Running" else "False"
        container = {
            "name": TRAINER_CONTAINER,
            "image": "registry.example.org/qlora-trainer:1.0.0",
            "imageID": f"registry.example.org/qlora-trainer@sha256:{'a' * 64}",
            "containerID": f"containerd://{'b' * 64}",
            "ready": phase == "Running",
            "started": phase == "Running",
            "restartCount": 0,
            "state": state,
        }
        conditions = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady")
        status: dict[str, Any] = {
            "phase": phase,
            "startTime": _timestamp(pod.started),
            "hostIP": LOOPBACK,
            "conditions": [{"type": name, "status": ready} for name in conditions],
            "containerStatuses": [container],
        }
        await self._client.merge(f"{pod.path}/status", {"status": status})

    def _lease(self) -> Object:
        renewed = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": NAME, "leaseDurationSeconds": 40, "renewTime": renewed}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec}


def _is_of_a_job(metadata: Object) -> bool:
    labels = metadata.get("labels", {})
    return STEP_LABEL in labels and COPIED_LABEL not in labels


@asynccontextmanager
async def playing(plane: ControlPlane, seconds: Mapping[StepName, float]) -> AsyncIterator[Node]:
    """Simulate all pods of a node in the block, `seconds` per step (default: 0)."""
    port = free_port()
    async with connect(plane.kubeconfig) as client:
        node = Node(client, seconds)
        await node.register(port)
        application = web.Application()
        application.router.add_get("/containerLogs/{namespace}/{pod}/{container}", node.read_log)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # The API server's certificate, which is for this address, serves the kubelet's port as well.
        certificates = plane.directory / "certificates"
        tls.load_cert_chain(certificates / "kube-apiserver.crt", certificates / "kube-apiserver.key")
        await web.TCPSite(runner, LOOPBACK, port, ssl_context=tls).start()
        try:
            async with site.background(node.play(plane), node.stay_alive()):
                yield node
        finally:
            await runner.cleanup()


_TOTAL_STEPS = 10_000
_TAIL_RECORDS = 3


def _result(job_uid: str, pod_uid: str, step: StepName, now: datetime) -> str:
    """The termination message of a step that has succeeded."""
    record = ResultRecord(
        job_uid=job_uid,
        pod_uid=pod_uid,
        step=step,
        time=_timestamp(now),
        outcome="succeeded",
        exit_code=0,
        reason="Done",
    )
    if step == "prepare":
        memory = MemoryStatus(estimate_bytes=10 * 2**30, low_bytes=9 * 2**30, high_bytes=11 * 2**30, verdict="unknown")
        dataset = DatasetStatus(format="chat", rows=12_000, used_rows=11_900)
        record = record.model_copy(update={"model_revision": "c0ffee", "memory": memory, "dataset": dataset})
    elif step == "train":
        figures = {"training_step": _TOTAL_STEPS, "total_steps": _TOTAL_STEPS, "loss": 1.25, "eval_loss": 1.5}
        record = record.model_copy(update=figures)
    elif step == "publish":
        adapter = AdapterStatus(
            uri="pvc://claim/adapter",
            sha256="a" * 64,
            size_bytes=150_000_000,
            base_model="hf://org/model",
            base_revision="c0ffee",
            rank=64,
            quantization="nf4",
        )
        record = record.model_copy(update={"adapter": adapter})
    return encode_record(record)


def _train_log(job_uid: str, pod_uid: str, step: StepName, started: datetime, now: datetime) -> str:
    """Return the end of a running step's log: for train, a record every five seconds."""
    if step != "train":
        return ""
    last = int((now - started).total_seconds() / MIN_SECONDS_BETWEEN_PROGRESS)
    lines = []
    for number in range(max(1, last - _TAIL_RECORDS + 1), last + 1):
        seconds = number * MIN_SECONDS_BETWEEN_PROGRESS
        record = ProgressRecord(
            job_uid=job_uid,
            pod_uid=pod_uid,
            step=step,
            time=_timestamp(datetime.fromtimestamp(started.timestamp() + seconds, UTC)),
            training_step=min(number, _TOTAL_STEPS),
            total_steps=_TOTAL_STEPS,
            epoch=2 * number / _TOTAL_STEPS,
            loss=3.0 - number / _TOTAL_STEPS,
            learning_rate=2e-4,
            grad_norm=0.5,
            tokens_per_second=1800.0 + number % 7,
            remaining_seconds=(_TOTAL_STEPS - number) * MIN_SECONDS_BETWEEN_PROGRESS,
            peak_memory_bytes=12 * 2**30,
        )
        lines.append(encode_record(record))
    return "".join(f"{line}\n" for line in lines)


def _timestamp(moment: datetime) -> str:
    """RFC 3339, in whole seconds, as Kubernetes writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
