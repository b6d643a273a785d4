"""At every moment at most one of several operators works, for any clocks and cuts."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.errors import ConflictError, UnavailableError
from qlora_operator.leadership import Election, LeaseSettings, Step, decide
from tests.support.builders import NOW, VirtualLoop

LEASE = LeaseSettings("system", "operator", 12)


def lease(holder: str | None, seconds: int | None = 12) -> Object:
    return {"metadata": {"resourceVersion": "1"}, "spec": {"holderIdentity": holder, "leaseDurationSeconds": seconds}}


@pytest.mark.parametrize(
    ("found", "unchanged", "step"),
    [
        (None, 0, Step.CREATE),
        (lease("me"), 0, Step.RENEW),
        (lease("me"), 1000, Step.RENEW),
        (lease("other"), 11.9, Step.WAIT),
        (lease("other"), 12, Step.TAKE),
        (lease(""), 0, Step.TAKE),
        (lease(None), 0, Step.TAKE),
        (lease("other", 60), 59, Step.WAIT),
        (lease("other", 60), 60, Step.TAKE),
        (lease("other", None), 11, Step.WAIT),
        (lease("other", None), 12, Step.TAKE),
        ({"metadata": {"resourceVersion": "1"}}, 0, Step.TAKE),
    ],
)
def test_a_candidate_takes_a_free_or_expired_lease(found: Object | None, unchanged: float, step: Step) -> None:
    assert decide(found, "me", unchanged, 12) is step


class Store:
    """The API server: one Lease, versions, and conflicts."""

    def __init__(self, now: Callable[[], float] = lambda: 0.0) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.written_at = 0.0
        self._now = now

    def write(self, manifest: Object, expected: str | None) -> Object:
        found = self.lease["metadata"]["resourceVersion"] if self.lease else None
        if found != expected:
            raise ConflictError("changed")
        self.version, self.written_at = self.version + 1, self._now()
        self.lease = {**manifest, "metadata": {**manifest["metadata"], "resourceVersion": str(self.version)}}
        return self.lease


@dataclass
class Road:
    """One candidate's way to the API server: seconds until it acts, and until its answer arrives."""

    store: Store
    there: float = 0.05
    back: float = 0.05
    closed: bool = False
    hangs: bool = False
    loses_answers: bool = False

    async def _arrive(self) -> None:
        if self.hangs:
            await asyncio.sleep(1e6)
        if self.closed:
            raise UnavailableError("refused")
        await asyncio.sleep(self.there)

    async def get_lease(self, _namespace: str, _name: str) -> Object | None:
        await self._arrive()
        found = self.store.lease
        await asyncio.sleep(self.back)
        return found

    async def create_lease(self, _namespace: str, manifest: Object) -> Object:
        await self._arrive()
        return await self._answer(self.store.write(manifest, None))

    async def replace_lease(self, _namespace: str, _name: str, manifest: Object) -> Object:
        await self._arrive()
        return await self._answer(self.store.write(manifest, manifest["metadata"]["resourceVersion"]))

    async def _answer(self, written: Object) -> Object:
        await asyncio.sleep(self.back)
        if self.loses_answers:
            raise UnavailableError("cut")
        return written


@dataclass
class Shift:
    """Tracks the working operator. Raises AssertionError if two work at a time."""

    working: list[str] = field(default_factory=list)
    began: list[tuple[str, float]] = field(default_factory=list)
    ended: list[tuple[str, float]] = field(default_factory=list)

    def work(self, name: str, now: Callable[[], float]) -> Callable[[], Any]:
        async def work() -> None:
            assert self.working == []
            self.working.append(name)
            self.began.append((name, now()))
            try:
                await asyncio.Event().wait()
            finally:
                self.working.remove(name)
                self.ended.append((name, now()))

        return work


class Match:
    """Candidates on one store, in virtual time."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.store, self.shift = Store(self.loop.time), Shift()

    def candidate(self, name: str, *, skew: float = 0, **road: Any) -> tuple[Road, Election]:
        way = Road(self.store, **road)
        clock = lambda: NOW + timedelta(seconds=self.loop.time() + skew)  # noqa: E731
        return way, Election(way, LEASE, name, monotonic=self.loop.time, clock=clock)

    def start(self, name: str, election: Election) -> asyncio.Task[None]:
        return asyncio.create_task(election.run(self.shift.work(name, self.loop.time)))

    def play(self, scenario: Callable[[], Any]) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(asyncio.wait_for(scenario(), 10_000))


async def end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, asyncio.CancelledError), result


WAYS = st.sampled_from([(0.05, 0.05), (1.9, 0.0), (0.0, 1.9), (0.9, 0.9)])
"""Seconds there and back, together less than a sixth of the Lease's duration."""
FAULTS: dict[str, dict[str, Any]] = {"closed": {"closed": True}, "hangs": {"hangs": True}, "slow": {"back": 3.0}}


# The second sees the last renewal in a slow answer, and is quick when the Lease expires.
@example(ways=((0.05, 0.05), (1.9, 0.0), (0.05, 0.05)), phases=(4, 4), fault="hangs", skew=0)
@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
@given(
    ways=st.tuples(WAYS, WAYS, WAYS),
    phases=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    fault=st.sampled_from(sorted(FAULTS)),
    skew=st.sampled_from([-7200, 0, 7200]),
)
def test_a_leader_works_until_it_is_cut_off_and_stops_long_before_another(
    ways: tuple[tuple[float, float], ...], phases: tuple[int, int], fault: str, skew: float
) -> None:
    match = Match()
    road, first = match.candidate("first", skew=skew, there=ways[0][0], back=ways[0][1])
    other_road, second = match.candidate("second", there=ways[1][0], back=ways[1][1])

    async def scenario() -> None:
        running = match.start("first", first)
        await asyncio.sleep(5 + phases[0] / 4)
        other = match.start("second", second)
        await asyncio.sleep(30 + phases[1] / 4)
        assert match.shift.working == ["first"]
        assert match.shift.ended == []
        usual = dict(vars(road))
        vars(road).update(FAULTS[fault])
        other_road.there, other_road.back = ways[2]
        await asyncio.sleep(9)
        [(_, ended_at)] = match.shift.ended
        assert ended_at <= match.store.written_at + LEASE.duration * 2 / 3
        await asyncio.sleep(20)
        assert match.shift.working == ["second"]
        assert match.shift.began[-1][1] - ended_at >= LEASE.duration / 3
        # It comes back as a standby.
        vars(road).update(usual)
        await asyncio.sleep(20)
        assert match.shift.working == ["second"]
        assert len(match.shift.began) == 2
        assert first.problem() is None
        assert first.stuck() is None
        await end(running, other)

    match.play(scenario)


def test_alone_it_works_again_as_soon_as_it_can_renew() -> None:
    match = Match()
    road, only = match.candidate("only")

    async def scenario() -> None:
        running = match.start("only", only)
        await asyncio.sleep(5)
        road.closed = True
        await asyncio.sleep(600)
        assert match.shift.working == []
        assert only.problem() is not None
        assert only.stuck() is None, "an outage is no reason to restart"
        road.closed = False
        await asyncio.sleep(5)
        assert match.shift.working == ["only"]
        await end(running)

    match.play(scenario)


def test_a_leader_that_ends_releases_the_lease_immediately() -> None:
    match = Match()
    _, first = match.candidate("first")
    _, second = match.candidate("second")

    async def scenario() -> None:
        running = match.start("first", first)
        await asyncio.sleep(1)
        other = match.start("second", second)
        await asyncio.sleep(30)
        await end(running)
        ended_at = match.loop.time()
        await asyncio.sleep(5)
        assert match.shift.began[-1][0] == "second"
        assert match.shift.began[-1][1] - ended_at <= 3
        assert match.store.lease is not None
        assert match.store.lease["spec"]["leaseTransitions"] == 1
        await end(other)

    match.play(scenario)


def test_of_many_candidates_that_start_together_one_works() -> None:
    match = Match()
    names = [f"candidate-{number}" for number in range(10)]
    elections = {name: match.candidate(name, there=0.1 + number / 50)[1] for number, name in enumerate(names)}

    async def scenario() -> None:
        running = [match.start(name, election) for name, election in elections.items()]
        await asyncio.sleep(60)
        assert len(match.shift.began) == 1
        assert [election.leads for election in elections.values()].count(True) == 1
        await end(*running)

    match.play(scenario)


def test_a_lease_that_was_taken_without_an_answer_is_held() -> None:
    match = Match()
    road, only = match.candidate("only", loses_answers=True)

    async def scenario() -> None:
        running = match.start("only", only)
        await asyncio.sleep(5)
        assert match.shift.working == []
        road.loses_answers = False
        await asyncio.sleep(3)
        assert match.shift.working == ["only"]
        await end(running)

    match.play(scenario)


def test_a_lease_that_a_user_edits_or_deletes_is_kept() -> None:
    match = Match()
    _, only = match.candidate("only")

    async def scenario() -> None:
        running = match.start("only", only)
        await asyncio.sleep(5)
        for _ in range(20):
            assert match.store.lease is not None
            match.store.write(match.store.lease, match.store.lease["metadata"]["resourceVersion"])
            await asyncio.sleep(0.37)
        match.store.lease = None
        await asyncio.sleep(30)
        assert match.shift.working == ["only"]
        assert match.shift.ended == []
        await end(running)

    match.play(scenario)


def test_work_that_does_not_stop_restarts_the_process() -> None:
    match = Match()
    road, only = match.candidate("only")
    released = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await released.wait()

    async def scenario() -> None:
        running = asyncio.create_task(only.run(stubborn))
        await asyncio.sleep(5)
        assert only.stuck() is None
        road.closed = True
        await asyncio.sleep(120)
        assert only.stuck() is not None
        released.set()
        await end(running)

    match.play(scenario)


def test_an_error_of_the_work_ends_the_election_and_frees_the_lease() -> None:
    match = Match()
    _, only = match.candidate("only")

    async def broken() -> None:
        await asyncio.sleep(5)
        raise ValueError("a defect")

    async def scenario() -> None:
        with pytest.raises(ValueError, match="a defect"):
            await only.run(broken)
        assert match.store.lease is not None
        assert match.store.lease["spec"]["holderIdentity"] == ""

    match.play(scenario)
