"""Whether a watch is alive, by the changes that only lists show; Events of phases."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from qlora_operator.decisions.events import phase_event
from qlora_operator.kube.errors import ClusterError, NotFoundError, RejectedError, UnavailableError
from qlora_operator.kube.listing import Kind, ObjectVersion, object_version
from qlora_operator.watch.resync import Identity, Resync, WatchMonitor
from qlora_operator.watch.store import Store
from tests.support.builders import (
    NAME,
    NOW,
    UID,
    VirtualLoop,
    after,
    child,
    failed,
    follow,
    job_body,
    make_job,
    pod,
    present,
    running,
    status_in,
)

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


class Lists:
    """Answers the lists of an otherwise empty cluster, or raises `failure`."""

    def __init__(self) -> None:
        self.failure: ClusterError | None = None
        self.jobs: list[dict[str, object]] = [
            {"metadata": {"namespace": "team", "name": "a", "uid": "u", "resourceVersion": "1"}}
        ]

    async def pages(
        self, kind: Kind, namespace: str | None, read: Callable[[dict[str, object]], Any]
    ) -> AsyncIterator[list[Any]]:
        yield [read(body) for body in self.jobs] if kind == "qlorajobs" else []

    async def list_versions(self, kind: Kind, namespace: str | None) -> tuple[list[ObjectVersion], str]:
        await self.check_list(kind, namespace)
        return [object_version(kind, body) for body in self.jobs] if kind == "qlorajobs" else [], "9"

    async def check_list(self, kind: str, namespace: str | None) -> None:
        if self.failure is not None:
            raise self.failure


def test_a_denied_namespace_leaves_the_others_alone_and_comes_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class TwoNamespaces(Lists):
        denied = False

        async def list_versions(self, kind: Kind, namespace: str | None) -> tuple[list[ObjectVersion], str]:
            await self.check_list(kind, namespace)
            body = {"metadata": {"namespace": namespace, "name": "a", "uid": f"u-{namespace}", "resourceVersion": "1"}}
            return [object_version(kind, body)] if kind == "qlorajobs" else [], "9"

        async def check_list(self, kind: str, namespace: str | None) -> None:
            if self.denied and namespace == "lost":
                raise RejectedError("forbidden")

    loop = VirtualLoop()
    lists = TwoNamespaces()
    asked: list[Any] = []
    changes: list[tuple[str | None, bool]] = []
    resync = Resync(
        lists,  # type: ignore[arg-type]
        ("kept", "lost"),
        lambda key, after: asked.append(key),
        store=Store(),
        interval=300,
        monotonic=loop.time,
        on_access=lambda namespace, denied: changes.append((namespace, denied)),
    )

    async def scenario() -> None:
        task = asyncio.create_task(resync.run())
        for namespace in ("kept", "lost"):
            resync.monitor.show(("qlorajobs", namespace, "a", f"u-{namespace}"), "1", deleted=False)
        lists.denied = True
        await asyncio.sleep(700)
        assert ("kept", "a") in asked
        assert ("lost", "a") not in asked
        assert "lost" in (resync.note() or "")
        assert changes[-2:] == [("kept", False), ("lost", True)]
        assert resync.problem() is None
        lists.denied = False
        await asyncio.sleep(41)
        assert ("lost", "a") in asked
        assert resync.note() is None
        task.cancel()

    loop.run_until_complete(scenario())
    loop.close()
    assert sum("namespace lost cannot be listed" in record.message for record in caplog.records) == 1


def test_a_recreated_definition_needs_a_new_watch() -> None:
    loop = VirtualLoop()
    lists = Lists()
    resync = Resync(lists, (), lambda _key, _after: None, store=Store(), interval=300, monotonic=loop.time)  # type: ignore[arg-type]

    async def scenario() -> None:
        task = asyncio.create_task(resync.run())
        lists.failure = NotFoundError("none")
        await asyncio.sleep(90)
        assert "CustomResourceDefinition" in (resync.problem() or "")
        assert resync.monitor.dead == ()
        lists.failure = None
        await asyncio.sleep(30)
        assert resync.monitor.dead == ("qlorajobs",)
        resync.monitor.start_again()
        assert resync.problem() is None
        task.cancel()

    loop.run_until_complete(scenario())
    loop.close()


@pytest.mark.parametrize(
    ("failure", "after_a_minute_and_a_half", "after_an_hour"),
    [
        (None, None, None),
        (RejectedError("forbidden"), "denies", "denies"),
        (ClusterError("connection refused"), "no list has succeeded", "no list has succeeded"),
    ],
    ids=["well", "denied", "unreachable"],
)
def test_lost_rights_and_a_lost_server_are_distinguished(
    failure: ClusterError | None, after_a_minute_and_a_half: str | None, after_an_hour: str | None
) -> None:
    loop = VirtualLoop()
    lists = Lists()
    asked: list[Any] = []
    resync = Resync(lists, (), lambda key, after: asked.append(key), store=Store(), interval=300, monotonic=loop.time)  # type: ignore[arg-type]

    def says(words: str | None) -> bool:
        problem = resync.problem()
        return problem is None if words is None else words in (problem or "")

    async def scenario() -> None:
        task = asyncio.create_task(resync.run())
        resync.monitor.show(JOB, "1", deleted=False)
        await asyncio.sleep(400)
        assert ("team", "a") in asked
        lists.failure = failure
        await asyncio.sleep(90)
        assert says(after_a_minute_and_a_half)
        await asyncio.sleep(3600)
        assert says(after_an_hour)
        lists.failure = None
        await asyncio.sleep(60)
        assert resync.problem() is None
        task.cancel()

    loop.run_until_complete(scenario())
    loop.close()


def test_a_deletion_during_the_start_of_the_watches_is_noticed_soon_after() -> None:
    loop = VirtualLoop()
    lists, store = Lists(), Store()
    body: dict[str, Any] = job_body()
    lists.jobs = [body]
    asked: list[Any] = []
    resync = Resync(lists, (), lambda key, _: asked.append(key), store=store, interval=300, monotonic=loop.time)  # type: ignore[arg-type]

    async def scenario() -> None:
        await resync.fill()
        assert asked == [("team", NAME)]
        lists.jobs = []
        task = asyncio.create_task(resync.run())
        await asyncio.sleep(30)
        assert (store.held(("team", NAME)), asked) == (None, [("team", NAME)] * 2)
        task.cancel()

    loop.run_until_complete(scenario())
    loop.close()


def test_a_job_missing_from_a_list_is_requeued_although_the_next_list_fails() -> None:
    class FirstListOnly(Lists):
        async def list_versions(self, kind: Kind, namespace: str | None) -> tuple[list[ObjectVersion], str]:
            if kind != "qlorajobs":
                raise UnavailableError("connection refused")
            return [ObjectVersion("team", "busy", "uid-of-busy", "5", "uid-of-busy", "busy")], "9"

    store = Store()
    store.job_changed(job_body())
    busy = job_body()
    store.job_changed(busy | {"metadata": busy["metadata"] | {"name": "busy", "uid": "uid-of-busy"}})
    asked: list[Any] = []
    resync = Resync(
        FirstListOnly(),  # type: ignore[arg-type]
        (),
        lambda key, _: asked.append(key),
        store=store,
        interval=300,
        monotonic=lambda: 0.0,
    )
    with pytest.raises(UnavailableError):
        asyncio.run(resync.once())
    # And no other: all of them, each time that a list fails, would be more load while there is too much.
    assert asked == [("team", NAME)]


def test_a_watch_that_shows_nothing_is_reported_at_the_second_list() -> None:
    loop = VirtualLoop()
    resync = Resync(Lists(), (), lambda _key, _after: None, store=Store(), interval=300, monotonic=loop.time)  # type: ignore[arg-type]

    async def scenario() -> None:
        task = asyncio.create_task(resync.run())
        await asyncio.sleep(400)
        assert resync.problem() is None
        await asyncio.sleep(300)
        assert resync.problem() == "the watch of qlorajobs is dead"
        resync.monitor.show(JOB, "1", deleted=False)
        await asyncio.sleep(400)
        assert resync.problem() is None
        task.cancel()

    loop.run_until_complete(scenario())
    loop.close()


def test_at_the_start_unfinished_jobs_are_requested_before_ended_ones() -> None:
    lists, asked = Lists(), list[tuple[str, float]]()
    lists.jobs = [
        {
            "metadata": {"namespace": "team", "name": name, "uid": name, "resourceVersion": "1"},
            "status": {"phase": phase},
        }
        for name, phase in (("a", "Succeeded"), ("b", "Training"), ("c", "Failed"), ("d", "Queued"))
    ]
    enqueue = lambda key, after: asked.append((key[1], after))  # noqa: E731
    resync = Resync(lists, (), enqueue, store=Store(), interval=300, monotonic=lambda: 0.0)  # type: ignore[arg-type]
    asyncio.run(resync.fill())
    assert asked == [("b", 0.0), ("d", 0.0), ("a", 0.0), ("c", 0.01)]


@pytest.mark.parametrize(("jobs", "last"), [(2, 1.01), (5000, 50.99), (50_000, 150.997)])
def test_a_resync_of_many_jobs_is_spread_over_at_most_half_of_its_interval(jobs: int, last: float) -> None:
    lists = Lists()
    lists.jobs = [
        {"metadata": {"namespace": "team", "name": f"job-{n}", "uid": f"u{n}", "resourceVersion": "1"}}
        for n in range(jobs)
    ]
    asked: list[float] = []
    store = Store()
    for body in lists.jobs:
        store.job_changed(body)
    resync = Resync(lists, (), lambda key, after: asked.append(after), store=store, interval=300, monotonic=lambda: 0.0)  # type: ignore[arg-type]
    asyncio.run(resync.once())
    assert (len(asked), asked[0]) == (jobs, 1.0)
    assert max(asked) == pytest.approx(last)


def test_a_change_of_phase_is_an_event_whose_name_is_the_same_after_a_restart() -> None:
    job = make_job(status_in("train", phase="Queued"))
    bodies = [child("train"), running(pod("train"))]
    event = present(phase_event(job, follow(job, *bodies), NOW))
    assert (event["type"], event["reason"]) == ("Normal", "Training")
    assert (event["involvedObject"]["kind"], event["involvedObject"]["uid"]) == ("QLoRAJob", UID)
    later = present(phase_event(job, follow(job, *bodies, now=after(60)), after(60)))
    assert later["metadata"] == event["metadata"]


def test_the_event_of_a_failure_is_a_warning_with_the_reason() -> None:
    job = make_job(status_in("prepare", phase="Preparing"))
    status = follow(
        job, child("prepare", Failed="PodFailurePolicy"), failed("prepare", 11, "BadDataset", "row 3 is cut")
    )
    event = present(phase_event(job, status, NOW))
    assert (event["type"], event["reason"], event["message"]) == ("Warning", "BadDataset", "row 3 is cut")


def test_without_a_change_of_phase_no_event_is_created() -> None:
    stored = follow(make_job(status_in("train")), child("train"), running(pod("train")))
    assert phase_event(make_job(stored), stored, NOW) is None
