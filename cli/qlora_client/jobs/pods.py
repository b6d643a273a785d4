"""The pods of a job with the reason why one has not started, and the Events about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qlora_api.naming import CELLS_ANNOTATION, JOB_UID_LABEL, STEP_LABEL
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.resources import EVENTS, PODS

CONTAINER = "trainer"
"""The container that runs the step; others may be beside it, such as that of a mesh. A test compares it with the
contract, whose models would take longer to import than the rest of a command."""
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True)
class Pod:
    """One pod at one moment."""

    body: Mapping[str, Any]
    """The object, as JSON."""

    @property
    def name(self) -> str:
        """Its name in the job's namespace."""
        return str(self.body["metadata"]["name"])

    @property
    def uid(self) -> str:
        """Differs from that of a deleted pod of the same name."""
        return str(self.body["metadata"]["uid"])

    @property
    def step(self) -> str:
        """The step that it runs."""
        return str(self.body["metadata"]["labels"].get(STEP_LABEL, ""))

    @property
    def cells(self) -> list[str]:
        """The cells that it trains, if it is a pod of a sweep."""
        return str((self.body["metadata"].get("annotations") or {}).get(CELLS_ANNOTATION, "")).split(",")

    @property
    def node(self) -> int:
        """The pod's index among the pods that train together, from 0."""
        return int(self.body["metadata"]["labels"].get(_INDEX_LABEL, 0))

    @property
    def has_log(self) -> bool:
        """Whether its container has started, so that there is a log."""
        return bool({"running", "terminated"} & self._state.keys())

    @property
    def ended(self) -> bool:
        """Whether its log is complete."""
        return "terminated" in self._state

    @property
    def waits_for(self) -> str:
        """Return why it has not started, by scheduler or kubelet, empty if unknown."""
        waiting = self._state.get("waiting") or {}
        unscheduled = [
            entry
            for entry in self.body.get("status", {}).get("conditions") or ()
            if entry["type"] == "PodScheduled" and entry["status"] == "False"
        ]
        told = unscheduled[0] if unscheduled else waiting
        return ": ".join(str(told[key]) for key in ("reason", "message") if told.get(key))

    @property
    def _state(self) -> Mapping[str, Any]:
        statuses = self.body.get("status", {}).get("containerStatuses") or ()
        return next((each.get("state") or {} for each in statuses if each["name"] == CONTAINER), {})


def pods_of(cluster: Cluster, job: Job) -> list[Pod]:
    """List the pods that report on the job, oldest first.

    These are the job's, and those of its sweep that train it with other cells. Of several that train together, the
    first.
    """
    found = _labeled(cluster, job.uid)
    if job.sweep_uid:
        found += [pod for pod in _labeled(cluster, job.sweep_uid) if job.name in pod.cells]
    return sorted(found, key=lambda pod: (pod.body["metadata"]["creationTimestamp"], pod.name))


def _labeled(cluster: Cluster, job_uid: str) -> list[Pod]:
    return [pod for pod in map(Pod, cluster.find(PODS, selector=f"{JOB_UID_LABEL}={job_uid}")) if pod.node == 0]


@dataclass(frozen=True)
class Event:
    """One Event."""

    time: datetime
    """When it was last seen, with its time zone."""
    kind: str
    """Normal or Warning."""
    reason: str
    message: str


def events_of(cluster: Cluster, uid: str) -> list[Event]:
    """Return the Events about this UID, oldest first, of the last hour or so."""
    found = map(_event, cluster.find(EVENTS, fields=f"involvedObject.uid={uid}"))
    return sorted(found, key=lambda event: event.time)


def _event(body: Mapping[str, Any]) -> Event:
    time = body.get("lastTimestamp") or body.get("eventTime") or body["metadata"]["creationTimestamp"]
    return Event(datetime.fromisoformat(time), body["type"], body["reason"], body.get("message", ""))
