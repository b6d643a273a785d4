"""A tenant's text in a job leads the operator to no file, host, program or namespace."""

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import kopf
import pytest

from qlora_operator.kube.client import Cluster
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.settings import Settings
from qlora_operator.watch.handlers import Hooks, watch
from qlora_operator.watch.resync import Resync, WatchMonitor
from qlora_operator.watch.store import Store
from tests.support.builders import NAME, NOW, PROFILE, job_body, starts
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import ApiServer

CANARY = "canary"
_recorded: list[tuple[str, tuple[Any, ...]]] | None = None


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    """Note the interpreter's files, hosts and programs. The hook stays for good."""
    if _recorded is not None and event.partition(".")[0] in ("open", "os", "socket", "subprocess", "urllib", "shutil"):
        _recorded.append((event, arguments))


sys.addaudithook(_record)


@pytest.fixture
def recorded() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The files, hosts and programs used from now on."""
    global _recorded
    _recorded = []
    yield _recorded
    _recorded = None


class Recording(ApiServer):
    """An API server that keeps the requests. `body`: its only QLoRAJob."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(Agenda(0))
        self.put("qlorajobs", body)
        self.paths: list[str] = []

    async def send(self, method: str, path: str, **request: Any) -> tuple[int, bytes]:
        self.paths.append(path)
        return await super().send(method, path, **request)


HOSTILE = [
    {
        "model": {"source": "s3://canary-bucket/model", "secretRef": {"name": "canary-secret"}},
        "dataset": {"source": "s3://canary-bucket/rows.jsonl", "secretRef": {"name": "canary-secret"}},
        "output": {"destination": "s3://canary-bucket/adapter", "secretRef": {"name": "canary-secret"}},
    },
    {
        "model": {"source": "hf://canary/model", "tokenSecretRef": {"name": "canary-token"}},
        "dataset": {"source": "configMap://canary/train.jsonl"},
        "output": {"destination": "oci://canary.example.org/team/tiny:v1", "secretRef": {"name": "canary-secret"}},
    },
    {
        "model": {"source": "pvc://canary/etc"},
        "dataset": {"source": "pvc://canary/etc/passwd"},
        "workspace": {"claimName": "canary"},
        "scheduling": {"nodeSelector": {"canary": "canary"}, "priorityClassName": "canary"},
    },
]


def reconciled(body: dict[str, Any]) -> Recording:
    """The cluster after the operator's last possible pass over the job."""
    api = Recording(body)
    profiles = {"default": PROFILE.model_copy(update={"allow_job_scheduling": True})}
    reconciler = Reconciler(Cluster(api), profiles, None, Metrics(), lambda: NOW + timedelta(seconds=1), starts())
    for _ in range(5):
        asyncio.run(reconciler.reconcile(("team", NAME)))
    return api


@pytest.mark.parametrize("spec", HOSTILE, ids=["s3", "hf, oci and configMap", "pvc"])
def test_no_address_or_name_of_a_job_is_opened_requested_or_started(spec: dict[str, Any], recorded: list[Any]) -> None:
    api = reconciled(job_body(**spec))
    assert api.all("jobs"), "the operator has not come as far as a pod"
    assert CANARY in json.dumps(api.all("jobs")), "the job's pods are to use what it names"
    assert [event for event in recorded if CANARY in repr(event)] == []
    assert [path for path in api.paths if CANARY in path] == []
    own = re.compile(r"/(apis/qlora\.dev/v1beta1|apis/(apps|batch)/v1|api/v1)/namespaces/team/[a-z]+(/.*)?")
    assert [path for path in api.paths if not own.fullmatch(path)] == []


def test_an_operator_of_some_namespaces_lists_these_only() -> None:
    api = Recording(job_body())
    cluster, namespaces = Cluster(api), ("team-a", "team-b")
    resync = Resync(cluster, namespaces, lambda *_, **__: None, store=Store(), interval=300, monotonic=time.monotonic)
    for listing in (resync._list_all(), resync.once(), resync._beat()):
        asyncio.run(listing)
    found = {path.partition("/namespaces/")[2] for path in api.paths}
    assert found == {f"team-{name}/{kind}" for name in "ab" for kind in ("qlorajobs", "jobs", "pods")}


@pytest.mark.parametrize("namespaces", [("team-a", "team-b"), ()])
def test_it_watches_those_namespaces_only_and_the_cluster_only_without_any(
    namespaces: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    async def spawn_tasks(**arguments: Any) -> None:
        given.update(arguments)
        raise asyncio.CancelledError

    monkeypatch.setattr(kopf, "spawn_tasks", spawn_tasks)
    hooks = Hooks(
        lambda key, first=False: None,
        WatchMonitor(150),
        lambda body, *, deleted=False: None,
        lambda: None,
        Store(),
    )
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(watch(Settings(namespaces=namespaces), hooks))
    assert (given["clusterwide"], tuple(given["namespaces"])) == (not namespaces, namespaces)
