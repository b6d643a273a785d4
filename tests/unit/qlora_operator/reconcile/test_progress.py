"""Progress from logs: which lines count, and how often a log is read."""

import asyncio
import heapq
import json
import random
from collections import Counter

import pytest

from qlora_api.contract import ProgressRecord, encode_record
from qlora_operator.decisions.observed.objects import Pod
from qlora_operator.reconcile.progress import (
    SECONDS_AFTER_FAILURE,
    LogReading,
    ProgressReader,
    ReadSchedule,
    latest_record,
)
from qlora_operator.settings import READS_PER_SECOND
from tests.support.builders import NAME, NOW, UID, child, make_job, pod, present, progress, running, seen, status_in

POD = Pod(name="pod", uid=f"uid-{NAME}-train-1-pod1", owner_uid="", created=NOW, phase="Running")


def line(**fields: object) -> str:
    return encode_record(progress(**fields))


def raw(**fields: object) -> str:
    return json.dumps(progress().dump() | fields)


def latest(*lines: str) -> ProgressRecord | None:
    return latest_record("\n".join(lines), UID, POD, "train")


def test_the_last_record_counts_among_any_other_lines() -> None:
    found = present(
        latest("noise", line(training_step=1), "{}", line(training_step=2), "Traceback", '{"kind": "result"}', "")
    )
    assert found.training_step == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not a record",
        line(job_uid="another"),
        line(pod_uid="another"),
        line(step="prepare"),
        line(training_step=5)[:-3],
        raw(loss="NaN"),
        raw(loss=float("nan")),
        raw(trainingStep=-1),
        raw(trainingStep=2**60),
        raw(epoch=1e12),
        raw(peakMemoryBytes=2**60),
        raw(time="yesterday"),
        raw(time="2026-01-02T12:00:00"),
        raw(time="2026-W01-5T12:00:00Z"),
        raw(time="2026-02-30T12:00:00Z"),
        raw(checkpointTime="soon"),
        raw(remainingSeconds=1e300),
        raw(activity="x" * 5000),
    ],
)
def test_a_line_that_a_status_cannot_hold_is_no_record(text: str) -> None:
    assert latest(text) is None
    assert present(latest(line(training_step=1), text)).training_step == 1


def test_one_job_is_read_every_ten_seconds() -> None:
    schedule = ReadSchedule()
    assert schedule.seconds_until_due(("team", "a"), 100.0) == 0
    assert schedule.done(("team", "a"), 100.0) == pytest.approx(10)
    assert schedule.seconds_until_due(("team", "a"), 104.0) == pytest.approx(6)
    assert schedule.seconds_until_due(("team", "a"), 110.0) == 0


@pytest.mark.parametrize(("jobs", "seconds"), [(200, 10), (1000, 10), (2000, 16), (4000, 32)])
def test_each_job_is_read_as_often_as_the_budget_allows_and_never_beyond_it(jobs: int, seconds: int) -> None:
    """A worker begins a read up to a second after it is due, which lasts up to a second."""
    schedule, delays = ReadSchedule(), random.Random(7)
    due = [(schedule.seconds_until_due(("team", f"job{number}"), 0.0), f"job{number}") for number in range(jobs)]
    heapq.heapify(due)
    per_second, last, longest = Counter[int](), dict[str, float](), 0.0
    while (moment := due[0][0]) < 5 * seconds:
        _, name = heapq.heappop(due)
        per_second[int(moment + 1e-6)] += 1
        read = moment + delays.uniform(0, 2)
        longest = max(longest, read - last.get(name, read))
        last[name] = read
        heapq.heappush(due, (read + schedule.done(("team", name), read), name))
    assert max(per_second.values()) <= READS_PER_SECOND
    assert max(per_second.values()) <= max(20, jobs / 8), "spread, not in bursts of the whole budget"
    assert len(last) == jobs
    assert seconds <= longest <= seconds + 4


def test_a_job_that_finds_no_reader_free_keeps_its_place_for_a_moment() -> None:
    """All places of the next 16 seconds are taken: it would wait for that long."""
    schedule, key = ReadSchedule(), ("team", "job0")
    for number in range(2000):
        schedule.seconds_until_due(("team", f"job{number}"), 0.0)
    assert [schedule.put_off(key, seconds) for seconds in (0.0, 1.0, 2.0)] == [1.0, 1.0, 1.0]
    assert schedule.seconds_until_due(key, 3.0) == 0
    assert schedule.put_off(key, 3.0) == pytest.approx(13)


def test_unreadable_logs_delay_no_other_job() -> None:
    schedule = ReadSchedule()
    for number in range(10):
        schedule.seconds_until_due(("attacker", f"job{number}"), 0.0)
        schedule.done(("attacker", f"job{number}"), 0.0, pause=SECONDS_AFTER_FAILURE)
    assert schedule.seconds_until_due(("team", "a"), 0.0) < 1
    assert schedule.done(("team", "a"), 1.0) == pytest.approx(10)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_reader_reads_when_it_is_due_and_only_a_running_pod() -> None:
    asked: list[tuple[str, str]] = []
    clock = Clock()

    async def read_log(namespace: str, name: str) -> str:
        asked.append((namespace, name))
        return line(training_step=len(asked))

    async def scenario() -> None:
        reader = ProgressReader(read_log, clock, concurrent=2)
        job = make_job(status_in("train"))
        key = (job.namespace, job.name)
        pending, active = seen(child("train"), pod("train")), seen(child("train"), running(pod("train")))
        assert await reader.read(key, job, pending) == LogReading()
        reading = await reader.read(key, job, active)
        record, wait = reading.record, reading.again
        assert reading.done
        assert (record and record.training_step, wait) == (1, pytest.approx(10))
        clock.now = 4.0
        assert (await reader.read(key, job, active)).again == pytest.approx(6)
        clock.now = 10.0
        assert present((await reader.read(key, job, active)).record).training_step == 2

    asyncio.run(scenario())
    assert asked == [("team", f"{NAME}-train-1-pod1")] * 2


def test_an_unreadable_log_is_no_error_and_is_retried_after_a_minute() -> None:
    async def read_log(namespace: str, name: str) -> None:
        return None

    async def scenario() -> None:
        reader = ProgressReader(read_log, Clock(), concurrent=2)
        job = make_job(status_in("train"))
        active = seen(child("train"), running(pod("train")))
        assert (await reader.read((job.namespace, job.name), job, active)).again == pytest.approx(60)

    asyncio.run(scenario())


def test_a_node_that_does_not_answer_holds_up_some_readers_only() -> None:
    answer = asyncio.Event()
    asked: list[str] = []

    async def read_log(namespace: str, name: str) -> str:
        asked.append(name)
        await answer.wait()
        return ""

    async def scenario() -> None:
        clock = Clock()
        reader = ProgressReader(read_log, clock, concurrent=2)
        job = make_job(status_in("train"))
        active = seen(child("train"), running(pod("train")))
        stuck = []
        for name in ("first", "second"):
            stuck.append(asyncio.create_task(reader.read(("team", name), job, active)))
            await asyncio.sleep(0)
            clock.now += 1
        assert (await reader.read(("team", "third"), job, active)).again == pytest.approx(1)
        assert len(asked) == 2
        answer.set()
        await asyncio.gather(*stuck)
        clock.now += 1
        await reader.read(("team", "third"), job, active)
        assert len(asked) == 3

    asyncio.run(scenario())
