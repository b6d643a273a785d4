"""The usage only grows and counts each pod once, in any order of observations."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.contract import ProgressRecord
from qlora_api.usage import UsageStatus
from qlora_operator.decisions.usage.usage import count_usage
from tests.support.builders import (
    after,
    child,
    ended,
    facts,
    make_job,
    pod,
    progress,
    running,
    status_in,
    stored_again,
    time,
)
from tests.support.cluster.train_pods import created, scheduled, usage_of

_MOMENTS = st.integers(0, 400)
_LIVES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 60), st.sampled_from([0, 137, 143, 203])), min_size=1, max_size=12
)
"""Pods one after the other: seconds until each has its node, seconds that it runs, and its exit code."""


_NEWS = st.none() | st.integers(0, 60)
"""For how many seconds the newest pod has trained by its report; None without one."""


def trains_since(body: dict[str, Any], since: float, now: float) -> ProgressRecord:
    """The pod's report then."""
    uid = body["metadata"]["uid"]
    return progress(pod_uid=uid, training_step=3, total_steps=9, training_since=time(since), time=time(now))


def as_at(lives: list[tuple[int, int, int]], moment: int) -> list[dict[str, Any]]:
    """The pods at that moment, including ended ones."""
    bodies, created = [], 0
    for number, (waits, runs, code) in enumerate(lives, 1):
        start, end = created + waits, created + waits + runs
        if created > moment:
            break
        body = pod("train", 1, number)
        body = body | {"metadata": body["metadata"] | {"creationTimestamp": time(created)}}
        if moment >= start:
            body = scheduled(body, start)
            body = ended(body, code, start=start, end=end) if moment >= end else running(body, since=start)
        bodies.append(body)
        created = end + 1
    return bodies


@settings(max_examples=60, deadline=None)
@given(lives=_LIVES, looks=st.lists(st.tuples(_MOMENTS, st.integers(0, 2**12 - 1), _NEWS), max_size=12))
def test_usage_never_decreases_and_never_counts_twice(
    lives: list[tuple[int, int, int]], looks: list[tuple[int, int, int | None]]
) -> None:
    """Watches lose changes or show them late: in any order, with pods missing."""
    whole = sum(runs for _, runs, _ in lives)
    status, highest = status_in("train"), 0
    for moment, shown, news in looks:
        bodies = [body for number, body in enumerate(as_at(lives, moment)) if shown >> number & 1]
        report = None if news is None or not bodies else trains_since(bodies[-1], moment - news, moment)
        found = facts(make_job(status), child("train", created=-900), *bodies, now=after(moment), progress=report)
        status = stored_again(count_usage(status, found, until_now=news is not None))
        usage = status.usage or UsageStatus()
        # A pod that is not seen ending is taken to have run until then, or until the next one was created.
        assert highest <= usage.gpu_seconds <= whole + 400
        assert usage.lost_gpu_seconds.total <= usage.gpu_seconds
        assert len(usage.pods) <= 14
        assert all(entry.startup_seconds + entry.lost_seconds <= entry.seconds for entry in usage.pods)
        highest = usage.gpu_seconds


@settings(max_examples=60, deadline=None)
@given(lives=_LIVES, moments=st.lists(_MOMENTS, max_size=10), news=st.booleans())
def test_in_the_end_each_pod_has_counted_once(
    lives: list[tuple[int, int, int]], moments: list[int], news: bool
) -> None:
    status = status_in("train")
    for moment in [*moments, 10_000, 10_001]:
        found = facts(make_job(status), child("train", created=-900), *as_at(lives, moment), now=after(moment))
        status = count_usage(status, found, until_now=news)
    found = facts(make_job(status), child("train", Complete="Done"), *as_at(lives, 10_000), now=after(10_000))
    status = count_usage(status, found)
    assert usage_of(status).gpu_seconds == sum(runs for _, runs, _ in lives)


@settings(max_examples=60, deadline=None)
@given(
    lives=st.lists(st.tuples(_MOMENTS, st.integers(0, 300), st.integers(1, 60)), min_size=12, max_size=40),
    moments=st.lists(st.integers(0, 800), max_size=10).map(sorted),
)
def test_pods_that_wait_and_run_at_the_same_time_count_once_each(
    lives: list[tuple[int, int, int]], moments: list[int]
) -> None:
    """Pods are created, wait and run at any moment, more than the status lists."""

    def at(moment: int) -> list[dict[str, Any]]:
        bodies = []
        for number, (made, waits, runs) in enumerate(lives):
            if made > moment:
                continue
            body, start, end = created(pod("train", 1, number), made), made + waits, made + waits + runs
            if moment >= start:
                body = scheduled(body, start)
                body = ended(body, 137, start=start, end=end) if moment >= end else running(body, since=start)
            bodies.append(body)
        return bodies

    status, job = status_in("train"), child("train", created=-900)
    for moment in [*moments, 10_000, 10_001]:
        found = facts(make_job(status), job, *at(moment), now=after(moment))
        status = stored_again(count_usage(status, found))
    assert usage_of(status).gpu_seconds == sum(runs for *_, runs in lives)
    assert len(usage_of(status).pods) <= 9
