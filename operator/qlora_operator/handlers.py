"""Watches through kopf, the only importer of it: each event only puts the key of its job on the queue."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import kopf

from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL
from qlora_api.status import Phase
from qlora_api.v1alpha1 import GROUP, PLURAL, VERSION
from qlora_operator.listing import Kind
from qlora_operator.metrics import PHASES
from qlora_operator.resync import WatchMonitor
from qlora_operator.settings import Settings
from qlora_operator.store import Store
from qlora_operator.workqueue import Key

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Enqueue(Protocol):
    """Requests a job. `first`: before the jobs that have been started."""

    def __call__(self, key: Key, *, first: bool = False) -> None:
        """Request it."""


@dataclass(frozen=True)
class Hooks:
    """What the watches and the probe call."""

    enqueue: Enqueue
    monitor: WatchMonitor
    phase_of_job: Callable[[Key, Phase | None], None]
    problem: Callable[[], str | None]
    store: Store


async def watch(settings: Settings, hooks: Hooks) -> None:
    """Watch until a signal ends the process. Raises what kopf raises if it cannot watch."""
    registry = kopf.OperatorRegistry()
    _register_login(registry)
    _register_events(registry, hooks)
    _register_probe(registry, hooks)
    await kopf.operator(
        registry=registry,
        settings=_configure(),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
        liveness_endpoint=f"http://0.0.0.0:{settings.probe_port}/healthz",
    )


def _configure() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    # Kinds come from discovery alone: no right to list namespaces or CustomResourceDefinitions is needed.
    settings.scanning.disabled = True
    # The server ends a stream; the client does a little later, and on silence much sooner (bookmarks).
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 75
    settings.watching.chunk_size = 500
    # The server does not send other Jobs and pods.
    settings.watching.label_selectors["batch", "v1", "jobs"] = JOB_UID_LABEL
    settings.watching.label_selectors["v1", "pods"] = JOB_UID_LABEL
    # kopf keeps an object, and a task for it, until nothing has been shown of it for so long.
    settings.queueing.idle_timeout = 0.05
    # No handler here asks for differences or stores its progress: without this, every object is copied for them.
    settings.persistence.diffbase_storage = _NoDifferences()
    settings.persistence.progress_storage = _NoProgress()
    return settings


class _NoDifferences(kopf.DiffBaseStorage):
    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None: ...


class _NoProgress(kopf.ProgressStorage):
    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None: ...

    def purge(self, **_: Any) -> None: ...

    def touch(self, **_: Any) -> None: ...

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def _register_login(registry: kopf.OperatorRegistry) -> None:
    @kopf.on.login(registry=registry)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        token = _SERVICE_ACCOUNT / "token"
        if not token.exists() or "KUBECONFIG" in os.environ:
            return kopf.login_with_kubeconfig(**arguments)
        # By address, not by name: watching must not depend on the cluster's DNS.
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        return kopf.ConnectionInfo(
            server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
            ca_path=str(_SERVICE_ACCOUNT / "ca.crt"),
            scheme="Bearer",
            token=token.read_text().strip(),
        )


def _register_events(registry: kopf.OperatorRegistry, hooks: Hooks) -> None:
    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def job_changed(event: kopf.RawEvent, **_: Any) -> None:
        deleted, body = event["type"] == "DELETED", event["object"]
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        phase = body.get("status", {}).get("phase")
        hooks.phase_of_job(key, None if deleted or phase not in PHASES else phase)
        _show(hooks, "qlorajobs", event)
        if hooks.store.job_changed(body, deleted=deleted, created=event["type"] == "ADDED"):
            hooks.enqueue(key, first=not deleted and "startTime" not in body.get("status", {}))

    @kopf.on.event("batch", "v1", "jobs", labels={JOB_UID_LABEL: kopf.PRESENT}, registry=registry)
    async def child_changed(event: kopf.RawEvent, **_: Any) -> None:
        _child_changed("jobs", event)

    @kopf.on.event("v1", "pods", labels={JOB_UID_LABEL: kopf.PRESENT}, registry=registry)
    async def pod_changed(event: kopf.RawEvent, **_: Any) -> None:
        _child_changed("pods", event)

    def _child_changed(kind: Kind, event: kopf.RawEvent) -> None:
        metadata = event["object"]["metadata"]
        _show(hooks, kind, event)
        news = hooks.store.child_changed(kind, event["object"], deleted=event["type"] == "DELETED")
        if news and (name := metadata.get("labels", {}).get(JOB_LABEL)):
            hooks.enqueue((metadata["namespace"], name))


def _show(hooks: Hooks, kind: Kind, event: kopf.RawEvent) -> None:
    metadata = event["object"]["metadata"]
    identity = (kind, metadata["namespace"], metadata["name"])
    hooks.monitor.show(identity, metadata["resourceVersion"], deleted=event["type"] == "DELETED")


def _register_probe(registry: kopf.OperatorRegistry, hooks: Hooks) -> None:
    @kopf.on.probe(id="watching", registry=registry, errors=kopf.ErrorsMode.PERMANENT)
    async def watching(**_: Any) -> str:
        if problem := hooks.problem():
            raise kopf.PermanentError(problem)
        return "ok"
