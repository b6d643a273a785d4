"""The queue: one worker per key, merged requests, backoff. Time is virtual."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import MagicMock

import pytest

from qlora_operator import __main__ as operator
from qlora_operator.keys import Key
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.probes import Health
from qlora_operator.reconcile.queue import RetryError, Schedule, WorkQueue
from qlora_operator.settings import Settings
from tests.support.builders import VirtualLoop, present

A: Key = ("team", "a")
B: Key = ("team", "b")


def test_keys_come_in_order_of_their_due_time() -> None:
    schedule = Schedule()
    schedule.add(B, 2)
    schedule.add(A, 1)
    assert schedule.next_due() == 1
    assert [schedule.take(0.5), schedule.take(5), schedule.take(5), schedule.take(5)] == [None, A, B, None]


def test_a_namespace_with_thousands_of_keys_delays_no_other() -> None:
    schedule = Schedule()
    for number in range(5000):
        schedule.add(("flood", f"{number:04}"), 0)
    assert [schedule.take(1), schedule.take(1)] == [("flood", "0000"), ("flood", "0001")]
    for name in ("a", "b"):
        schedule.add((name, "first"), 1)
        schedule.add((name, "second"), 1)
    taken = [schedule.take(1) for _ in range(9)]
    assert [key[0] for key in taken if key] == ["flood", "a", "b", "flood", "a", "b", "flood", "flood", "flood"]


def test_a_busy_namespace_gets_no_more_than_its_turns() -> None:
    schedule = Schedule()
    for number in range(10):
        schedule.add(("patient", str(number)), 0)
    served = []
    for _ in range(10):
        schedule.add(("eager", "one"), 0)
        key = present(schedule.take(0))
        served.append(key[0])
        schedule.done(key, None)
    assert served.count("patient") == 5


def test_a_namespace_does_not_occupy_the_last_workers() -> None:
    schedule = Schedule(reserved=2, most=6)
    for number in range(100):
        schedule.add(("flood", str(number)), 0, first=True)
        schedule.add(("flood", f"later {number}"), 0)
    taken = [key for _ in range(8) if (key := schedule.take(1))]
    assert (len(taken), schedule.next_due()) == (6, None), "it takes all that are there, or nothing waits for its end"
    schedule.add(("neighbor", "one"), 1, first=True)
    schedule.add(("neighbor", "two"), 1)
    assert {schedule.take(1), schedule.take(1)} == {("neighbor", "one"), ("neighbor", "two")}
    assert schedule.take(1) is None
    schedule.done(taken[0], None)
    assert schedule.next_due() == 0
    assert present(schedule.take(1))[0] == "flood"


@pytest.mark.parametrize(("namespaces", "together"), [((), 14), (("flood",), 16), (("flood", "neighbor"), 14)])
def test_the_only_namespace_that_is_served_may_occupy_every_worker(
    namespaces: tuple[str, ...], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator makes the queue from its settings, with the default workers."""
    made: list[dict[str, Any]] = []

    def make(_: object, **options: Any) -> WorkQueue:
        made.append(options)
        raise asyncio.CancelledError

    monkeypatch.setattr(operator, "WorkQueue", make)
    settings = Settings(namespaces=namespaces)
    started = operator.Operator(settings, None, MagicMock(), Metrics(), Health(), operator.Signals())
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(started._work())
    begun: list[Key] = []

    async def work(key: Key) -> None:
        begun.append(key)
        await asyncio.sleep(1000)

    async def during(queue: WorkQueue) -> None:
        for number in range(50):
            queue.add(("flood", str(number)))
        await asyncio.sleep(1)

    (options,) = made
    drive(work, during, workers=options["workers"], namespaces=options["namespaces"])
    assert len(begun) == together


@pytest.mark.parametrize(("workers", "together"), [(1, 1), (4, 4), (8, 7), (16, 14)])
def test_a_neighbor_begins_while_everything_of_a_flood_is_stuck(workers: int, together: int) -> None:
    begun: list[Key] = []

    async def work(key: Key) -> None:
        begun.append(key)
        if key[0] == "flood":
            await asyncio.sleep(1000)

    async def during(queue: WorkQueue) -> None:
        for number in range(50):
            queue.add(("flood", str(number)), first=True)
        await asyncio.sleep(1)
        assert len(begun) == together
        queue.add(("neighbor", "a"), first=True)
        await asyncio.sleep(1)
        assert (("neighbor", "a") in begun) == (together < workers)

    drive(work, during, workers=workers)


def test_many_requests_for_a_key_are_one_and_the_earliest_counts() -> None:
    schedule = Schedule()
    for due in (5, 3, 9):
        schedule.add(A, due)
    assert (schedule.take(2), schedule.take(3), schedule.take(100)) == (None, A, None)


def test_after_the_work_the_earlier_of_request_and_plan_counts() -> None:
    schedule = Schedule()
    schedule.add(A, 0)
    assert schedule.take(0) == A
    schedule.add(A, 7)
    schedule.done(A, 4)
    assert schedule.next_due() == 4
    assert schedule.take(4) == A
    schedule.done(A, None)
    assert schedule.next_due() is None


def test_the_backoff_doubles_up_to_a_bound_and_success_resets_it() -> None:
    schedule = Schedule()
    pauses = []
    now = 0.0
    for _ in range(11):
        schedule.add(A, now)
        assert schedule.take(now) == A
        pauses.append(schedule.failed(A, now))
        now += pauses[-1]
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert schedule.take(now) == A
    schedule.done(A, now)
    assert schedule.take(now) == A
    assert schedule.failed(A, now) == 1


def test_an_event_ends_the_backoff_after_a_failure() -> None:
    schedule = Schedule()
    schedule.add(A, 0)
    schedule.take(0)
    schedule.failed(A, 0)
    schedule.add(A, 0.5)
    assert schedule.take(0.5) == A


def test_a_request_during_a_failing_attempt_is_served_by_its_retry_only() -> None:
    schedule = Schedule()
    schedule.add(A, 0)
    schedule.take(0)
    schedule.add(A, 5)
    assert schedule.failed(A, 0) == 1
    assert schedule.take(1) == A
    schedule.done(A, None)
    assert schedule.next_due() is None


def test_a_request_made_during_an_attempt_that_fails_shortens_a_long_pause() -> None:
    schedule = Schedule()
    now = 0.0
    for _ in range(9):
        schedule.add(A, now)
        schedule.take(now)
        now += schedule.failed(A, now)
    assert schedule.take(now) == A
    schedule.add(A, now)
    assert schedule.failed(A, now) == 1
    assert schedule.take(now + 1) == A
    assert schedule.failed(A, now + 1) == 300


def test_new_jobs_come_first_and_some_workers_are_kept_for_the_rest() -> None:
    schedule = Schedule(reserved=1)
    rest, new = [("team", f"old-{n}") for n in range(3)], [("team", f"new-{n}") for n in range(8)]
    for key in rest:
        schedule.add(key, 0)
    for key in new:
        schedule.add(key, 1, first=True)
    assert [schedule.take(1) for _ in range(4)] == [rest[0], *new[:3]]
    schedule.done(rest[0], None)
    schedule.failed(new[0], 1)
    assert [schedule.take(1) for _ in range(3)] == [rest[1], *new[3:5]]
    assert [schedule.take(1) for _ in range(5)] == [*new[5:], rest[2], None]


def test_a_waiting_key_that_becomes_urgent_goes_first_once() -> None:
    schedule = Schedule(reserved=0)
    schedule.add(A, 0)
    schedule.add(B, 0)
    schedule.add(B, 0, first=True)
    assert [schedule.take(0), schedule.take(0), schedule.take(0)] == [B, A, None]


def test_requests_that_were_replaced_are_not_kept() -> None:
    schedule = Schedule()
    keys = [("team", f"job-{n}") for n in range(100)]
    for round_ in range(100):
        for key in keys:
            schedule.add(key, 100_000 - round_)
    assert schedule.entries <= 300
    assert [schedule.take(99_901) for _ in range(101)] == [*sorted(keys), None]


def test_depth_counts_due_keys() -> None:
    schedule = Schedule()
    schedule.add(A, 0)
    schedule.add(B, 10)
    assert (schedule.depth(0), schedule.depth(10)) == (1, 2)


def drive(
    work: Callable[[Key], Awaitable[float | None]],
    during: Callable[[WorkQueue], Awaitable[None]],
    *,
    on_error: Callable[[], None] = lambda: None,
    workers: int = 2,
    namespaces: tuple[str, ...] = (),
    on_look: Callable[[], None] = lambda: None,
) -> None:
    """Run a queue on virtual time while `during` runs. `on_look`: called when it reads its clock."""
    loop = VirtualLoop()

    def clock() -> float:
        on_look()
        return loop.time()

    async def scenario() -> None:
        queue = WorkQueue(work, monotonic=clock, workers=workers, namespaces=namespaces, on_error=on_error)
        task = asyncio.create_task(queue.run())
        await during(queue)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    try:
        loop.run_until_complete(scenario())
    finally:
        loop.close()


def test_a_key_runs_alone_while_other_keys_run_in_parallel() -> None:
    now: set[Key] = set()
    together: list[frozenset[Key]] = []

    async def work(key: Key) -> None:
        assert key not in now
        now.add(key)
        together.append(frozenset(now))
        await asyncio.sleep(1)
        now.discard(key)

    async def during(queue: WorkQueue) -> None:
        for key in (A, B, A, B, A):
            queue.add(key)
            await asyncio.sleep(0.1)
        await asyncio.sleep(10)

    drive(work, during)
    assert frozenset({A, B}) in together
    assert len(together) == 4


def test_the_cost_of_a_pass_does_not_grow_with_idle_workers() -> None:
    looks, passes = Counter[str](), 100

    async def work(key: Key) -> None:
        looks["passes"] += 1

    async def during(queue: WorkQueue) -> None:
        for number in range(passes):
            queue.add((f"namespace{number}", "job"), number)
        await asyncio.sleep(passes)

    drive(work, during, workers=64, on_look=lambda: looks.update(["looks"]))
    assert looks["passes"] == passes
    assert looks["looks"] < 10 * passes


def test_while_paused_no_work_begins_and_no_request_is_lost() -> None:
    done: list[Key] = []

    async def work(key: Key) -> None:
        await asyncio.sleep(1)
        done.append(key)

    async def during(queue: WorkQueue) -> None:
        queue.add(A)
        await asyncio.sleep(0.5)
        queue.pause(True)
        queue.add(B)
        await asyncio.sleep(10_000)
        assert done == [A], "what had begun ends, and nothing begins"
        queue.pause(False)
        await asyncio.sleep(2)

    drive(work, during)
    assert done == [A, B]


def test_the_work_decides_when_the_key_is_due_again() -> None:
    seen: list[float] = []

    async def work(key: Key) -> float | None:
        seen.append(asyncio.get_running_loop().time())
        return 3600.0 if len(seen) < 4 else None

    async def during(queue: WorkQueue) -> None:
        queue.add(A)
        await asyncio.sleep(100_000)

    drive(work, during)
    assert seen == pytest.approx([0, 3600, 7200, 10_800])


@pytest.mark.parametrize(("workers", "both"), [(1, False), (2, True), (16, True)])
def test_a_new_job_never_waits_for_all_others_and_a_single_worker_takes_it_first(workers: int, both: bool) -> None:
    started: list[Key] = []

    async def work(key: Key) -> None:
        started.append(key)
        await asyncio.sleep(1000)

    async def during(queue: WorkQueue) -> None:
        for number in range(20):
            queue.add(("team", f"old-{number}"))
            queue.add(("team", f"new-{number}"), first=True)
        await asyncio.sleep(1)

    drive(work, during, workers=workers)
    kinds = {name.partition("-")[0] for _, name in started}
    assert kinds == ({"old", "new"} if both else {"new"})
    assert sum(name.startswith("new") for _, name in started) >= workers / 2


def test_failures_of_one_key_do_not_delay_another() -> None:
    seen: list[tuple[Key, float]] = []
    errors: list[None] = []

    async def work(key: Key) -> None:
        seen.append((key, asyncio.get_running_loop().time()))
        if key == A:
            raise ValueError("broken")

    async def during(queue: WorkQueue) -> None:
        queue.add(A)
        queue.add(B)
        await asyncio.sleep(8)
        queue.add(B)
        await asyncio.sleep(1)

    drive(work, during, on_error=lambda: errors.append(None))
    assert [moment for key, moment in seen if key == A] == pytest.approx([0, 1, 3, 7])
    assert [moment for key, moment in seen if key == B] == pytest.approx([0, 8])
    assert len(errors) == 4


def test_an_expected_failure_is_retried_without_an_error() -> None:
    seen: list[float] = []
    errors: list[None] = []

    async def work(key: Key) -> None:
        seen.append(asyncio.get_running_loop().time())
        if len(seen) < 3:
            raise RetryError("changed meanwhile")

    async def during(queue: WorkQueue) -> None:
        queue.add(A)
        await asyncio.sleep(1000)

    drive(work, during, on_error=lambda: errors.append(None))
    assert seen == pytest.approx([0, 1, 3])
    assert errors == []
