"""Progress from logs: which lines count, and how often a log is read."""

import asyncio
import heapq
import json
import random
from collections import Counter
from functools import partial

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
from tests.support.builders import (
    NAME,
    NOW,
    UID,
    child,
    make_job,
    pod,
    present,
    progress,
    running,
    seen,
    status_in,
    time,
)

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


def test_unreadable_logs_delay_no_other_job() -> None:
    schedule = ReadSchedule()
    for number in range(10):
        schedule.seconds_until_due(("attacker", f"job{number}"), 0.0)
        schedule.done(("attacker", f"job{number}"), 0.0, pause=SECONDS_AFTER_FAILURE)
    assert schedule.seconds_until_due(("team", "a"), 0.0) < 1
    assert schedule.done(("team", "a"), 1.0) == pytest.approx(10)


def unwanted() -> None:
    raise AssertionError("a reader is free")


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
        assert await reader.read(key, job, pending, unwanted) == LogReading()
        reading = await reader.read(key, job, active, unwanted)
        record, wait = reading.record, reading.again
        assert reading.done
        assert (record and record.training_step, wait) == (1, pytest.approx(10))
        clock.now = 4.0
        assert (await reader.read(key, job, active, unwanted)).again == pytest.approx(6)
        clock.now = 10.0
        assert present((await reader.read(key, job, active, unwanted)).record).training_step == 2

    asyncio.run(scenario())
    assert asked == [("team", f"{NAME}-train-1-pod1")] * 2


def test_an_unreadable_log_is_no_error_and_is_retried_after_a_minute() -> None:
    async def read_log(namespace: str, name: str) -> None:
        return None

    async def scenario() -> None:
        reader = ProgressReader(read_log, Clock(), concurrent=2)
        job = make_job(status_in("train"))
        active = seen(child("train"), running(pod("train")))
        assert (await reader.read((job.namespace, job.name), job, active, unwanted)).again == pytest.approx(60)

    asyncio.run(scenario())


def test_jobs_that_find_no_reader_free_are_read_in_their_order() -> None:
    """A node that does not answer holds up its readers, and no worker."""
    answer = asyncio.Event()
    asked: list[str] = []
    enqueued: list[str] = []

    async def read_log(namespace: str, name: str) -> str:
        await answer.wait()
        return ""

    async def scenario() -> None:
        clock = Clock()
        reader = ProgressReader(read_log, clock, concurrent=2)
        job = make_job(status_in("train"))
        active = seen(child("train"), running(pod("train")))

        async def passes_over(name: str) -> LogReading:
            clock.now += 1
            reading = await reader.read(("team", name), job, active, partial(enqueued.append, name))
            asked.extend([name] if reading.done else [])
            return reading

        stuck = [asyncio.create_task(passes_over(name)) for name in ("job1", "job2")]
        await asyncio.sleep(0)
        for name in ("job3", "job4", "job5", "job3"):
            assert (await passes_over(name)).again == pytest.approx(60)
        reader.forget(("team", "job4"))
        assert enqueued == []
        answer.set()
        await asyncio.gather(*stuck)
        assert enqueued == ["job3", "job5"]
        assert (await passes_over("job6")).again == pytest.approx(60), "both readers are for jobs before it"
        await passes_over("job5")
        await passes_over("job6")
        assert asked == ["job1", "job2", "job5", "job6"]
        clock.now += 3  # job3 ended before it came: its turn is over
        assert [(await passes_over(name)).done for name in ("job7", "job8")] == [True, True]

    asyncio.run(scenario())


def test_figures_of_many_jobs_are_not_stored_in_the_same_round_of_reads() -> None:
    """A write costs the API server more than a read: all in one round would delay the reads of that round."""
    clock, stored = Clock(), dict.fromkeys((("team", f"job{number}") for number in range(600)), 0.0)

    async def read_log(namespace: str, name: str) -> str:
        return line(time=time(int(clock.now)))

    async def scenario() -> list[int]:
        reader = ProgressReader(read_log, clock, concurrent=8)
        job, active = make_job(status_in("train")), seen(child("train"), running(pod("train")))
        writes = []
        for seconds in range(0, 100, 10):
            for key in stored:
                reader._schedule._due[key] = clock.now = float(seconds)
            ages = {key: (await reader.read(key, job, active, unwanted)).rest for key in stored}
            written = [key for key, age in ages.items() if clock.now - stored[key] >= age]
            stored.update(dict.fromkeys(written, clock.now))
            writes.append(len(written))
        return writes

    writes = asyncio.run(scenario())[1:]
    assert max(writes) < 300, "of 600, in a period of 30 seconds with three rounds"
    assert sum(writes) >= 1200, "and each has its turn"
