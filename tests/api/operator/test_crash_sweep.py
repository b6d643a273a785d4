"""Faults at every write of a job's life, in every phase: it ends as if nothing had happened, with no more writes.

The operator is killed before the write or after it; another one takes over whose watches still show what was there
before the write; or the watches show nothing from the write on, until the next list.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pytest

from devcluster.controlplane import ControlPlane
from qlora_api.contract import ExitCode
from qlora_api.naming import STEP_LABEL
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import ConflictError
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.watch.resync import Resync
from qlora_operator.watch.store import Store
from tests.support.cluster.played import NAMESPACE, SHARED, Api, connected, operator, prepared

Fault = Literal["killed before", "killed after", "stale watches", "lost events"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
_AT_A_TIME = 6
_MOST_PASSES = 40


class KilledError(Exception):
    """The operator's process is gone."""


@dataclass
class Life:
    """One job: what the operators wrote for it, and what has gone wrong so far."""

    api: Api
    name: str
    fault: Fault | None = None
    at: int = 0
    writes: list[str] = field(default_factory=list)
    """Phase and kind of each write that was accepted."""
    tries: list[str] = field(default_factory=list)
    phase: str = "(new)"
    uid: str = ""
    silent: bool = False
    before: list[tuple[str, Object]] = field(default_factory=list)
    shown: dict[str, tuple[str, Object]] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return NAMESPACE, self.name

    async def objects(self) -> list[tuple[str, Object]]:
        """The job with its Jobs and pods, as stored now."""
        jobs = [("jobs", body) for body in await self.api.children(self.name)]
        pods = [("pods", body) for body in await self.api.children(self.name, "/api/v1", "pods")]
        return [("qlorajobs", await self.api.job(self.name)), *jobs, *pods]

    async def step_job(self, step: str) -> dict[str, Any]:
        """The Job of the step that has not ended."""
        (job,) = [
            job
            for job in await self.api.children(self.name)
            if job["metadata"]["labels"][STEP_LABEL] == step and not job["status"].get("conditions")
        ]
        return job

    async def patch(self, spec: Object) -> None:
        await self.api.send(
            "PATCH", f"/apis/qlora.dev/v1beta1/namespaces/{NAMESPACE}/qlorajobs/{self.name}", {"spec": spec}
        )


Act = Callable[[Life], Awaitable[None]]


def runs(step: str) -> Act:
    async def act(life: Life) -> None:
        await life.api.run(await life.step_job(step))

    return act


def ends(step: str, code: int = 0, *, running: bool = False) -> Act:
    async def act(life: Life) -> None:
        await life.api.end(await life.step_job(step), life.uid, code, runs=running)

    return act


def loses_a_pod(step: str) -> Act:
    async def act(life: Life) -> None:
        await life.api.lose(await life.step_job(step), life.uid)

    return act


def changes(**spec: Any) -> Act:
    async def act(life: Life) -> None:
        await life.patch(spec)

    return act


LIVES: dict[str, tuple[Act, ...]] = {
    "undisturbed": (ends("prepare"), runs("train"), ends("train", running=True), ends("publish")),
    "suspended, failed, taken up, cleaned up": (
        ends("prepare"),
        changes(suspend=True),
        changes(suspend=False),
        # The prepared rows are damaged: a retry makes them again.
        ends("train", int(ExitCode.BAD_DATASET)),
        changes(retry={"request": "a"}),
        ends("prepare"),
        runs("train"),
        ends("train", running=True),
        ends("publish"),
        changes(cleanupAfterSeconds=0),
        ends("clean"),
    ),
    "of two nodes, one of which is lost": (
        ends("prepare"),
        runs("train"),
        loses_a_pod("train"),
        runs("train"),
        ends("train", running=True),
        ends("publish"),
    ),
}
SPECS: dict[int, dict[str, Any]] = {2: {"resources": {"nodes": 2}, "scheduling": {"profileName": SHARED}}}
"""Of the lives that are not those of the smallest job, by number."""


class FaultyCluster(Cluster):
    """Notes what it writes for a life, and fails as that says."""

    def __init__(self, life: Life, *, faulty: bool) -> None:
        super().__init__(life.api.client)
        self._life = life
        self._faulty = faulty

    async def _request(self, method: str, path: str, **request: Any) -> bytes:
        if method == "GET":
            return await super()._request(method, path, **request)
        life = self._life
        if self._faulty:
            life.tries.append(f"{life.phase}: {_kind(method, path)}")
        struck = self._faulty and len(life.tries) == life.at
        if struck and life.fault == "stale watches":
            life.before = await life.objects()
        if struck and life.fault == "killed before":
            raise KilledError
        try:
            answer = await super()._request(method, path, **request)
        except ConflictError:
            if struck and life.fault in ("killed after", "stale watches"):
                raise KilledError from None
            raise
        life.writes.append(f"{life.phase}: {_kind(method, path)}")
        if path.endswith("/status"):
            life.phase = request["body"]["status"]["phase"]
        if struck and life.fault == "lost events":
            life.silent = True
        if struck and life.fault in ("killed after", "stale watches"):
            raise KilledError
        return answer


def _kind(method: str, path: str) -> str:
    parts = path.split("/namespaces/")[1].split("/")
    verb = {"POST": "create", "DELETE": "delete"}.get(method, "write")
    return f"{verb} {'status' if parts[-1] == 'status' else parts[1]}"


async def live(life: Life, acts: Sequence[Act]) -> Life:
    """The whole life; the operator comes to rest before each act and after the last."""
    await life.api.apply(life.name, **life.spec)
    life.uid = (await life.api.job(life.name))["metadata"]["uid"]
    store = Store()
    reconciler = operator(FaultyCluster(life, faulty=True), store)
    for act in (*acts, None):
        try:
            await _settle(life, reconciler, store)
        except KilledError:
            store = Store()
            for kind, body in life.before:
                _note(store, kind, body)
            reconciler = operator(FaultyCluster(life, faulty=False), store)
            if life.before:
                # Its watches are late for some passes; then they show what is there.
                await _passes(life, reconciler)
            await _settle(life, reconciler, store)
        if act is not None:
            await act(life)
    return life


async def _settle(life: Life, reconciler: Reconciler, store: Store) -> None:
    """Deliver events, or a list after lost ones, and make passes until nothing is new."""
    for _ in range(_MOST_PASSES):
        if life.silent:
            await _list(life, reconciler, store)
            life.silent = False
        news = await _watch(life, store)
        if not await _passes(life, reconciler) and not news and not life.silent:
            return
    raise AssertionError("the operator does not come to rest")


async def _passes(life: Life, reconciler: Reconciler) -> bool:
    """Passes until the operator wants to wait. Whether it has written anything."""
    written = len(life.writes)
    for _ in range(_MOST_PASSES):
        try:
            again = await reconciler.reconcile(life.key)
        except RetryError:
            continue
        if again is None or again > 1:
            return len(life.writes) > written
    raise AssertionError("the operator does not come to rest")


async def _watch(life: Life, store: Store) -> bool:
    """Show what has changed. Whether that is worth a pass."""
    now = {body["metadata"]["uid"]: (kind, body) for kind, body in await life.objects()}
    news = False
    for uid, (kind, body) in life.shown.items():
        if uid not in now:
            news |= _note(store, kind, body, deleted=True)
    for kind, body in now.values():
        news |= _note(store, kind, body)
    life.shown = now
    return news


def _note(store: Store, kind: str, body: Object, *, deleted: bool = False) -> bool:
    if kind == "qlorajobs":
        return store.job_changed(body, deleted=deleted)
    return bool(store.child_changed("jobs" if kind == "jobs" else "pods", body, deleted=deleted))


async def _list(life: Life, reconciler: Reconciler, store: Store) -> None:
    """A resync, of whose jobs only this one is worked on."""
    asked: set[tuple[str, str]] = set()
    resync = Resync(
        reconciler.cluster,
        (NAMESPACE,),
        lambda key, _, **__: asked.add(key),
        store=store,
        interval=300,
        monotonic=float,
    )
    for _ in range(2):
        asked.clear()
        await resync.once(judge=False)
        if life.key in asked:
            await _passes(life, reconciler)


async def ending(life: Life) -> dict[str, Any]:
    """What must be the same whatever happened on the way."""
    job = await life.api.job(life.name)
    status = job["status"]
    about = f"fieldSelector=involvedObject.uid%3D{life.uid}"
    listed = await life.api.send("GET", f"/api/v1/namespaces/{NAMESPACE}/events?{about}")
    events = Counter(event["reason"] for event in listed["items"])
    repeated = (*_REPEATED, "Training") if status.get("disruptions") else _REPEATED
    assert all(count == 1 or reason in repeated for reason, count in events.items()), f"an Event was doubled: {events}"
    kept = ("phase", "failures", "disruptions", "dataset", "adapter", "highestAttempt", "retryRequest", "firstAttempt")
    return {
        **{name: status.get(name) for name in kept},
        "step": (status["step"]["name"], status["step"]["attempt"]),
        "conditions": {entry["type"]: (entry["status"], entry["reason"]) for entry in status["conditions"]},
        "Jobs": sorted(body["metadata"]["name"][len(life.name) :] for body in await life.api.children(life.name)),
        "claims": len(await life.api.children(life.name, "/api/v1", "persistentvolumeclaims")),
        "finalizers": job["metadata"].get("finalizers"),
    }


# Phases that a job which is suspended and retried reaches more than once.
_REPEATED = ("Queued", "Preparing")


_LONG = [pytest.mark.slow, pytest.mark.timeout(1200)]


# The second has every phase. It and the third take minutes.
@pytest.mark.parametrize(
    "which",
    [
        pytest.param(0, id="plain"),
        pytest.param(1, id="troubled", marks=_LONG),
        pytest.param(2, id="several-nodes", marks=_LONG),
    ],
)
def test_a_fault_at_any_write_changes_neither_the_end_nor_the_number_of_writes(plane: ControlPlane, which: int) -> None:
    acts = list(LIVES.values())[which]
    spec = SPECS.get(which, {})

    async def scenario() -> list[str]:
        async with connected(prepared(plane)) as api:
            model = await live(Life(api, f"sweep-{which}", spec=spec), acts)
            wanted = await ending(model)
            # What exists already is tried again in vain, and is no write.
            places, limit = model.tries, asyncio.Semaphore(_AT_A_TIME)
            wrong: list[str] = []

            async def strike(fault: Fault, at: int) -> None:
                async with limit:
                    name = f"sweep-{which}-{fault.replace(' ', '-')}-{at}"
                    life = await live(Life(api, name, fault, at, spec=spec), acts)
                    assert len(life.tries) >= at, "the write that was to be struck never came"
                    found = await ending(life)
                    if found != wanted or len(life.writes) > len(model.writes):
                        extra = list((Counter(life.writes) - Counter(model.writes)).elements())
                        wrong.append(f"{fault} write {at} ({places[at - 1]}): {found}, more writes: {extra}")

            await asyncio.gather(*(strike(fault, at) for fault in FAULTS for at in range(1, len(places) + 1)))
            assert wrong == [], f"{len(wrong)} of {len(FAULTS) * len(places)}, instead of {wanted}: {wrong[:3]}"
            return places

    places = asyncio.run(scenario())
    phases = {place.split(":")[0] for place in places}
    assert phases >= {"(new)", "Preparing", "Queued", "Training", "Publishing", "Succeeded"}
    assert which != 1 or phases >= {"Suspended", "Failed"}
