"""One run: many jobs created at once on a control plane of its own, until each has its first Job and its status."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal

import yaml

from benchmarks.memory import peak_resident_bytes, resident_bytes
from benchmarks.operator.objects import NAMESPACE, operator_settings, qlora_job
from benchmarks.operator.watching import watch
from devcluster import processes
from devcluster.addresses import free_port
from devcluster.controlplane import ControlPlane, running
from qlora_operator.cluster import Cluster, connect

ROOT = Path(__file__).parents[2]
Subject = Literal["operator", "floor"]
_CREATED_AT_A_TIME = 32
_START_SECONDS = 60
_MOST_SECONDS = 300
_MIB = 2**20
_PROTOBUF = "application/vnd.kubernetes.protobuf"
_TICKS = os.sysconf("SC_CLK_TCK")
# The agent of the operator's own requests, and that of kopf's watches.
_AGENTS = ("qlora-operator", "kopf")


@dataclass
class Seen:
    """When what was shown about each job, by its name, in seconds of the monotonic clock."""

    subject: subprocess.Popen[bytes]
    created: dict[str, float] = field(default_factory=dict)
    """The answer of the job's own creation."""
    first_job: dict[str, float] = field(default_factory=dict)
    status: dict[str, float] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, found: dict[str, float], count: int, what: str) -> None:
        """Wait until so many jobs have it. Raises TimeoutError, or ChildProcessError if the subject has ended."""
        deadline = time.monotonic() + _MOST_SECONDS
        while len(found) < count:
            self.changed.clear()
            if self.subject.poll() is not None:
                raise ChildProcessError(f"{len(found)} of {count} jobs have {what}, and what serves them has ended")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self.changed.wait()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(found)} of {count} jobs have {what} after {_MOST_SECONDS} s")


@dataclass(frozen=True)
class Usage:
    """Processor seconds of one process, or of several."""

    seconds: float

    @classmethod
    def of(cls, *pids: int) -> "Usage":
        """What they have used so far."""
        return cls(sum(_processor_seconds(pid) for pid in pids))


def measure(subject: Subject, jobs: int, workers: int | None = None) -> dict[str, Any]:
    """The figures of one run."""
    with running(controller_manager=True) as plane:
        plane.kubectl.apply((ROOT / "crds" / "qlorajobs.qlora.dev.yaml").read_text())
        plane.kubectl("create", "namespace", NAMESPACE)
        plane.kubectl("wait", "--for=condition=Established", "crd/qlorajobs.qlora.dev")
        with started(subject, plane, workers) as process:
            return asyncio.run(_measure(subject, jobs, plane, process))


@contextmanager
def started(subject: Subject, plane: ControlPlane, workers: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """The operator, or the floor's script, as a process of its own."""
    with tempfile.TemporaryDirectory(prefix="qlora-operator-") as folder, (Path(folder) / "log").open("w") as log:
        command = [sys.executable, "-m", "benchmarks.operator.floor", str(plane.kubeconfig)]
        if subject == "operator":
            settings = Path(folder) / "settings.yaml"
            settings.write_text(yaml.safe_dump(operator_settings(free_port(), free_port(), workers)))
            command = [sys.executable, "-m", "qlora_operator", "--settings", str(settings)]
        environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


async def _until_there_is_a_pod(cluster: Cluster) -> None:
    """Wait until the Job controller works: without its pods less is stored, watched and kept in memory."""
    async with asyncio.timeout(_MOST_SECONDS):
        while not (await cluster._json("GET", f"/api/v1/namespaces/{NAMESPACE}/pods"))["items"]:  # noqa: ASYNC110
            await asyncio.sleep(0.5)


async def _measure(
    subject: Subject, jobs: int, plane: ControlPlane, process: subprocess.Popen[bytes]
) -> dict[str, Any]:
    seen, pid = Seen(process), process.pid
    api_server = next(
        record.pid for record in processes.records(plane.directory / "processes") if record.name == "kube-apiserver"
    )
    async with _observed(plane, seen), connect(plane.kubeconfig) as cluster:

        async def create(number: int) -> float:
            body = qlora_job(number)
            await cluster._json("POST", f"/apis/qlora.dev/v1alpha1/namespaces/{NAMESPACE}/qlorajobs", body=body)
            return seen.created.setdefault(body["metadata"]["name"], time.monotonic())

        # The first job waits for the subject to start; it is none of those that count.
        await create(0)
        await seen.until(seen.first_job, 1, "a first Job")
        await _until_there_is_a_pod(cluster)
        if subject == "operator":
            await seen.until(seen.status, 1, "a status")
        audit_from = plane.audit_log.stat().st_size
        load, idle_bytes = os.getloadavg(), resident_bytes(pid)
        before = Usage.of(pid), Usage.of(api_server)
        began = time.monotonic()
        numbers = iter(range(1, jobs + 1))

        async def create_all() -> None:
            for number in numbers:
                await create(number)

        await asyncio.gather(*(create_all() for _ in range(_CREATED_AT_A_TIME)))
        await seen.until(seen.first_job, jobs + 1, "a first Job")
        started = Usage.of(pid), Usage.of(api_server)
        if subject == "operator":
            await seen.until(seen.status, jobs + 1, "a status")
        await asyncio.sleep(2)
        settled = Usage.of(pid), Usage.of(api_server)
        del seen.created["job-0"], seen.first_job["job-0"]
        calls = _calls(plane.audit_log, audit_from)
        sizes = await _stored_bytes(cluster, "job-1", operated=subject == "operator")
    figures = {
        "jobs": jobs,
        "loadAverage": [round(value, 2) for value in load],
        "firstJobsPerSecond": round(jobs / (max(seen.first_job.values()) - began), 1),
        "secondsToAllFirstJobs": round(max(seen.first_job.values()) - began, 2),
        "secondsToFirstJob": _spread([seen.first_job[name] - created for name, created in seen.created.items()]),
        "processorMillisecondsPerJob": {
            who: {
                "untilAllFirstJobs": round(1000 * (first.seconds - start.seconds) / jobs, 1),
                "untilQuiet": round(1000 * (last.seconds - start.seconds) / jobs, 1),
            }
            for who, start, first, last in zip((subject, "apiServer"), before, started, settled, strict=True)
        },
        "residentMiB": {
            "idle": round(idle_bytes / _MIB, 1),
            "atTheEnd": round(resident_bytes(pid) / _MIB, 1),
            "peak": round(peak_resident_bytes(pid) / _MIB, 1),
        },
        "callsPerJob": {call: round(count / jobs, 3) for call, count in sorted(calls.items())},
        "allCallsPerJob": round(sum(calls.values()) / jobs, 2),
        "storedBytes": sizes,
    }
    if subject == "operator":
        lags = [seen.status[name] - seen.first_job[name] for name in seen.created]
        figures["secondsFromFirstJobToStatus"] = _spread(lags)
        figures["secondsToAllStatuses"] = round(max(seen.status.values()) - began, 2)
    return figures


@asynccontextmanager
async def _observed(plane: ControlPlane, seen: Seen) -> AsyncIterator[None]:
    """Note what the watches of an outsider show, during the block."""

    async def see_first_jobs() -> None:
        async for event in watch(plane.kubeconfig, "jobs"):
            if name := event.body["metadata"].get("labels", {}).get("qlora.dev/job"):
                seen.first_job.setdefault(name, event.seconds)
                seen.changed.set()

    async def see_statuses() -> None:
        async for event in watch(plane.kubeconfig, "qlorajobs"):
            if any(entry.get("subresource") == "status" for entry in event.body["metadata"]["managedFields"]):
                seen.status.setdefault(event.body["metadata"]["name"], event.seconds)
                seen.changed.set()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(see_first_jobs()), group.create_task(see_statuses())]
        yield
        for task in tasks:
            task.cancel()


def _calls(audit_log: Path, since: int) -> Counter[str]:
    """The subject's requests by verb and resource, watches apart, as the API server's audit log has them."""
    calls: Counter[str] = Counter()
    with audit_log.open() as log:
        log.seek(since)
        for line in log:
            entry = json.loads(line)
            if not entry.get("userAgent", "").startswith(_AGENTS) or entry["verb"] == "watch":
                continue
            reference = entry.get("objectRef", {})
            # The jobs themselves are created by this benchmark, with the same client.
            if (entry["verb"], reference.get("resource")) == ("create", "qlorajobs"):
                continue
            subresource = f"/{reference['subresource']}" if "subresource" in reference else ""
            calls[f"{entry['verb']} {reference.get('resource', entry['requestURI'])}{subresource}"] += 1
    return calls


async def _stored_bytes(cluster: Cluster, name: str, *, operated: bool) -> dict[str, int]:
    """Size of each object of one job as etcd holds it: JSON for the QLoRAJob, protobuf for what Kubernetes defines."""
    job = await cluster._request("GET", f"/apis/qlora.dev/v1alpha1/namespaces/{NAMESPACE}/qlorajobs/{name}")
    sizes = {"QLoRAJob": len(job)}
    selector = [("labelSelector", f"qlora.dev/job={name}")]
    paths = {"Job": "/apis/batch/v1", "Pod": "/api/v1", "PersistentVolumeClaim": "/api/v1"}
    for kind, path in paths.items():
        plural = f"{path}/namespaces/{NAMESPACE}/{kind.lower()}s"
        sizes[kind] = len(await cluster._request("GET", plural, query=selector, accept=_PROTOBUF))
    if operated:
        selector = [("fieldSelector", f"involvedObject.uid={json.loads(job)['metadata']['uid']}")]
        events = f"/api/v1/namespaces/{NAMESPACE}/events"
        sizes["Event"] = len(await cluster._request("GET", events, query=selector, accept=_PROTOBUF))
    return sizes


def _spread(values: list[float]) -> dict[str, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "max": round(max(values), 2)}


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
