"""A namespace with its users, its cluster and its operator, in virtual time."""

import itertools
from typing import Any

from qlora_api.naming import STEP_LABEL
from qlora_api.profile import Profile
from qlora_operator.keys import Key
from tests.unit.qlora_operator.simulation.accounts import Accounts
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import NAMESPACE, ApiServer, Object, controller
from tests.unit.qlora_operator.simulation.controllers import (
    ClaimProtection,
    GarbageCollector,
    JobController,
    Kueue,
    delete_pod,
    has,
    over,
)
from tests.unit.qlora_operator.simulation.invariants import Invariants, cleanup_seconds
from tests.unit.qlora_operator.simulation.kubelet import Kubelet, Run
from tests.unit.qlora_operator.simulation.played_operator import PlayedOperator

_WATCHED = ("qlorajobs", "qlorasweeps", "jobs", "pods")
_OF_USERS = ("qlorasweeps", "qlorajobs")


class World:
    """A namespace, and actions of users, nodes and faults on it."""

    def __init__(self, seed: int, profile: Profile) -> None:
        self.agenda = Agenda(seed)
        self.api = ApiServer(self.agenda)
        self.kubelet = Kubelet(self.api, self.agenda)
        self.kueue = Kueue(self.api, self.agenda)
        self._controller = JobController(self.api, self.agenda)
        GarbageCollector(self.api, self.agenda)
        ClaimProtection(self.api)
        self._invariants = Invariants(self.api, self.agenda, self.kubelet, profile)
        self._accounts = Accounts(self.api, self.kubelet)
        self.api.watches.append(self._watch)
        self.is_broken = False
        """Whether an invariant does not hold, so that the life does not go on."""
        self.lost_events = 0
        """How many of the next events no watch shows."""
        self._shown_at: dict[str, int] = {}
        self._profiles = {"default": profile}
        self.start()

    def start(self) -> None:
        """Start a process of the operator."""
        self._operator = PlayedOperator(self.api, self.agenda, self._profiles)

    def stop(self) -> None:
        """End it, and what it has seen of pods that are gone and not yet counted."""
        self._operator.is_stopped = True
        there = {pod["metadata"]["uid"] for pod in self.api.all("pods")}
        used = [body["status"].get("usage") or {} for body in self.api.all("qlorajobs")]
        counted = {entry["uid"] for usage in used for entry in usage.get("pods", ()) if "end" in entry}
        for run in self.kubelet.runs.values():
            run.shown = run.shown if run.uid in there | counted else None

    def go_on(self, seconds: int) -> None:
        """Let so many seconds pass."""
        end, self.is_broken = self.agenda.now + seconds, True
        while self.agenda.happen_until(end):
            self._invariants.check_writers()
        # A race may have let a second pass beyond the end, and no clock goes back.
        self.agenda.now, self.is_broken = max(self.agenda.now, end), False

    def _watch(self, kind: str, event: str, body: Object) -> None:
        """The operator's watch shows the event, perhaps late, and never before an earlier one."""
        if kind not in _WATCHED:
            return
        if self.lost_events:
            self.lost_events -= 1
            return
        operator = self._operator
        moment = max(self.agenda.now + self.agenda.random.choice((0, 0, 0, 1, 3)), self._shown_at.get(kind, 0))
        self._shown_at[kind] = moment

        def show() -> None:
            operator.show(kind, event, body)
            run = self.kubelet.runs.get(body["metadata"]["uid"])
            if run is not None and over(body) and run.shown is None and not operator.is_stopped:
                run.shown = self.agenda.now

        self.agenda.add(moment - self.agenda.now, show)

    # --- users

    def create(self, kind: str, name: str, spec: Object) -> None:
        """A user creates a job or a sweep, unless it exists."""
        if self.api.get(kind, name) is None:
            self.api.create(kind, {"metadata": {"name": name}, "spec": spec})

    def change(self, kind: str, body: Object, **spec: Any) -> None:
        """A user changes the spec."""
        self.api.change(kind, body["metadata"]["name"], spec={**body["spec"], **spec})

    def delete(self, kind: str, body: Object, *, held: bool) -> None:
        """A user deletes the object. `held`: a finalizer keeps it until the next time."""
        if held and "deletionTimestamp" not in body["metadata"]:
            stamp = self.agenda.stamp()
            self.api.change(kind, body["metadata"]["name"], metadata={"deletionTimestamp": stamp})
        else:
            self.api.remove(kind, body["metadata"]["name"])

    def retry(self, job: Object) -> None:
        """A user requests a retry."""
        retry = job["spec"].get("retry") or {}
        self.change("qlorajobs", job, retry={**retry, "request": self.agenda.stamp()})

    def delete_child(self, job: Object) -> None:
        """A user deletes the Job: what its pods have done may not count."""
        owner = self.api.get("qlorajobs", controller(job)["name"]) or {"status": {}}
        counted = (owner["status"].get("step") or {}).get("countedPod")
        runs = [run for run in self.kubelet.runs.values() if run.job == job["metadata"]["name"]]
        for run in runs:
            run.is_known = False
        # An interruption that is not counted yet looks like a part of the deletion.
        for run in itertools.takewhile(lambda run: run.uid != counted, reversed(runs)):
            run.is_covered = True
        self.api.remove("jobs", job["metadata"]["name"])

    # --- nodes

    def evict(self, run: Run) -> None:
        """Ask the pod to stop, as a drain does."""
        pod = self.api.get("pods", run.pod)
        if pod is None or run.asked is not None:
            return
        run.disrupted = True
        known = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": ""}
        status = {**pod["status"], "conditions": [*pod["status"].get("conditions", ()), known]}
        delete_pod(self.api, self.agenda, self.api.change("pods", run.pod, status=status))

    def lose(self, run: Run) -> None:
        """The node of the pod is gone, and the pod with it."""
        pod = self.kubelet.lose(run)
        if pod is not None:
            self._controller.vanished(pod)

    # --- the end

    def finish(self) -> None:
        """Nothing fails any more, users resume what they have suspended: everything ends."""
        self._calm_down()
        for kind in _OF_USERS:
            for body in self.api.all(kind):
                if "deletionTimestamp" in body["metadata"]:
                    self.api.remove(kind, body["metadata"]["name"])
                elif body["spec"].get("suspend"):
                    self.change(kind, body, suspend=False)
        for _ in range(200):
            self.go_on(60)
            self._repeat_cleanup()
            if not (left := self._unfinished()):
                break
        else:
            raise AssertionError(f"not everything ends: {left}")
        self.go_on(10)
        self._accounts.check()
        self._invariants.check_claims()
        for body in self._of_users():
            self._look_twice((NAMESPACE, body["metadata"]["name"]))

    def abandon(self) -> None:
        """Users delete everything: nothing is left."""
        self._calm_down()
        for kind in _OF_USERS:
            for body in self.api.all(kind):
                self.api.remove(kind, body["metadata"]["name"])
        self.go_on(400)
        left = [body["metadata"]["name"] for kind in _WATCHED for body in self.api.all(kind)]
        assert not left, f"not everything is gone: {left}"
        self._invariants.check_claims()

    def _calm_down(self) -> None:
        self.api.errors = self.api.lost_answers = self.api.races = 0.0
        self.lost_events = 0
        self.kubelet.calm_down()

    def _repeat_cleanup(self) -> None:
        """A user deletes a clean-up that has failed, as its message advises."""
        for job in self.api.all("jobs"):
            if job["metadata"]["labels"][STEP_LABEL] == "clean" and has(job, "Failed"):
                self.api.remove("jobs", job["metadata"]["name"])

    def _look_twice(self, key: Key) -> None:
        """Two passes over a world that does not change: the second one writes nothing."""
        self._operator.look(key)
        writes = self.api.writes
        self._operator.look(key)
        assert self.api.writes == writes, f"a second pass over {key[1]} writes"

    def _of_users(self) -> list[Object]:
        return [body for kind in _OF_USERS for body in self.api.all(kind)]

    def _unfinished(self) -> list[str]:
        left = [
            f"{body['metadata']['name']} {_summary(body['status'])}"
            for body in self._of_users()
            if not _has_ended(body)
        ]
        # A job waits for ever for one that does not exist or has deleted its checkpoints, and its status shows that.
        waiting = ("ContinuedJobNotFound", "ContinuedJobDeletedItsClaim")
        return [each for each in left if not any(reason in each for reason in waiting)]


def _has_ended(body: Object) -> bool:
    """Whether the job or sweep has ended, its pods have counted, and it is cleaned up if it asks for that.

    It is not there any more if it asks for that.
    """
    status, spec = body["status"], body["spec"]
    if not has(body, "Succeeded", "Failed") or status.get("observedGeneration") != body["metadata"]["generation"]:
        return False
    # A cell that has ended copies no more of the pod of its sweep.
    if any("end" not in entry for entry in (status.get("usage") or {}).get("pods", ()) if entry["jobs"] == 1):
        return False
    if spec.get("ttlSecondsAfterFinished") is not None and not controller(body):
        return False
    return has(body, "CleanedUp") or cleanup_seconds(body) is None


def _summary(status: Object) -> str:
    found = {each["type"]: each for each in status.get("conditions", ())}.get("Succeeded", {})
    return f"({status.get('phase')}: {found.get('reason')}: {found.get('message')})"
