"""GPU seconds of a pod of several cells: even parts, and each second counts once."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.contract import ProgressRecord
from qlora_api.status import QLoRAJobStatus
from qlora_api.usage import PodUsage, UsageStatus
from qlora_operator.decisions.observed.conditions import is_finished
from qlora_operator.decisions.observed.objects import Reason
from qlora_operator.decisions.observed.shared_pod import SharedPod
from qlora_operator.decisions.usage.usage import count_usage
from qlora_operator.metrics.metrics import Metrics
from tests.support.builders import (
    NAME,
    after,
    child,
    ended,
    facts,
    make_job,
    pod,
    present,
    progress,
    read_job,
    running,
    status_in,
    stored_again,
    time,
)
from tests.support.cluster.shared_pods import NAMES, UIDS, Pod, cell_body, cell_status

FIRST, SECOND, THIRD = NAMES
SWEEP = "the sweep"


def train_pod() -> dict[str, Any]:
    """The pod, which has a node since -100."""
    condition = {"type": "PodScheduled", "status": "True", "lastTransitionTime": time(-100)}
    return pod("train", conditions=[condition])


def shared(entries: tuple[PodUsage, ...]) -> SharedPod:
    return SharedPod("rates", Reason("", ""), counted=entries)


def cell(name: str) -> Any:
    return read_job(cell_body(name=name))


class Shared:
    """Three cells that one pod trains, and their sweep, which counts the rest."""

    def __init__(self) -> None:
        self.jobs = {name: cell(name) for name in NAMES}
        self.usage: UsageStatus | None = None
        self.counted = dict.fromkeys((*NAMES, SWEEP), 0)
        """GPU seconds, also of cells that are deleted."""

    def count_sweep(self, at: float, body: dict[str, Any] | None = None, report: ProgressRecord | None = None) -> None:
        """A pass over the sweep; the pod runs unless given."""
        counting = {job.uid for job in self.jobs.values() if not (job.deleting or is_finished(job.status))}
        job = make_job(status_in("train").model_copy(update={"usage": self.usage}))
        bodies = child("train"), body or running(train_pod(), since=-90)
        trains = tuple(UIDS.values())
        found = facts(job, *bodies, now=after(at), trains=trains, gone=frozenset(trains) - counting, progress=report)
        self._note(SWEEP, job.status, count_usage(job.status, found, until_now=True))

    def count(self, name: str, at: float) -> None:
        """A pass over the cell, if it is there."""
        if name not in self.jobs:
            return
        job, entries = self.jobs[name], self.usage.pods if self.usage is not None else ()
        known = tuple(entry for entry in entries if job.uid in (entry.trained or ()))
        status = count_usage(job.status, facts(job, shared=shared(known), now=after(at)), until_now=True)
        self._note(name, job.status, status)

    def _note(self, name: str, before: QLoRAJobStatus, status: QLoRAJobStatus) -> None:
        # What is stored is all that the next pass knows.
        status = stored_again(status)
        usage = status.usage or UsageStatus()
        assert (before.usage or UsageStatus()).gpu_seconds <= usage.gpu_seconds
        assert usage.lost_gpu_seconds.total <= usage.gpu_seconds
        self.counted[name] = usage.gpu_seconds
        if name == SWEEP:
            self.usage = status.usage
        else:
            self.jobs[name] = replace(self.jobs[name], status=status)

    def count_all(self, at: float, body: dict[str, Any] | None = None) -> None:
        """A pass over the sweep, and one over each cell that has not ended."""
        self.count_sweep(at, body)
        for name, job in list(self.jobs.items()):
            if not is_finished(job.status):
                self.count(name, at)

    def not_copied(self, name: str) -> int:
        """Seconds of the pod of which the cell has a part that it has not counted yet."""
        usage = self.jobs[name].status.usage
        own = sum(entry.seconds for entry in (usage.pods if usage is not None else ()))
        entries, uid = self.usage.pods if self.usage is not None else (), self.jobs[name].uid
        until = (part.after_seconds for entry in entries for part in entry.taken_over or () if part.uid == uid)
        return next(until, sum(entry.seconds for entry in entries)) - own

    def end(self, name: str) -> None:
        """Let it fail, as it does by a deadline that its user has set."""
        self._with(name, "failed")

    def retry(self, name: str) -> None:
        """Let it wait for the sweep again."""
        self._with(name, "prepared")

    def _with(self, name: str, doing: str) -> None:
        status = cell_status(doing, name) or QLoRAJobStatus()
        usage = self.jobs[name].status.usage
        self.jobs[name] = replace(self.jobs[name], status=status.model_copy(update={"usage": usage}))


def test_cells_that_one_pod_trains_share_its_time() -> None:
    found = Shared()
    for at in (10, 400, 800):
        found.count_all(at)
        assert found.counted == dict.fromkeys(NAMES, (100 + at) // 3) | {SWEEP: 0}
    found.count_all(830, ended(train_pod(), 203, start=-90, end=830))
    assert found.counted == dict.fromkeys(NAMES, 310) | {SWEEP: 0}
    lost = [job.status.usage.lost_gpu_seconds.failure for job in found.jobs.values() if job.status.usage]
    assert lost == [310] * 3
    before = {name: job.status for name, job in found.jobs.items()}
    found.count_all(9000, ended(train_pod(), 203, start=-90, end=830))
    assert before == {name: job.status for name, job in found.jobs.items()}


def test_the_sweep_has_the_parts_of_the_cells_that_are_deleted() -> None:
    found = Shared()
    found.count_all(200)
    del found.jobs[SECOND]
    found.count_all(500)
    assert found.counted == {FIRST: 200, SECOND: 100, THIRD: 200, SWEEP: 100}
    # With a finalizer it may exist for long, and counts nothing.
    found.jobs[THIRD] = replace(found.jobs[THIRD], deleting=True)
    del found.jobs[FIRST]
    found.count_sweep(800)
    assert found.counted == {FIRST: 200, SECOND: 100, THIRD: 200, SWEEP: 100 + 300}


def test_a_member_that_ends_and_is_retried_counts_no_second_twice() -> None:
    found = Shared()
    found.count_all(200)
    found.end(SECOND)
    found.count_sweep(500)
    found.retry(SECOND)
    found.count_all(800)
    found.count_all(840, ended(train_pod(), 203, start=-90, end=800))
    assert found.counted == {FIRST: 300, SECOND: 100, THIRD: 300, SWEEP: 200}


def test_the_usage_of_a_sweep_has_each_second_of_its_pods() -> None:
    found = Pod()
    found.then()
    found.then()
    for at, gone in ((300, ""), (900, SECOND)):
        found.cells.pop(gone, None)
        report = progress(job_uid=UIDS[FIRST], pod_uid="uid-rates-p00-train-1-pod1", time=time(at))
        found.then(child("train"), running(train_pod(), since=-90), at=at, progress=report)
        for name in list(found.cells):
            own = found.cell(name)
            now = facts(own, shared=found.shared(name), now=after(at))
            found.store_status(name, count_usage(own.status, now, until_now=True))
    # The cell that is deleted keeps in the sweep's table what it had counted: here nothing.
    assert found.gpu_seconds() == 2 * 333 + 200


def test_the_counters_get_what_counts_for_the_sweep_alone() -> None:
    found, metrics = Pod(), Metrics()
    found.then()
    found.then()
    found.then(child("train"), running(train_pod(), since=-90), at=300)
    before = found.sweep()
    found.cells = {FIRST: found.cells[FIRST]}
    found.then(child("train"), running(train_pod(), since=-90), at=900)
    metrics.gpu_seconds.note_sweep(before, found.sweep().status)
    assert 'qlora_gpu_seconds_total{namespace="team",profile="default"} 400.0' in metrics.page()[0].decode()


def test_a_cell_copies_each_pod_of_its_sweep_once() -> None:
    """Also pods that the sweep still lists and the cell, now trained alone, does not."""

    def entry(name: str, number: int, at: float, **more: Any) -> PodUsage:
        began, uid = time(at + number), f"uid-{name}-{number}"
        numbers: dict[str, Any] = {"seconds": 90, "end": "disruption"} | more
        return PodUsage(name=f"{name}-train-1-{number}", uid=uid, created=began, since=began, **numbers)

    together = {"jobs": 3, "trained": tuple(UIDS.values())}
    entries = tuple(entry("rates-p00", number, -9000, **together) for number in range(5))
    own = cell(FIRST)
    alone = UsageStatus(gpu_seconds=630, pods=tuple(entry(FIRST, number, -3000) for number in range(7)))
    status = own.status.model_copy(update={"usage": alone})
    for _ in range(4):
        status = count_usage(status, facts(replace(own, status=status), shared=shared(entries)))
        assert present(status.usage).gpu_seconds == 630 + 5 * 30


def test_a_cell_counts_a_pod_of_its_sweep_that_many_have_overtaken() -> None:
    together: dict[str, Any] = {"jobs": 3, "trained": tuple(UIDS.values())}
    late = PodUsage(name="rates-p00-train-1-x", uid="late", created=time(-900), since=time(10), **together)
    numbers = together | {"seconds": 3, "end": "failure"}
    many = [
        PodUsage(name=f"rates-p00-train-1-{n}", uid=str(n), created=time(n), since=time(n), **numbers)
        for n in range(-800, 0, 40)
    ]
    own = cell(FIRST)
    status = own.status
    for at, entries in [
        (0, tuple(many)),
        (310, (*many[-8:], late.model_copy(update={"seconds": 300}))),
        (320, (late.model_copy(update={"seconds": 306, "end": "completed"}),)),
        (330, (late.model_copy(update={"seconds": 306, "end": "completed"}),)),
    ]:
        status = count_usage(status, facts(replace(own, status=status), shared=shared(entries), now=after(at)))
    assert present(status.usage).gpu_seconds == 20 + 102


_EVENTS = st.lists(
    st.tuples(
        st.integers(1, 400),
        st.sampled_from(["delete", "end", "retry", "nothing"]),
        st.sampled_from(NAMES),
        st.lists(st.sampled_from([SWEEP, *NAMES]), max_size=5),
    ),
    max_size=10,
)
"""Seconds that pass, what happens to which cell then, and whose passes follow."""


@settings(max_examples=120, deadline=None)
@given(events=_EVENTS, trains=st.none() | st.integers(-99, 999), code=st.sampled_from([137, 203]))
def test_the_time_of_a_pod_counts_once_whichever_cells_are_gone(
    events: list[tuple[int, str, str, list[str]]], trains: int | None, code: int
) -> None:
    """All of it, except the time that a cell had not copied when it was deleted."""
    found, now, lags = Shared(), 0, dict[str, int]()
    for passed, event, name, passes in events:
        now += passed
        if event == "delete" and name in found.jobs:
            lags[name] = found.not_copied(name)
            del found.jobs[name]
        elif event == "end" and name in found.jobs:
            found.end(name)
        elif event == "retry" and name in found.jobs:
            found.retry(name)
        report = None
        if trains is not None and trains < now:
            since = {"training_step": 3, "total_steps": 9, "training_since": time(trains), "time": time(now)}
            report = progress(pod_uid=f"uid-{NAME}-train-1-pod1", **since)
        for whose in passes:
            if whose == SWEEP:
                found.count_sweep(now, report=report)
            elif whose in found.jobs and not is_finished(found.jobs[whose].status):
                found.count(whose, now)
        assert sum(found.counted.values()) <= 100 + now
    for name in list(found.jobs):
        if is_finished(found.jobs[name].status):
            found.retry(name)
    for _ in range(2):
        found.count_all(now + 20, ended(train_pod(), code, start=-90, end=now + 10))
    whole = 3 * (100 + now + 10) - sum(lags.values())
    assert whole - 3 * 4 < 3 * sum(found.counted.values()) <= whole
