"""Whether a watch is alive, by the changes that only lists show."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from qlora_operator.kube.errors import ClusterError, NotFoundError, RejectedError, UnavailableError
from qlora_operator.kube.listing import Kind, ObjectVersion, object_version
from qlora_operator.watch.resync import Identity, Resync, WatchMonitor, look_at_all_sweeps
from qlora_operator.watch.store import Store
from tests.support.builders import NAME, VirtualLoop, job_body, present

JOB: Identity = ("qlorajobs", "team", "a", "u")
POD: Identity = ("pods", "team", "p", "v")


def monitor() -> WatchMonitor:
    return WatchMonitor(patience=100)


def test_a_watch_that_shows_the_listed_versions_is_alive() -> None:
    watch = monitor()
    for number, version in enumerate(("5", "9", "12")):
        watch.show(JOB, version, deleted=False)
        watch.compare("qlorajobs", {JOB: version}, now=number * 200)
    assert watch.dead == ()


def test_a_watch_that_misses_a_version_for_long_is_dead() -> None:
    watch = monitor()
    watch.show(JOB, "5", deleted=False)
    watch.compare("qlorajobs", {JOB: "9"}, now=0)
    assert watch.dead == ()
    watch.compare("qlorajobs", {JOB: "9"}, now=50)
    assert watch.dead == ()
    watch.compare("qlorajobs", {JOB: "11"}, now=120)
    assert watch.dead == ("qlorajobs",)


def test_a_watch_that_catches_up_is_alive_again() -> None:
    watch = monitor()
    watch.compare("pods", {POD: "9"}, now=0)
    watch.compare("pods", {POD: "9"}, now=120)
    assert watch.dead == ("pods",)
    watch.show(POD, "9", deleted=False)
    watch.compare("pods", {POD: "9"}, now=240)
    assert watch.dead == ()


@pytest.mark.parametrize("deleted", [True, False])
def test_late_or_deleted_objects_of_the_watch_are_not_missed(deleted: bool) -> None:
    watch = monitor()
    watch.compare("qlorajobs", {JOB: "9"}, now=0)
    watch.show(JOB, "10", deleted=deleted)
    watch.compare("qlorajobs", {} if deleted else {JOB: "10"}, now=120)
    assert watch.dead == ()


def test_the_list_of_one_kind_does_not_affect_another() -> None:
    watch = monitor()
    watch.compare("qlorajobs", {JOB: "9"}, now=0)
    watch.compare("pods", {}, now=200)
    assert watch.dead == ()


def test_an_object_missing_from_a_list_is_dropped_unless_newer() -> None:
    watch = monitor()
    watch.show(JOB, "5", deleted=False)
    watch.show(("qlorajobs", "team", "b", "w"), "12", deleted=False)
    watch.show(POD, "5", deleted=False)
    watch.compare("qlorajobs", {}, now=0, list_version="9")
    assert set(watch._shown) == {("qlorajobs", "team", "b", "w"), POD}


def test_a_job_recreated_before_the_old_ones_deletion_event_is_not_missed() -> None:
    watch = monitor()
    new: Identity = ("qlorajobs", "team", "a", "new")
    watch.show(JOB, "5", deleted=False)
    watch.show(new, "9", deleted=False)
    watch.show(JOB, "8", deleted=True)
    for now in (0, 120):
        watch.compare("qlorajobs", {new: "9"}, now=now, list_version="9")
    assert watch.dead == ()


def listed(name: str = "a", namespace: str | None = "team", **more: Any) -> dict[str, Any]:
    """A QLoRAJob as a list shows it."""
    metadata = {"namespace": namespace, "name": name, "uid": f"uid-{namespace}-{name}", "resourceVersion": "1"}
    return {"metadata": metadata, **more}


class Lists:
    """Answers the lists of a cluster with these QLoRAJobs, or raises `failure`, or denies a namespace."""

    def __init__(self, *jobs: dict[str, Any]) -> None:
        self.failure: ClusterError | None = None
        self.failing: tuple[str, ...] = ("qlorajobs", "jobs", "pods")
        """The kinds whose lists raise it."""
        self.denied = ""
        self.jobs = list(jobs)

    async def list_versions(self, kind: Kind, namespace: str | None) -> tuple[list[ObjectVersion], str]:
        await self.check_list(kind, namespace)
        return [object_version(kind, body) for body in self._listed(kind, namespace)], "9"

    async def check_list(self, kind: str, namespace: str | None) -> None:
        if self.failure is not None and kind in self.failing:
            raise self.failure
        if namespace is not None and namespace == self.denied:
            raise RejectedError("forbidden")

    async def sweep_names(self, namespace: str | None) -> list[tuple[str, str]]:
        await self.check_list("qlorasweeps", namespace)
        return [("team", "rates")]

    def _listed(self, kind: Kind, namespace: str | None) -> list[dict[str, Any]]:
        jobs = self.jobs if kind == "qlorajobs" else []
        return [body for body in jobs if namespace in (None, body["metadata"]["namespace"])]


class Played:
    """A resync of these lists in virtual time, and what it asks for."""

    def __init__(self, *jobs: dict[str, Any], namespaces: tuple[str, ...] = ()) -> None:
        self.lists, self.store, self._loop = Lists(*jobs), Store(), VirtualLoop()
        self.asked: list[tuple[str, str]] = []
        self.first: list[tuple[str, str]] = []
        self.pauses: list[float] = []
        self.changes: list[tuple[str | None, bool]] = []
        self.resync = Resync(
            self.lists,  # type: ignore[arg-type]
            namespaces,
            self._ask,
            store=self.store,
            interval=300,
            monotonic=self._loop.time,
            on_access=lambda namespace, denied: self.changes.append((namespace, denied)),
        )

    def _ask(self, key: tuple[str, str], after: float, *, first: bool = False) -> None:
        self.asked.append(key)
        self.first += [key] if first else []
        self.pauses.append(after)

    def show(self, body: dict[str, Any]) -> None:
        """Let the watch show the QLoRAJob."""
        self.store.job_changed(body)
        found = body["metadata"]
        identity: Identity = ("qlorajobs", found["namespace"], found["name"], found["uid"])
        self.resync.monitor.show(identity, found["resourceVersion"], deleted=False)

    def play(self, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(scenario())

    def begin(self) -> None:
        self._task = asyncio.create_task(self.resync.run())


def test_a_denied_namespace_leaves_the_others_alone_and_comes_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    played = Played(listed(namespace="kept"), listed(namespace="lost"), namespaces=("kept", "lost"))
    resync = played.resync

    async def scenario() -> None:
        played.begin()
        for body in played.lists.jobs:
            played.show(body)
        played.lists.denied = "lost"
        await asyncio.sleep(700)
        assert ("kept", "a") in played.asked
        assert ("lost", "a") not in played.asked
        assert "lost" in (resync.note() or "")
        assert played.changes[-2:] == [("kept", False), ("lost", True)]
        assert resync.problem() is None
        played.lists.denied = ""
        await asyncio.sleep(41)
        assert ("lost", "a") in played.asked
        assert resync.note() is None

    played.play(scenario)
    assert sum("namespace lost cannot be listed" in record.message for record in caplog.records) == 1


def test_a_recreated_definition_needs_a_new_watch() -> None:
    played = Played()
    resync = played.resync

    async def scenario() -> None:
        played.begin()
        played.lists.failure = NotFoundError("none")
        await asyncio.sleep(90)
        assert "CustomResourceDefinition" in (resync.problem() or "")
        assert resync.monitor.dead == ()
        played.lists.failure = None
        await asyncio.sleep(30)
        assert resync.monitor.dead == ("qlorajobs",)
        resync.monitor.start_again()
        assert resync.problem() is None

    played.play(scenario)


@pytest.mark.parametrize(
    ("failure", "found"),
    [
        (None, None),
        (RejectedError("forbidden"), "denies"),
        (ClusterError("connection refused"), "no list has succeeded"),
    ],
    ids=["well", "denied", "unreachable"],
)
def test_lost_rights_and_a_lost_server_are_distinguished(failure: ClusterError | None, found: str | None) -> None:
    played = Played(listed())

    async def scenario() -> None:
        played.begin()
        played.show(listed())
        await asyncio.sleep(400)
        assert ("team", "a") in played.asked
        played.lists.failure = failure
        for seconds in (90, 3600):
            await asyncio.sleep(seconds)
            problem = played.resync.problem()
            assert problem is None if found is None else found in present(problem)
        played.lists.failure = None
        await asyncio.sleep(60)
        assert played.resync.problem() is None

    played.play(scenario)


def test_a_deletion_between_two_starts_of_the_watches_is_noticed_soon_after() -> None:
    played = Played(job_body())

    async def scenario() -> None:
        played.show(job_body())
        await played.resync.first()
        played.lists.jobs.clear()
        played.resync.monitor.start_again()
        played.begin()
        await asyncio.sleep(30)
        assert (played.store.held(("team", NAME)), played.asked) == (None, [("team", NAME)])

    played.play(scenario)


def test_a_job_missing_from_a_list_is_requeued_although_the_next_list_fails() -> None:
    played = Played(listed("busy"))
    played.lists.failing = ("jobs", "pods")
    played.lists.failure = UnavailableError("connection refused")
    for body in (job_body(), listed("busy", spec=job_body()["spec"])):
        played.store.job_changed(body)
    with pytest.raises(UnavailableError):
        played.play(played.resync.once)
    # And no other: all of them, each time that a list fails, would be more load while there is too much.
    assert played.asked == [("team", NAME)]


def test_a_watch_that_shows_nothing_is_reported_at_the_second_list() -> None:
    played = Played(listed())
    resync = played.resync

    async def scenario() -> None:
        played.begin()
        await asyncio.sleep(400)
        assert resync.problem() is None
        await asyncio.sleep(300)
        assert resync.problem() == "the watch of qlorajobs is dead"
        played.show(listed())
        await asyncio.sleep(400)
        assert resync.problem() is None

    played.play(scenario)


def test_at_the_start_new_jobs_are_requested_first_and_ended_ones_last() -> None:
    """A job that waits for a place, and has no revision yet, is not new."""
    phases = {"a": "Succeeded", "b": "Training", "c": "Failed", "d": "Pending"}
    known = (listed(name, status={"phase": phase, "startTime": "today"}) for name, phase in phases.items())
    played = Played(*known, listed("new"))

    async def scenario() -> None:
        for body in played.lists.jobs:
            played.show(body)
        played.resync.request_all(await played.resync.first())

    played.play(scenario)
    assert [name for _, name in played.asked] == ["new", "b", "d", "a", "c"]
    assert (played.first, played.pauses) == ([("team", "new")], [0.0, 0.0, 0.0, 0.0, 0.01])


def test_the_work_begins_when_the_watches_have_shown_what_the_lists_have() -> None:
    """A job that no watch shows, and one that has been deleted in the meantime, are read live."""
    late, never, deleted = listed("late"), listed("never"), listed("deleted")
    played = Played(late, never, deleted)

    async def scenario() -> None:
        began = asyncio.create_task(played.resync.first())
        await asyncio.sleep(3)
        played.show(deleted)
        played.store.job_changed(deleted, deleted=True)
        played.show(late)
        await asyncio.sleep(4)
        assert not began.done()
        assert "not been listed" in present(played.resync.starting())
        assert await began == {("team", "never")}
        assert played.resync.starting() is None

    played.play(scenario)


def test_a_warm_standby_waits_for_nothing() -> None:
    played = Played(*(listed(f"job-{number}") for number in range(100)))

    async def scenario() -> None:
        for body in played.lists.jobs:
            played.show(body)
        before = asyncio.get_running_loop().time()
        assert await played.resync.first() == set()
        assert asyncio.get_running_loop().time() == before

    played.play(scenario)


@pytest.mark.parametrize(("jobs", "last"), [(2, 1.01), (5000, 50.99), (50_000, 150.997)])
def test_a_resync_of_many_jobs_is_spread_over_at_most_half_of_its_interval(jobs: int, last: float) -> None:
    played = Played(*(listed(f"job-{number}") for number in range(jobs)))
    for body in played.lists.jobs:
        played.store.job_changed(body)
    played.play(played.resync.once)
    assert (len(played.pauses), played.pauses[0]) == (jobs, 1.0)
    assert max(played.pauses) == pytest.approx(last)


def test_a_counted_sweep_that_no_list_has_is_requested_unless_the_list_failed() -> None:
    played, asked = Played(), list[tuple[str, str]]()

    async def scenario() -> None:
        played.lists.failing, played.lists.failure = ("qlorasweeps",), UnavailableError("away")
        known = lambda: [("team", "rates"), ("team", "deleted")]  # noqa: E731
        looking = asyncio.create_task(look_at_all_sweeps(played.lists, (), asked.append, 300, known))  # type: ignore[arg-type]
        await asyncio.sleep(1)
        assert asked == []
        played.lists.failure = None
        await asyncio.sleep(60)
        assert sorted(asked) == [("team", "deleted"), ("team", "rates")]
        looking.cancel()

    played.play(scenario)
