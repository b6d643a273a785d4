"""Watches through kopf: each event is noted in the store, and requests its job."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import kopf

from qlora_api.naming import JOB_UID_LABEL
from qlora_api.profile import PROFILE_PLURAL
from qlora_api.spec.job import GROUP, PLURAL, VERSION
from qlora_api.sweep.spec import SWEEP_PLURAL
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.decisions.observed.parsing import is_managed_elsewhere
from qlora_operator.decisions.sweeps.sweep import sweep_of, sweep_of_child
from qlora_operator.keys import Key
from qlora_operator.kube.listing import ChildKind, Kind
from qlora_operator.settings import SECONDS_BETWEEN_PASSES, Settings
from qlora_operator.watch.embedding import EndlessPauses, NoDifferences, NoProgress, Task, keep_running
from qlora_operator.watch.profiles import ProfileStore
from qlora_operator.watch.resync import WatchMonitor
from qlora_operator.watch.store import Store

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Enqueue(Protocol):
    """Requests a job. `first`: before the jobs that have been started."""

    def __call__(self, key: Key, *, first: bool = False) -> None:
        """Request it."""


class Show(Protocol):
    """Shows a job to the metrics, as it is stored, or was when it was deleted."""

    def __call__(self, body: Object, *, deleted: bool = False) -> None:
        """Show it."""


@dataclass(frozen=True)
class Hooks:
    """The callbacks of the watches.

    `take_signals` is needed as kopf takes the process's signals whenever it starts.
    """

    enqueue: Enqueue
    monitor: WatchMonitor
    show: Show
    take_signals: Callable[[], None]
    store: Store
    enqueue_sweep: Callable[[Key, float], None] = lambda _key, _after: None
    """Requests a sweep, so many seconds from now."""
    note: Callable[[str, str | None], None] = lambda _resource, _type: None
    """Notes an event of a watch: its resource and type, None for a listed object."""
    profiles: ProfileStore = field(default_factory=ProfileStore)


async def watch(settings: Settings, hooks: Hooks) -> None:
    """Watch until canceled. Raises NotStoppedError."""
    await keep_running(
        lambda: _start_kopf(settings, hooks), hooks.monitor, hooks.take_signals, _SERVICE_ACCOUNT / "ca.crt"
    )


async def _start_kopf(settings: Settings, hooks: Hooks) -> Collection[Task]:
    registry = kopf.OperatorRegistry()
    _register_login(registry)
    _register_events(registry, hooks)
    return await kopf.spawn_tasks(
        registry=registry,
        settings=_configure(settings.watch_silence_seconds),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
    )


def _configure(silence_seconds: float) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    # Kinds come from discovery alone: no right to list namespaces or CustomResourceDefinitions is needed.
    settings.scanning.disabled = True
    # One object after the other, from the API server's cache: a page of them could be of any length, and the token of
    # the next one expires after five minutes. If the stream breaks on the way, lists find the objects that it lacks.
    settings.watching.initial_streaming = True
    # The server ends a stream; the client does a little later, and on silence much sooner (bookmarks).
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = silence_seconds
    # The API server's absence and lost rights end nothing: requests are tried until they succeed.
    settings.networking.error_backoffs = EndlessPauses()
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.queueing.exit_timeout = 0.5
    # The process decides itself how long it may take to stop.
    settings.process.ultimate_exiting_timeout = None
    # The server does not send other Jobs and pods.
    settings.watching.label_selectors["batch", "v1", "jobs"] = JOB_UID_LABEL
    settings.watching.label_selectors["v1", "pods"] = JOB_UID_LABEL
    # kopf keeps an object, and a task for it, until nothing has been shown of it for so long.
    settings.queueing.idle_timeout = 0.001
    # Without this, every object is copied for differences and progress.
    settings.persistence.diffbase_storage = NoDifferences()
    settings.persistence.progress_storage = NoProgress()
    return settings


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
        if not is_managed_elsewhere(body):
            hooks.show(body, deleted=deleted)
        _show(hooks, "qlorajobs", event)
        if sweep := sweep_of(body):
            hooks.enqueue_sweep((key[0], sweep), SECONDS_BETWEEN_PASSES)
        if hooks.store.job_changed(body, deleted=deleted, created=event["type"] == "ADDED"):
            hooks.enqueue(key, first=not deleted and "startTime" not in body.get("status", {}))

    _register_sweeps_and_profiles(registry, hooks)

    @kopf.on.event("batch", "v1", "jobs", labels={JOB_UID_LABEL: kopf.PRESENT}, registry=registry)
    async def child_changed(event: kopf.RawEvent, **_: Any) -> None:
        _child_changed("jobs", event)

    @kopf.on.event("v1", "pods", labels={JOB_UID_LABEL: kopf.PRESENT}, registry=registry)
    async def pod_changed(event: kopf.RawEvent, **_: Any) -> None:
        _child_changed("pods", event)

    def _child_changed(kind: ChildKind, event: kopf.RawEvent) -> None:
        _show(hooks, kind, event)
        if sweep := sweep_of_child(event["object"]):
            hooks.enqueue_sweep(sweep, SECONDS_BETWEEN_PASSES)
            return
        for key in hooks.store.child_changed(kind, event["object"], deleted=event["type"] == "DELETED"):
            hooks.enqueue(key)


def _register_sweeps_and_profiles(registry: kopf.OperatorRegistry, hooks: Hooks) -> None:
    @kopf.on.event(GROUP, VERSION, SWEEP_PLURAL, registry=registry)
    async def sweep_changed(event: kopf.RawEvent, **_: Any) -> None:
        body, metadata = event["object"], event["object"]["metadata"]
        hooks.note(SWEEP_PLURAL, event["type"])
        hooks.enqueue_sweep((metadata["namespace"], metadata["name"]), 0.0)
        if event["type"] == "DELETED":
            hooks.store.jobs.drop_sweep(metadata["uid"])
        for cell in hooks.store.sweeps.note(body, deleted=event["type"] == "DELETED"):
            hooks.enqueue((metadata["namespace"], cell))

    @kopf.on.event(GROUP, VERSION, PROFILE_PLURAL, registry=registry)
    async def profile_changed(event: kopf.RawEvent, **_: Any) -> None:
        hooks.note(PROFILE_PLURAL, event["type"])
        hooks.profiles.changed(event["object"], deleted=event["type"] == "DELETED")


def _show(hooks: Hooks, kind: Kind, event: kopf.RawEvent) -> None:
    hooks.note(kind, event["type"])
    metadata = event["object"]["metadata"]
    identity = (kind, metadata["namespace"], metadata["name"], metadata["uid"])
    hooks.monitor.show(identity, metadata["resourceVersion"], deleted=event["type"] == "DELETED")
