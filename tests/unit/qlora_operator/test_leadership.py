"""At every moment at most one of several operators works, for any clocks and cuts."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

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

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0

    def write(self, manifest: Object, expected: str | None) -> Object:
        found = self.lease["metadata"]["resourceVersion"] if self.lease else None
        if found != expected:
            raise ConflictError("changed")
        self.version += 1
        self.lease = {**manifest, "metadata": {**manifest["metadata"], "resourceVersion": str(self.version)}}
        return self.lease


@dataclass
class Road:
    """One candidate's way to the API server."""

    store: Store
    seconds: float = 0.1
    closed: bool = False
    hangs: bool = False
    loses_answers: bool = False

    async def _travel(self) -> None:
        if self.hangs:
            await asyncio.sleep(1e6)
        if self.closed:
            raise UnavailableError("refused")
        await asyncio.sleep(self.seconds)

    async def get_lease(self, _namespace: str, _name: str) -> Object | None:
        await self._travel()
        return self.store.lease

    async def create_lease(self, _namespace: str, manifest: Object) -> Object:
        await self._travel()
        return self._answer(self.store.write(manifest, None))

    async def replace_lease(self, _namespace: str, _name: str, manifest: Object) -> Object:
        await self._travel()
        return self._answer(self.store.write(manifest, manifest["metadata"]["resourceVersion"]))

    def _answer(self, written: Object) -> Object:
        if self.loses_answers:
            raise UnavailableError("cut")
        return written


@dataclass
class Shift:
    """Tracks the working operator. Raises AssertionError if two work at a time."""

    working: list[str] = field(default_factory=list)
    began: list[tuple[str, float]] = field(default_factory=list)

    def work(self, name: str, now: Callable[[], float]) -> Callable[[], Any]:
        async def work() -> None:
            assert self.working == []
            self.working.append(name)
            self.began.append((name, now()))
            try:
                await asyncio.Event().wait()
            finally:
                self.working.remove(name)

        return work


class Match:
    """Candidates on one store, in virtual time."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.store, self.shift = Store(), Shift()

    def candidate(self, name: str, *, skew: float = 0, **road: Any) -> tuple[Road, Election]:
        way = Road(self.store, **road)
        clock = lambda: NOW + timedelta(seconds=self.loop.time() + skew)  # noqa: E731
        return way, Election(way, LEASE, name, monotonic=self.loop.time, clock=clock)

    def start(self, name: str, election: Election) -> asyncio.Task[None]:
        return asyncio.create_task(election.run(self.shift.work(name, self.loop.time)))

    def play(self, scenario: Callable[[], Any]) -> None:
        self.loop.run_until_complete(asyncio.wait_for(scenario(), 10_000))
        self.loop.close()


async def end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, asyncio.CancelledError), result


@pytest.mark.parametrize("skew", [-7200, 0, 7200])
@pytest.mark.parametrize("fault", ["closed", "hangs"])
def test_a_disconnected_leader_stops_before_another_begins(skew: float, fault: str) -> None:
    match = Match()
    road, first = match.candidate("first", skew=skew)
    _, second = match.candidate("second")

    async def scenario() -> None:
        running = match.start("first", first)
        await asyncio.sleep(1)
        other = match.start("second", second)
        await asyncio.sleep(100)
        assert match.shift.working == ["first"]
        setattr(road, fault, True)
        cut_at = match.loop.time()
        await asyncio.sleep(20)
        assert not first.leads
        assert match.shift.working == ["second"]
        assert 8 <= match.shift.began[-1][1] - cut_at <= 18
        # It comes back as a standby.
        setattr(road, fault, False)
        await asyncio.sleep(100)
        assert match.shift.working == ["second"]
        assert first.problem() is None
        assert first.stuck() is None
        await end(running, other)

    match.play(scenario)


@pytest.mark.parametrize("offset", [0, 0.5, 1, 1.5, 2])
def test_a_renewal_that_a_slow_answer_shows_counts_from_the_answer_on(offset: float) -> None:
    """The leader is cut off right after the shown renewal, at any time until the next."""
    match = Match()
    first_road, first = match.candidate("first")
    second_road, second = match.candidate("second", seconds=3.1)

    async def scenario() -> None:
        running = match.start("first", first)
        await asyncio.sleep(30 + offset)
        other = match.start("second", second)
        await asyncio.sleep(3.1)
        first_road.hangs, second_road.seconds = True, 0.1
        await asyncio.sleep(30)
        assert match.shift.working == ["second"]
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
    elections = {name: match.candidate(name, seconds=0.1 + number / 50)[1] for number, name in enumerate(names)}

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
        assert len(match.shift.began) == 1
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
