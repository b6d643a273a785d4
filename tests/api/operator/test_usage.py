"""GPU seconds and the budget on a real API server, with patched pods and restarts."""

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from devcluster.controlplane import ControlPlane
from qlora_api.contract import ResultRecord, encode_record
from qlora_operator.decisions.observed.objects import format_time, parse_time
from qlora_operator.reconcile.job import Reconciler
from tests.support.cluster.played import NAMESPACE, Api, connected, operator, prepared, settle

_HOURS = timedelta(hours=2)


@pytest.fixture(scope="module")
def namespace(plane: ControlPlane) -> ControlPlane:
    return prepared(plane)


def new_operator(api: Api) -> Reconciler:
    """An operator that has just started, with only the stored state."""
    return operator(api._cluster)


async def train_job(api: Api, name: str, attempt: int = 1) -> dict[str, Any]:
    jobs = await api.children(name)
    return next(job for job in jobs if job["metadata"]["name"] == f"{name}-train-{attempt}")


async def begin_training(api: Api, name: str, **spec: Any) -> tuple[str, dict[str, Any]]:
    """The job's UID, and its train Job, whose pod does not exist yet."""
    await api.apply(name, **spec)
    uid = (await api.job(name))["metadata"]["uid"]
    await settle(new_operator(api), (NAMESPACE, name))
    (job,) = await api.children(name)
    await api.end(job, uid)
    await settle(new_operator(api), (NAMESPACE, name))
    return uid, await train_job(api, name)


async def patch_pod(api: Api, name: str, phase: str, state: dict[str, Any], since: datetime) -> None:
    """The pod's status as a kubelet would report it; it got its node at `since`."""
    container = {"name": "trainer", "image": "", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    known = {"type": "PodScheduled", "status": "True", "lastTransitionTime": format_time(since)}
    status = {"phase": phase, "conditions": [known], "containerStatuses": [container]}
    await api.send("PATCH", f"/api/v1/namespaces/{NAMESPACE}/pods/{name}/status", {"status": status})


async def stop(api: Api, uid: str, pod: str, since: datetime, until: datetime) -> None:
    """The trainer saves a checkpoint and ends, as it was asked to."""
    found = await api.send("GET", f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}")
    record = ResultRecord(
        job_uid=uid,
        pod_uid=found["metadata"]["uid"],
        step="train",
        time=format_time(until),
        outcome="interrupted",
        exit_code=143,
        reason="Interrupted",
        training_step=7,
        training_since=format_time(since + timedelta(seconds=60)),
    )
    ended = {
        "exitCode": 143,
        "message": encode_record(record),
        "startedAt": format_time(since),
        "finishedAt": format_time(until),
    }
    await patch_pod(api, pod, "Failed", {"terminated": ended}, since)


def test_a_budget_ends_a_job_at_a_checkpoint_and_a_larger_one_continues_it(namespace: ControlPlane) -> None:
    async def scenario() -> None:
        async with connected(namespace) as api:
            name, key = "spent", (NAMESPACE, "spent")
            uid, job = await begin_training(api, name, budget={"gpuHours": 1.5}, resources={"gpus": 2})
            await api.run(job)
            now = datetime.now(UTC)
            since = now - _HOURS
            await patch_pod(
                api, job["metadata"]["name"], "Running", {"running": {"startedAt": format_time(now)}}, since
            )
            await settle(new_operator(api), key)

            status = (await api.job(name))["status"]
            assert (status["phase"], status["lastFailure"]["reason"]) == ("Failed", "BudgetExceeded")
            assert float(status["usage"]["gpuHours"]) == pytest.approx(2 * _HOURS / timedelta(hours=1), rel=0.2)
            # Its Job is deleted, and the pod has its GPUs until it has saved.
            assert [each["metadata"]["name"] for each in await api.children(name)] == [f"{name}-prepare-1"]
            until = parse_time(format_time(since)) + timedelta(seconds=8000)
            await stop(api, uid, job["metadata"]["name"], since, until)
            for _ in range(2):
                await settle(new_operator(api), key)
            usage = (await api.job(name))["status"]["usage"]
            assert usage["gpuHours"] == "4.4444"
            lost = {"startup": "0.0333", "disruption": "0.00", "failure": "0.00", "suspension": "0.00"}
            assert usage["lostGpuHours"] == lost

            await _change(api, name, {"budget": {"gpuHours": 9}, "retry": {"request": "a"}})
            await settle(new_operator(api), key)
            status = (await api.job(name))["status"]
            assert (status["step"]["name"], status["step"]["attempt"]) == ("train", 2)
            assert status["usage"]["gpuHours"] == "4.4444"
            again = await train_job(api, name, 2)
            await api.end(again, uid)
            await settle(new_operator(api), key)
            status = (await api.job(name))["status"]
            assert (status["phase"], status["step"]["name"]) == ("Publishing", "publish")
            assert len(status["usage"]["pods"]) == 2

    asyncio.run(scenario())


async def _change(api: Api, name: str, spec: dict[str, Any]) -> None:
    await api.send("PATCH", f"/apis/qlora.dev/v1beta1/namespaces/{NAMESPACE}/qlorajobs/{name}", {"spec": spec})


def test_kubectl_shows_the_gpu_hours(namespace: ControlPlane) -> None:
    async def scenario() -> None:
        async with connected(namespace) as api:
            _, job = await begin_training(api, "shown")
            await api.run(job)
            now = datetime.now(UTC)
            running = {"running": {"startedAt": format_time(now)}}
            await patch_pod(api, job["metadata"]["name"], "Running", running, now - timedelta(hours=1))
            await settle(new_operator(api), (NAMESPACE, "shown"))

    asyncio.run(scenario())
    shown = namespace.kubectl("get", "qlorajob", "shown", f"--namespace={NAMESPACE}", "--output=wide")
    head, row = (line.split() for line in shown.splitlines())
    assert "GPU-HOURS" in head
    assert any(re.fullmatch(r"1\.\d{2,4}", word) for word in row)
    assert "BudgetExceeded" in namespace.kubectl("explain", "qlorajob.spec.budget.gpuHours")
    assert "is in no checkpoint" in namespace.kubectl("explain", "qlorajob.status.usage.lostGpuHours")
