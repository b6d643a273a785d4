"""Random lives of jobs and sweeps, as hypothesis' state machines.

A life is some twenty actions of users, nodes and faults, drawn one by one, on a world that continues by itself in
between: hypothesis leaves out some kinds of actions in each life, finds those that fail more often than any choice by
hand, and shrinks a failure to the actions that matter. That takes 5 ms of the 50 ms of a life. The delays of
controllers and watches come from a seed, which is an action too: drawn one by one they would be hundreds.

The invariants are checked where they are decided, in each request and each event, and not between the actions only.
"""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qlora_api.profile import Profile
from tests.support.builders import DATASET, MODEL, PROFILE
from tests.support.sweeps import TEMPLATE
from tests.unit.qlora_operator.simulation.api_server import Object
from tests.unit.qlora_operator.simulation.controllers import has
from tests.unit.qlora_operator.simulation.kubelet import PROGRESS_DEADLINE
from tests.unit.qlora_operator.simulation.world import World

WHICH = st.integers(0, 7)
_SEED = st.integers(0, 2**16)
_FEW_HOURS = 0.004
"""Of a GPU, 14 seconds."""
_OUTPUT = {"destination": "s3://bucket/adapters"}
_POLICIES: list[Object] = [{}, {"whenDeleted": "Delete"}, {"whenFinished": "Delete"}]
_WORKSPACE = st.sampled_from(
    [{"claimName": "team"}, *({"persistentVolumeClaimRetentionPolicy": policy} for policy in _POLICIES)]
)


class Lives(RuleBasedStateMachine):
    """Actions on jobs and on cells of sweeps alike."""

    world: World
    is_abandoned = False
    """Whether users delete everything at the end, instead of waiting for it."""

    def begin_world(self, seed: int, **limits: float | None) -> None:
        workspace = {"topology": "shared", "accessMode": "ReadWriteMany"}
        found = {name: limit for name, limit in limits.items() if limit is not None}
        content = PROFILE.dump() | {"workspace": workspace, "limits": found}
        self.world = World(seed, Profile.model_validate(content))

    def teardown(self) -> None:
        if hasattr(self, "world") and not self.world.is_broken:
            (self.world.abandon if self.is_abandoned else self.world.finish)()

    def pick(self, kind: str, which: int, *conditions: str) -> Object | None:
        """Return one of the objects of the kind, with one of these conditions if any is given."""
        found = [body for body in self.world.api.all(kind) if not conditions or has(body, *conditions)]
        return found[which % len(found)] if found else None

    @invariant()
    def time_passes(self) -> None:
        """Between actions a little time passes, as the pods take little."""
        if hasattr(self, "world"):
            self.world.go_on(self.world.agenda.random.choice((0, 0, 1, 3, 8)))

    @rule(seconds=st.sampled_from([20, 60]))
    def wait(self, seconds: int) -> None:
        self.world.go_on(seconds)

    @rule(which=WHICH)
    def suspend_or_resume(self, which: int) -> None:
        if job := self.pick("qlorajobs", which):
            self.world.change("qlorajobs", job, suspend=not job["spec"].get("suspend", False))

    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        if job := self.pick("qlorajobs", which):
            self.world.change("qlorajobs", job, cancel=True)

    @rule(which=WHICH, held=st.booleans())
    def delete(self, which: int, held: bool) -> None:
        if job := self.pick("qlorajobs", which):
            self.world.delete("qlorajobs", job, held=held)

    @rule(which=WHICH)
    def retry(self, which: int) -> None:
        if job := self.pick("qlorajobs", which, "Failed", "Succeeded"):
            self.world.retry(job)

    @rule(which=WHICH, seconds=st.sampled_from([0, 30]))
    def clean_up(self, which: int, seconds: int) -> None:
        if job := self.pick("qlorajobs", which):
            self.world.change("qlorajobs", job, cleanupAfterSeconds=seconds)

    @rule(which=WHICH, seconds=st.sampled_from([0, 30, None]))
    def expire(self, which: int, seconds: int | None) -> None:
        if job := self.pick("qlorajobs", which):
            self.world.change("qlorajobs", job, ttlSecondsAfterFinished=seconds)

    @rule(code=st.sampled_from([203, 203, 11, 137]))
    def fail_next(self, code: int) -> None:
        self.world.kubelet.failing.append(code)

    @rule()
    def hang_next(self) -> None:
        self.world.kubelet.hanging = True

    @rule(which=WHICH, lost=st.booleans())
    def interrupt(self, which: int, lost: bool) -> None:
        if running := self.world.kubelet.running():
            (self.world.lose if lost else self.world.evict)(running[which % len(running)])

    @rule(which=WHICH)
    def delete_child(self, which: int) -> None:
        if job := self.pick("jobs", which):
            self.world.delete_child(job)

    @rule(seconds=st.sampled_from([0, 5, 60]))
    def restart(self, seconds: int) -> None:
        self.world.stop()
        self.world.go_on(seconds)
        self.world.start()

    @rule(errors=st.sampled_from([0.0, 0.1]), lost=st.sampled_from([0.0, 0.2]), races=st.sampled_from([0.0, 0.3]))
    def weather(self, errors: float, lost: float, races: float) -> None:
        api = self.world.api
        api.errors, api.lost_answers, api.races = errors, lost, races

    @rule(count=st.integers(1, 3))
    def lose_events(self, count: int) -> None:
        self.world.lost_events = count


class JobLives(Lives):
    """Up to three jobs with the same settings."""

    @initialize(
        seed=_SEED,
        jobs=st.sampled_from([None, None, 1, 2]),
        nodes=st.sampled_from([1, 1, 1, 2]),
        queue=st.booleans(),
        retry=st.fixed_dictionaries(
            {
                "maxFailures": st.integers(0, 2),
                "maxDisruptions": st.sampled_from([0, 2, 20]),
                "onNoProgress": st.sampled_from(["report", "restart"]),
            }
        ),
        more=st.sampled_from([{}, {"activeDeadlineSeconds": 30}, {"budget": {"gpuHours": _FEW_HOURS}}]),
        workspace=_WORKSPACE,
    )
    def begin(
        self, seed: int, jobs: int | None, nodes: int, queue: bool, retry: Object, more: Object, workspace: Object
    ) -> None:
        self.begin_world(seed, jobs=jobs)
        self._spec: Object = {
            "model": MODEL,
            "dataset": DATASET,
            "workspace": workspace,
            "output": _OUTPUT,
            "retry": retry,
            "progressDeadlineSeconds": PROGRESS_DEADLINE,
            **({"resources": {"nodes": nodes}} if nodes > 1 else {}),
            **({"scheduling": {"queueName": "gpus"}} if queue else {}),
            **more,
        }
        self.world.create("qlorajobs", "a", self._spec)

    @rule(name=st.sampled_from("abc"), continues=st.sampled_from([None, None, "a"]))
    def create(self, name: str, continues: str | None) -> None:
        other = {"continues": continues} if continues not in (None, name) else {}
        self.world.create("qlorajobs", name, self._spec | other)

    @rule(which=WHICH, workspace=_WORKSPACE)
    def change_policy(self, which: int, workspace: Object) -> None:
        job = self.pick("qlorajobs", which)
        if job and not {"claimName"} & (job["spec"]["workspace"].keys() | workspace.keys()):
            self.world.change("qlorajobs", job, workspace=workspace)

    @rule()
    def preempt(self) -> None:
        self.world.kueue.preempt()


class SweepLives(Lives):
    """One sweep, whose cells train alone or together."""

    @initialize(
        seed=_SEED,
        hours=st.sampled_from([None, None, _FEW_HOURS]),
        jobs=st.sampled_from([None, None, 2]),  # fewer than a pod has cells is an objection
        shape=st.sampled_from([(2, 1), (2, 2), (2, 2), (2, 2), (3, 2), (4, 1)]),
        publish=st.sampled_from(["all", "best"]),
        failures=st.integers(0, 2),
        ttl=st.sampled_from([None, None, 0, 60]),
        workspace=_WORKSPACE,
    )
    def begin(
        self,
        seed: int,
        hours: float | None,
        jobs: int | None,
        shape: tuple[int, int],
        publish: str,
        failures: int,
        ttl: int | None,
        workspace: Object,
    ) -> None:
        self.begin_world(seed, gpuHours=hours, jobs=jobs)
        cells, size = shape
        more = {"retry": {"maxFailures": failures}, "workspace": workspace, "output": _OUTPUT}
        spec = {
            "template": {"spec": TEMPLATE | more},
            "cells": [{"rank": 8 * 2**number} for number in range(cells)],
            "cellsPerPod": size,
            "parallelism": 2,
            "publish": publish,
            **({} if ttl is None else {"ttlSecondsAfterFinished": ttl}),
        }
        self.is_abandoned = cells > 3
        self.world.create("qlorasweeps", "rates", spec)

    @rule(change=st.sampled_from([{"suspend": True}, {"suspend": False}, {"parallelism": 1}, {"parallelism": 2}]))
    def change_sweep(self, change: dict[str, Any]) -> None:
        if sweep := self.pick("qlorasweeps", 0):
            self.world.change("qlorasweeps", sweep, **change)
