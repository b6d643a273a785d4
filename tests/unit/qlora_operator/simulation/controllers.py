"""The Job controller, the garbage collector and Kueue."""

import itertools
from functools import partial
from typing import Any

from qlora_api.naming import QUEUE_LABEL
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import ApiServer, Object, controller, owned_by

INDEX = "batch.kubernetes.io/job-completion-index"
ENDS = ("Complete", "Failed")
OWNERS = ("qlorasweeps", "qlorajobs", "jobs")
_CONTROLLER_LABEL = "batch.kubernetes.io/controller-uid"


class JobController:
    """Makes pods for Jobs, counts their ends and ends the Jobs."""

    def __init__(self, api: ApiServer, agenda: Agenda) -> None:
        self._api, self._agenda = api, agenda
        self._numbers = itertools.count()
        self._queued: set[str] = set()
        self._failed: dict[str, set[str]] = {}
        """The counted pods of each Job, which may be gone."""
        self._paused: dict[str, int] = {}
        """Until when a Job gets no pod, after a failure."""
        api.watches.append(self._watch)

    def _watch(self, kind: str, event: str, body: Object) -> None:
        if kind == "jobs" and event != "DELETED":
            self._queue(body["metadata"]["name"])
        elif kind == "pods":
            self._queue(str(controller(body).get("name")))

    def _queue(self, name: str, seconds: int | None = None) -> None:
        if seconds is not None:
            self._agenda.add(seconds, lambda: self._sync(name))
        elif name not in self._queued:
            self._queued.add(name)
            self._agenda.soon(lambda: self._sync(name))

    def _sync(self, name: str) -> None:
        self._queued.discard(name)
        job = self._api.get("jobs", name)
        if job is None or has(job, *ENDS):
            return
        pods = self._api.owned("pods", job["metadata"]["uid"])
        if has(job, "FailureTarget"):
            self._end_when_stopped(job, pods)
        elif job["spec"].get("suspend"):
            self._suspend(job, pods)
        elif has(job, "Suspended"):
            resumed = self._with(job, "Suspended", "JobResumed", "False")
            self._api.change("jobs", name, status={**resumed, "startTime": self._agenda.stamp()})
        elif (reason := self._failure(job, pods)) is not None:
            self._api.change("jobs", name, status=self._with(job, "FailureTarget", reason))
        elif len(done := {node_of(pod) for pod in pods if exit_code(pod) == 0}) == job["spec"]["completions"]:
            self._finish(job, "Complete", "CompletionsReached")
        else:
            self._make_pods(job, pods, done)

    def _failure(self, job: Object, pods: list[Object]) -> str | None:
        """Count failed pods by the policy of their Job, and return why it fails."""
        known = self._failed.setdefault(job["metadata"]["uid"], set())
        for pod in pods:
            uid, code = pod["metadata"]["uid"], exit_code(pod)
            if pod["status"]["phase"] != "Failed" or uid in known:
                continue
            known.add(uid)
            action = self._action(job, pod, code)
            if action == "FailJob":
                return "PodFailurePolicy"
            if action != "Ignore":
                self._note_failure(job, uid)
        failures = len([uid for uid in known if uid.endswith("!")])
        return "BackoffLimitExceeded" if failures > job["spec"]["backoffLimit"] else None

    def _note_failure(self, job: Object, uid: str) -> None:
        known = self._failed[job["metadata"]["uid"]]
        known.add(f"{uid}!")
        failures = len([each for each in known if each.endswith("!")])
        self._paused[job["metadata"]["uid"]] = self._agenda.now + 10 * 2 ** (failures - 1)

    def _action(self, job: Object, pod: Object, code: int | None) -> str:
        for rule in job["spec"]["podFailurePolicy"]["rules"]:
            if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
                return str(rule["action"])
            if "onPodConditions" in rule and has(pod, "DisruptionTarget"):
                return str(rule["action"])
        return "Count"

    def vanished(self, pod: Object) -> None:
        """Count a pod that is gone without an end: an attempt of several nodes fails."""
        owner = self._api.get("jobs", controller(pod)["name"])
        if owner is not None and owner["spec"]["completions"] > 1:
            self._failed.setdefault(owner["metadata"]["uid"], set())
            self._note_failure(owner, pod["metadata"]["uid"])

    def _make_pods(self, job: Object, pods: list[Object], done: set[int]) -> None:
        metadata, wanted = job["metadata"], range(job["spec"]["completions"])
        there = {node_of(pod) for pod in pods if not over(pod)}
        pause = self._paused.get(metadata["uid"], 0) - self._agenda.now
        missing = [node for node in wanted if node not in there | done]
        if missing and pause > 0:
            self._queue(metadata["name"], pause)
            return
        for node in missing:
            self._make_pod(job, node)
        self._note_active(job, [pod for pod in self._api.owned("pods", metadata["uid"]) if not over(pod)])

    def _make_pod(self, job: Object, node: int) -> None:
        metadata, template = job["metadata"], job["spec"]["template"]
        owner = {"kind": "Job", "name": metadata["name"], "uid": metadata["uid"], "controller": True}
        several = {INDEX: str(node)} if job["spec"]["completions"] > 1 else {}
        own = {
            "name": f"{metadata['name']}-{node}-{next(self._numbers):03}",
            "ownerReferences": [owner],
            "labels": template["metadata"]["labels"] | {_CONTROLLER_LABEL: metadata["uid"]},
            "annotations": template["metadata"]["annotations"] | several,
        }
        self._api.create("pods", {"metadata": own, "spec": template["spec"], "status": {"phase": "Pending"}})

    def _note_active(self, job: Object, live: list[Object]) -> None:
        if (job["status"].get("active") or 0) != len(live):
            self._api.change("jobs", job["metadata"]["name"], status={**job["status"], "active": len(live)})

    def _suspend(self, job: Object, pods: list[Object]) -> None:
        self._stop(pods)
        if not has(job, "Suspended"):
            status = {key: value for key, value in job["status"].items() if key != "startTime"}
            suspended = self._with({"status": status}, "Suspended", "JobSuspended")
            self._api.change("jobs", job["metadata"]["name"], status=suspended | {"active": 0})

    def _end_when_stopped(self, job: Object, pods: list[Object]) -> None:
        self._stop(pods)
        if all(over(pod) for pod in self._api.owned("pods", job["metadata"]["uid"])):
            (why,) = [each["reason"] for each in job["status"]["conditions"] if each["type"] == "FailureTarget"]
            self._finish(job, "Failed", why)

    def _finish(self, job: Object, kind: str, reason: str) -> None:
        self._api.change("jobs", job["metadata"]["name"], status=self._with(job, kind, reason) | {"active": 0})

    def _stop(self, pods: list[Object]) -> None:
        for pod in pods:
            if not over(pod):
                delete_pod(self._api, self._agenda, pod)

    def _with(self, job: Object, kind: str, reason: str, value: str = "True") -> Object:
        others = [each for each in job["status"].get("conditions", ()) if each["type"] != kind]
        new = {"type": kind, "status": value, "reason": reason, "message": "why"}
        return {**job["status"], "conditions": [*others, new | {"lastTransitionTime": self._agenda.stamp()}]}


class GarbageCollector:
    """Deletes what a deleted object has owned."""

    def __init__(self, api: ApiServer, agenda: Agenda) -> None:
        self._api, self._agenda = api, agenda
        api.watches.append(self._watch)

    def _watch(self, kind: str, event: str, body: Object) -> None:
        if event == "DELETED":
            self._agenda.soon(lambda: self._collect(body["metadata"]["uid"]))
        elif event == "ADDED":
            for owner in body["metadata"].get("ownerReferences", ()):
                self._agenda.soon(partial(self._collect, owner["uid"]))

    def _collect(self, uid: str) -> None:
        if any(body["metadata"]["uid"] == uid for kind in OWNERS for body in self._api.all(kind)):
            return
        for kind in ("qlorajobs", "jobs", "controllerrevisions"):
            for body in self._api.owned(kind, uid):
                self._api.remove(kind, body["metadata"]["name"])
        for pod in self._api.owned("pods", uid):
            delete_pod(self._api, self._agenda, pod)
        for claim in self._api.all("persistentvolumeclaims"):
            if owned_by(claim, uid):
                stamp = {"deletionTimestamp": self._agenda.stamp()}
                self._api.change("persistentvolumeclaims", claim["metadata"]["name"], metadata=stamp)


class ClaimProtection:
    """Removes a deleted claim when no pod uses it."""

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        api.watches.append(self._watch)

    def _watch(self, kind: str, event: str, _body: Object) -> None:
        if (kind, event) not in (("persistentvolumeclaims", "MODIFIED"), ("pods", "DELETED")):
            return
        used = {name for pod in self._api.all("pods") for name in claims_of(pod["spec"])}
        for claim in self._api.all("persistentvolumeclaims"):
            name = claim["metadata"]["name"]
            if "deletionTimestamp" in claim["metadata"] and name not in used:
                self._api.remove("persistentvolumeclaims", name)


class Kueue:
    """Admits suspended Jobs of a queue, one at a time, and suspends them again."""

    def __init__(self, api: ApiServer, agenda: Agenda) -> None:
        self._api, self._agenda = api, agenda
        api.watches.append(self._watch)

    def _watch(self, kind: str, _event: str, _body: Object) -> None:
        if kind == "jobs":
            self._agenda.add(self._agenda.random.choice((1, 3, 10)), self._admit)

    def _jobs(self) -> list[Object]:
        queued = [job for job in self._api.all("jobs") if QUEUE_LABEL in job["metadata"]["labels"]]
        return [job for job in queued if not has(job, *ENDS)]

    def _admit(self) -> None:
        jobs = self._jobs()
        if jobs and all(job["spec"].get("suspend") for job in jobs):
            self._suspend(jobs[0], False)

    def preempt(self) -> None:
        """Suspend the admitted Job, and put it behind the others."""
        for job in self._jobs():
            if not job["spec"].get("suspend"):
                self._suspend(job, True)

    def _suspend(self, job: Object, suspend: bool) -> None:
        self._api.change("jobs", job["metadata"]["name"], spec={**job["spec"], "suspend": suspend})


def claims_of(pod: Object) -> list[str]:
    """Return the claims that a pod of this spec mounts."""
    return [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each]


def has(body: Object, *kinds: str) -> bool:
    """Whether one of these conditions is true."""
    found = body["status"].get("conditions", ())
    return any(each["type"] in kinds and each["status"] == "True" for each in found)


def over(pod: Object) -> bool:
    """Whether the pod has ended."""
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def terminated(pod: Object) -> Any:
    """Return how the trainer of the pod has ended, or None before."""
    return next((each["state"].get("terminated") for each in pod["status"].get("containerStatuses", ())), None)


def exit_code(pod: Object) -> int | None:
    """Return the exit code of the trainer, or None before it has ended."""
    return None if (found := terminated(pod)) is None else int(found["exitCode"])


def node_of(pod: Object) -> int:
    """Return which of the Job's pods it is."""
    return int(pod["metadata"]["annotations"].get(INDEX, 0))


def delete_pod(api: ApiServer, agenda: Agenda, pod: Object) -> None:
    """Ask the pod to stop; one that has ended is removed immediately."""
    name, grace = pod["metadata"]["name"], pod["spec"]["terminationGracePeriodSeconds"]
    if over(pod):
        api.remove("pods", name)
    elif "deletionTimestamp" not in pod["metadata"]:
        asked = {"deletionTimestamp": agenda.stamp(grace), "deletionGracePeriodSeconds": grace}
        api.change("pods", name, metadata=asked)
