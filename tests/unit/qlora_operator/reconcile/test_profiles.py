"""Accounts of profiles: no second counts twice or is lost, whatever happens to writes, jobs and operators."""

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest

from qlora_api.profile_status import QLoRAProfileStatus
from qlora_api.status_types import hours_of, seconds_of
from qlora_operator.decisions.manifests.objects import document
from qlora_operator.decisions.observed.holds import hold_of
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.decisions.observed.stored_job import parse_job
from qlora_operator.decisions.profiles.ledger import settled
from qlora_operator.decisions.profiles.stored_profile import StoredProfile
from qlora_operator.keys import Key
from qlora_operator.kube.errors import ConflictError, RejectedError, UnavailableError
from qlora_operator.kube.listing import Kind, ObjectVersion, object_version
from qlora_operator.reconcile.accounts import Accounts
from qlora_operator.reconcile.profiles import ProfileReconciler
from qlora_operator.watch.profiles import ProfileStore
from qlora_operator.watch.store import Store
from tests.support.builders import condition, job_body, profile_body

T = TypeVar("T")
NAMESPACES = ("team-a", "team-b")
FAULTS = ("none", "none", "none", "conflict", "failed", "lost answer")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


class World:
    """An API server with one profile and its jobs, in virtual time. Implements what the reconciler calls."""

    def __init__(self, seed: int = 0, **profile: Any) -> None:
        self.random = random.Random(seed)
        self.now = datetime(2026, 11, 20, tzinfo=UTC)
        self.version = 100
        self.profile = profile_body(version=100, **profile)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.sweeps: dict[str, tuple[str, int]] = {}
        self.used: dict[str, int] = defaultdict(int)
        """GPU seconds of all jobs and sweeps ever."""
        self.deleted: dict[str, dict[str, Any]] = {}
        """Deleted jobs that no write has counted to their end."""
        self.lost = 0
        self.sums: dict[tuple[str, str], int] = {}
        """By namespace and month, also dropped ones."""
        self.fault = "none"
        self.labels: dict[str, dict[str, str]] | None = {}
        self.denied: set[str] = set()
        self.nodes: dict[str, dict[str, str]] | None = {}
        self.restart()

    @property
    def status(self) -> QLoRAProfileStatus:
        return QLoRAProfileStatus.model_validate(self.profile.get("status") or {})

    def restart(self) -> None:
        """Another operator lists everything. What deleted jobs have used since the last write is lost."""
        self.lost += sum(self.uncounted(uid, body) for uid, body in self.deleted.items())
        self.deleted.clear()
        self.asked: list[Key] = []
        self.store, self.accounts = Store(), Accounts()
        profiles = ProfileStore(lambda name: self.reconciler.changed(name))
        self.reconciler = ProfileReconciler(
            self,  # type: ignore[arg-type]
            profiles,
            self.store,
            namespaces=(),
            enqueue=lambda key, _after: self.asked.append(key),
            enqueue_sweep=lambda _key, _after: None,
            on_change=lambda _name: None,
            clock=lambda: self.now,
            accounts=self.accounts,
        )
        for body in self.jobs.values():
            self.store.job_changed(body)
        run(self.reconciler.first())

    def uncounted(self, uid: str, body: Object) -> int:
        entries = {uid: seconds for each in self.status.namespaces for uid, seconds in each.unsettled.items()}
        settled = seconds_of(body["status"]["usage"].get("settledGpuHours", "0.00"))
        return self.used[uid] - max(entries.get(uid, 0), settled)

    async def list_profiles(self) -> tuple[list[Object], str]:
        return [self.profile], str(self.version)

    async def namespace_labels(self) -> dict[str, dict[str, str]]:
        if self.labels is None:
            raise RejectedError("forbidden")
        return self.labels

    async def node_labels(self, selected: dict[str, str]) -> dict[str, dict[str, str]]:
        if self.nodes is None:
            raise RejectedError("forbidden")
        return {name: labels for name, labels in self.nodes.items() if selected.items() <= labels.items()}

    async def sweep_names(self, _namespace: str | None) -> list[Key]:
        return []

    async def list_versions(self, kind: Kind, namespace: str) -> tuple[list[ObjectVersion], str]:
        if namespace in self.denied:
            raise RejectedError("forbidden")
        jobs = [body for body in self.jobs.values() if body["metadata"]["namespace"] == namespace]
        return [object_version(kind, body) for body in jobs], str(self.version)

    async def sweep_uids(self, namespace: str) -> set[str]:
        return {uid for uid, (where, _) in self.sweeps.items() if where == namespace}

    async def apply_profile_status(self, profile: StoredProfile, status: Object) -> Object:
        if self.fault == "failed":
            raise UnavailableError("no answer")
        if self.fault == "conflict":
            self._write_profile({})
        if profile.resource_version != self.profile["metadata"]["resourceVersion"]:
            raise ConflictError("the object has been modified")
        self._write_profile({"status": status})
        self.deleted = {uid: body for uid, body in self.deleted.items() if self.uncounted(uid, body)}
        for each in self.status.namespaces:
            self.sums |= {(each.namespace, month.month): month.gpu_seconds for month in each.months}
        if self.fault == "lost answer":
            raise UnavailableError("no answer")
        return self.profile

    def _write_profile(self, change: Object) -> None:
        self.version += 1
        metadata = self.profile["metadata"] | {"resourceVersion": str(self.version)}
        self.profile = {**self.profile, "metadata": metadata, **change}

    def create(self, namespace: str = NAMESPACES[0]) -> str:
        uid = f"uid-{len(self.used)}"
        self.used[uid] = 0
        body = job_body({"phase": "Training", "usage": {"gpuHours": "0.00"}})
        body["metadata"] |= {"namespace": namespace, "name": uid, "uid": uid}
        self._write(uid, body)
        return uid

    def use(self, uid: str, seconds: int, phase: str = "Training") -> None:
        """The operator stores more usage of the job, and perhaps its end."""
        body = self.jobs[uid]
        self.used[uid] += seconds
        usage = body["status"]["usage"] | {"gpuHours": hours_of(self.used[uid])}
        conditions = [condition("Succeeded", "True")] if phase == "Succeeded" else []
        self._write(uid, body | {"status": {"phase": phase, "usage": usage, "conditions": conditions}})

    def _write(self, uid: str, body: dict[str, Any]) -> None:
        self.version += 1
        self.jobs[uid] = body | {"metadata": body["metadata"] | {"resourceVersion": str(self.version)}}
        self.store.job_changed(self.jobs[uid])

    def delete(self, uid: str, *, seen: bool) -> None:
        body = self.jobs.pop(uid)
        self.deleted |= {uid: body} if self.uncounted(uid, body) else {}
        if seen:
            self.version += 1
            metadata = body["metadata"] | {"resourceVersion": str(self.version)}
            self.store.job_changed(body | {"metadata": metadata}, deleted=True)

    def settle(self) -> None:
        """The operator makes a pass over each job that was requeued."""
        for _, uid in self.asked:
            if uid in self.jobs:
                job = parse_job(self.jobs[uid])
                status = settled(job, job.status, self.accounts.counted_seconds(job))
                if status != job.status:
                    self._write(uid, self.jobs[uid] | {"status": status.dump()})
        self.asked.clear()

    def look(self, fault: str = "none") -> None:
        self.fault = fault
        run(self.reconciler.once())
        self.fault = "none"

    def live(self) -> None:
        """One random event."""
        event = self.random.choice(("create", "use", "use", "use", "end", "retry", "delete", "look", "look", "settle"))
        event = self.random.choice(("restart", "later", "sweep", "no sweep")) if self.random.random() < 0.1 else event
        running = [uid for uid, body in self.jobs.items() if body["status"]["phase"] == "Training"]
        seconds = self.random.randrange(1000)
        match event:
            case "create":
                self.create(self.random.choice(NAMESPACES))
            case "use" | "end" if running:
                self.use(self.random.choice(running), seconds, "Training" if event == "use" else "Succeeded")
            case "retry" if self.jobs:
                self.use(self.random.choice(list(self.jobs)), 0)
            case "delete" if self.jobs:
                self.delete(self.random.choice(list(self.jobs)), seen=self.random.random() < 0.7)
            case "look":
                self.look(self.random.choice(FAULTS))
            case "settle":
                self.settle()
            case "restart":
                self.restart()
            case "later":
                self.now += timedelta(days=self.random.randrange(20))
            case "sweep":
                self.count_sweep(f"sweep-{self.random.randrange(5)}", seconds)
            case "no sweep" if self.sweeps:
                # All of it is counted before: what a sweep itself counts is bounded by the last of its cells.
                uid = self.random.choice(list(self.sweeps))
                self.count_sweep(uid, 0)
                self.look()
                del self.sweeps[uid]
                if self.random.random() < 0.7:
                    self.store.jobs.drop_sweep(uid)

    def count_sweep(self, uid: str, seconds: int) -> None:
        """A pass over a sweep, whose UID is never used again."""
        uid = uid if uid in self.sweeps or uid not in self.used else f"{uid}-{len(self.used)}"
        namespace, before = self.sweeps.get(uid, (NAMESPACES[0], 0))
        self.sweeps[uid] = (namespace, before + seconds)
        self.used[uid] += seconds
        self.store.jobs.note_sweep((namespace, uid), uid, "default", before + seconds)


@pytest.mark.parametrize("seed", range(12))
def test_the_sums_are_the_gpu_seconds_of_all_jobs_ever(seed: int) -> None:
    """Except for what a job has used between the last write and its deletion, if the operator ended in between."""
    world = World(seed)
    for _ in range(250):
        world.live()
    for uid in list(world.jobs):
        world.use(uid, 0, "Succeeded")
    world.restart()
    for uid in world.sweeps:
        world.count_sweep(uid, 0)
    for _ in range(3):
        world.look()
        world.settle()
    assert sum(world.sums.values()) == sum(world.used.values()) - world.lost
    entries = {uid for each in world.status.namespaces for uid in each.unsettled}
    assert entries <= world.sweeps.keys(), "every job has noted that it is counted"


def test_an_ended_job_leaves_the_profile_and_counts_once_when_it_is_retried() -> None:
    world = World()
    uid = world.create()
    world.use(uid, 600, "Succeeded")
    world.look()
    assert world.asked == [(NAMESPACES[0], uid)]
    world.settle()
    world.look()
    assert [each.unsettled for each in world.status.namespaces] == [{}]
    world.use(uid, 30)
    world.look()
    (entry,) = world.status.namespaces
    assert (entry.months[0].gpu_seconds, entry.unsettled) == (630, {uid: 630})


def test_a_namespace_that_cannot_be_listed_loses_no_entry() -> None:
    """Its jobs are unknown, and would count again once they are known. So would those that no watch has shown yet."""
    world = World()
    uid = world.create()
    world.use(uid, 600)
    world.look()
    for denied in (NAMESPACES, ()):
        world.denied = set(denied)
        hidden = world.jobs.pop(uid)
        world.restart()
        world.jobs |= {} if denied else {uid: hidden}
        world.look()
        world.jobs[uid] = hidden
        world.store.job_changed(hidden)
        world.look()
        assert sum(world.sums.values()) == 600


def test_a_standby_counts_no_job_that_it_has_seen_deleted() -> None:
    """The operator that worked then has counted it, and its entry is gone."""
    world = World()
    uid = world.create()
    world.use(uid, 600)
    body = world.jobs[uid]
    world.delete(uid, seen=True)
    world.look()
    world.look()
    assert [each.unsettled for each in world.status.namespaces] == [{}]
    standby = Store()
    standby.job_changed(body)
    standby.job_changed(body | {"metadata": body["metadata"] | {"resourceVersion": "999"}}, deleted=True)
    world.reconciler._jobs = world.store = standby
    run(world.reconciler.first())
    world.look()
    assert sum(world.sums.values()) == 600


def test_a_spent_month_holds_the_namespaces_jobs_until_the_next() -> None:
    world = World(limits={"gpuHoursPerMonth": 0.5})
    uid, other = world.create(), world.create(NAMESPACES[1])
    profiles = {"default": next(iter(world.reconciler._profiles.values()))}

    def reason(of: str) -> str | None:
        job = parse_job(world.jobs[of])
        hold = hold_of(job, profiles, world.accounts.spent_seconds(job))
        return None if hold is None else hold.word

    spent, key = "MonthlyBudgetSpent", (NAMESPACES[0], uid)
    for seconds, held, asked in ((1799, None, []), (1, spent, [key]), (5, spent, [])):
        world.asked.clear()
        world.use(uid, seconds)
        world.look()
        assert (reason(uid), reason(other), world.asked) == (held, None, asked)
    world.restart()
    assert reason(uid) == spent, "before any job is worked on"
    world.asked.clear()
    world.now = datetime(2026, 12, 1, tzinfo=UTC)
    world.look()
    assert (reason(uid), world.asked) == (None, [key])


def test_jobs_wait_while_the_drivers_of_all_nodes_of_their_profile_are_too_old() -> None:
    pool, driver = {"pool": "gpu"}, "nvidia.com/cuda.driver-version.major"
    world = World(device="cuda", nodeSelector=pool)
    key = (NAMESPACES[0], world.create())
    old, new = ({**pool, driver: version} for version in ("570", "580"))

    def after(nodes: dict[str, dict[str, str]] | None) -> tuple[bool, list[Key]]:
        world.nodes = nodes
        world.asked.clear()
        world.look()
        return "default" in world.accounts.no_gpu, world.asked

    assert after({"gpu-1": old, "other": {driver: "580"}}) == (True, [key])
    assert after({"gpu-1": old}) == (True, []), "the job knows"
    world.restart()
    assert "default" in world.accounts.no_gpu, "before any job is worked on"
    assert after({"gpu-1": old, "gpu-2": new}) == (False, [key])
    assert after({"gpu-1": old}) == (True, [key])
    assert after(None) == (False, [key]), "without the right to list nodes nothing is known of them"


def test_jobs_are_planned_for_the_gpus_of_the_profiles_nodes() -> None:
    size = "nvidia.com/gpu.memory"
    world = World(device="cuda", gpuResource="nvidia.com/gpu")
    job = parse_job(world.jobs[world.create()])
    key = (job.namespace, job.uid)

    def after(nodes: dict[str, dict[str, str]] | None) -> tuple[object, str | None, list[Key]]:
        world.nodes = nodes
        world.asked.clear()
        world.look()
        planned = json.loads(document(job, world.reconciler._profiles["default"]))["spec"]["resources"]
        return planned.get("gpuMemory"), world.status.gpu_memory, world.asked

    assert after({"gpu-1": {size: "46068"}}) == ("44Gi", "44Gi", [key])
    assert after({"gpu-1": {size: "46068"}}) == ("44Gi", "44Gi", [])
    world.restart()
    assert world.reconciler._profiles["default"].gpu_memory == "44Gi", "before any job is worked on"
    assert after({"gpu-1": {size: "46068"}, "gpu-2": {size: "81559"}}) == (None, None, [key])
    assert after({"gpu-1": {size: "81559"}}) == ("79Gi", "79Gi", [key])
    assert after(None) == (None, None, [key])


def test_the_gpu_memory_of_a_profile_itself_counts() -> None:
    world = World(device="cuda", gpuResource="nvidia.com/gpu", gpuMemory="40Gi")
    world.nodes = {"gpu-1": {"nvidia.com/gpu.memory": "46068"}}
    world.look()
    assert (world.reconciler._profiles["default"].gpu_memory, world.status.gpu_memory) == ("40Gi", None)


def test_a_changed_profile_requeues_its_jobs_that_are_not_settled() -> None:
    world = World()
    waiting, ended, other = (world.create() for _ in range(3))
    world.store.settle((NAMESPACES[0], ended), True)
    world.store.jobs.note(world.jobs[other] | {"spec": {"scheduling": {"profileName": "other"}}})
    world.look()
    world.asked.clear()
    world.look()
    assert world.asked == [], "a write of its status is no change"
    changed = world.profile["metadata"] | {"generation": 2}
    world.profile |= {"metadata": changed, "spec": world.profile["spec"] | {"device": "cpu"}}
    world._write_profile({})
    world.look()
    assert world.asked == [(NAMESPACES[0], waiting)]


def test_the_status_counts_what_runs_and_what_waits() -> None:
    world = World()
    for phase in ("Training", "Preparing", "Queued", "Pending", "Suspended", "Succeeded"):
        world.use(world.create(), 0, phase)
    world.look()
    assert (world.status.running_jobs, world.status.waiting_jobs) == (2, 2)


def test_labels_that_may_not_be_read_are_reported_and_read_again() -> None:
    world = World(allowedNamespaces={"selector": {"matchLabels": {"tier": "gold"}}})
    gold = {"team-a": {"tier": "gold"}}
    for labels, reason, admits in ((None, "NamespacesNotReadable", False), (gold, "Valid", True)):
        world.labels = labels
        world.look()
        assert [each.reason for each in world.status.conditions] == [reason]
        assert world.reconciler._profiles["default"].admits("team-a") == admits
