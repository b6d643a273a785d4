"""Watches through kopf: each event only puts the key of its job on the queue.

No other module imports kopf.
"""

import asyncio
import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import kopf
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory

from qlora_api.naming import JOB_UID_LABEL
from qlora_api.spec.job import GROUP, PLURAL, VERSION
from qlora_api.sweep.spec import SWEEP_PLURAL
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.decisions.sweeps.sweep import sweep_of, sweep_of_child
from qlora_operator.keys import Key
from qlora_operator.kube.listing import ChildKind, Kind
from qlora_operator.settings import SECONDS_BETWEEN_PASSES, Settings
from qlora_operator.watch.resync import WatchMonitor
from qlora_operator.watch.store import Store
from qlora_operator.watch.tasks import Task, end_all, task_scope

logger = logging.getLogger(__name__)

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

# Seconds between requests that fail. kopf's own list of them has an end, and kopf ends with it.
_GROWING = (1, 1, 2, 3, 5, 8)
_LONGEST_PAUSE = 10
# A watch that has worked for so long has not failed immediately.
_STEADY_SECONDS = 60.0
_LOOK_SECONDS = 5.0
_STOP_SECONDS = 3.0


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
    objects_per_page: Callable[[], int]
    """The number of objects that kopf may list at a time: it does not check their size."""
    enqueue_sweep: Callable[[Key, float], None] = lambda _key, _after: None
    """Requests a sweep, so many seconds from now."""


# A list has to end before its token expires, after five minutes. The largest pods, two at a time, take 140 MiB, and
# Jobs at the same time as much.
_FEWEST_OBJECTS = 2


class _Pauses(Iterable[float]):
    """Pauses that grow to a limit and never end.

    They have no length, so that kopf does not count its tries.
    """

    def __iter__(self) -> Iterator[float]:
        return itertools.chain(_GROWING, itertools.repeat(_LONGEST_PAUSE))


async def watch(settings: Settings, hooks: Hooks) -> None:
    """Watch until canceled.

    The watches start again after any end, with a pause of at most ten seconds.
    """
    loop = asyncio.get_running_loop()
    pauses, said = iter(_Pauses()), set[str]()
    while True:
        began = loop.time()
        try:
            await _watch_once(settings, hooks)
            reason = "a watch is dead"
        except Exception as error:  # noqa: BLE001 - kopf's errors have no common class, and none may end the process
            reason = _explain(error)
        if loop.time() - began > _STEADY_SECONDS:
            pauses, said = iter(_Pauses()), set()
        if reason not in said:
            logger.warning("the watches have ended and start again: %s", reason)
            said.add(reason)
        hooks.monitor.start_again()
        await asyncio.sleep(next(pauses))


def _explain(error: Exception) -> str:
    if isinstance(error, kopf.LoginError):
        return "the API server rejects the operator's credentials"
    # kopf's errors of the API server have the server's sentence, and then its whole answer.
    return f"{type(error).__name__}: {error.args[0] if error.args else ''}"


async def _watch_once(settings: Settings, hooks: Hooks) -> None:
    """Watch until a watch is found dead, or kopf trusts a replaced authority.

    Raises the error that ends kopf. kopf is not stopped by its flag: it waits without a limit for tasks that may
    wait for a session that it has closed.
    """
    roots: Collection[Task] = ()
    authority = _authority()
    with task_scope() as inside:
        configured = _configure(settings.watch_silence_seconds)
        configured.watching.chunk_size = _objects_per_page(hooks)
        starting = asyncio.create_task(_start_kopf(settings, configured, hooks))
    try:
        roots = await starting
        hooks.take_signals()
        while not hooks.monitor.dead:
            configured.watching.chunk_size = _objects_per_page(hooks)
            ended, _ = await asyncio.wait(roots, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                if not task.cancelled():
                    task.result()
            if ended:
                raise RuntimeError("kopf has ended without an error")
            if _authority() != authority:
                # kopf has read it when it started, and would try for ever what it cannot verify.
                raise RuntimeError("the authority of the API server's certificate has been replaced")
    finally:
        await end_all(roots, inside, _STOP_SECONDS)


async def _start_kopf(settings: Settings, configured: kopf.OperatorSettings, hooks: Hooks) -> Collection[Task]:
    registry = kopf.OperatorRegistry()
    _register_login(registry)
    _register_events(registry, hooks)
    return await kopf.spawn_tasks(
        registry=registry,
        settings=configured,
        memories=_Forgetful(),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
    )


def _objects_per_page(hooks: Hooks) -> int:
    return max(hooks.objects_per_page(), _FEWEST_OBJECTS)


def _configure(silence_seconds: float) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    # Kinds come from discovery alone: no right to list namespaces or CustomResourceDefinitions is needed.
    settings.scanning.disabled = True
    # The server ends a stream; the client does a little later, and on silence much sooner (bookmarks).
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = silence_seconds
    # The API server's absence and lost rights end nothing: requests are tried until they succeed.
    settings.networking.error_backoffs = _Pauses()
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.queueing.exit_timeout = 0.5
    # The process decides itself how long it may take to stop.
    settings.process.ultimate_exiting_timeout = None
    # The server does not send other Jobs and pods.
    settings.watching.label_selectors["batch", "v1", "jobs"] = JOB_UID_LABEL
    settings.watching.label_selectors["v1", "pods"] = JOB_UID_LABEL
    # kopf keeps an object, and a task for it, until nothing has been shown of it for so long.
    settings.queueing.idle_timeout = 0.05
    # No handler here asks for differences or stores its progress: without this, every object is copied for them.
    settings.persistence.diffbase_storage = _NoDifferences()
    settings.persistence.progress_storage = _NoProgress()
    return settings


class _Forgetful(ResourceMemories):
    """Keeps no record of an object: kopf needs it for daemons and timers only.

    The operator has none of these. `ephemeral` is how kopf's admission webhooks request a record that is not kept. No
    public setting does, and no public class can be given to `spawn_tasks`, hence the private one: a test fails if kopf
    no longer heeds it.
    """

    async def recall(self, raw_body: kopf.RawBody, **options: Any) -> ResourceMemory:
        return await super().recall(raw_body, **{**options, "ephemeral": True})


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


def _authority() -> bytes:
    """Read the certificates that a pod trusts, renewed by the kubelet, if in a pod."""
    file = _SERVICE_ACCOUNT / "ca.crt"
    return file.read_bytes() if file.exists() else b""


def _register_events(registry: kopf.OperatorRegistry, hooks: Hooks) -> None:
    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def job_changed(event: kopf.RawEvent, **_: Any) -> None:
        deleted, body = event["type"] == "DELETED", event["object"]
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        hooks.show(body, deleted=deleted)
        _show(hooks, "qlorajobs", event)
        if sweep := sweep_of(body):
            hooks.enqueue_sweep((key[0], sweep), SECONDS_BETWEEN_PASSES)
        if hooks.store.job_changed(body, deleted=deleted, created=event["type"] == "ADDED"):
            hooks.enqueue(key, first=not deleted and "startTime" not in body.get("status", {}))

    @kopf.on.event(GROUP, VERSION, SWEEP_PLURAL, registry=registry)
    async def sweep_changed(event: kopf.RawEvent, **_: Any) -> None:
        body, metadata = event["object"], event["object"]["metadata"]
        hooks.enqueue_sweep((metadata["namespace"], metadata["name"]), 0.0)
        for cell in hooks.store.sweeps.note(body, deleted=event["type"] == "DELETED"):
            hooks.enqueue((metadata["namespace"], cell))

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


def _show(hooks: Hooks, kind: Kind, event: kopf.RawEvent) -> None:
    metadata = event["object"]["metadata"]
    identity = (kind, metadata["namespace"], metadata["name"], metadata["uid"])
    hooks.monitor.show(identity, metadata["resourceVersion"], deleted=event["type"] == "DELETED")
