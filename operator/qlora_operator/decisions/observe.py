"""What is observed, as typed frozen values: the QLoRAJob, its child Jobs and their pods. Parses the latter two."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from qlora_api.contract import (
    PERMANENT_EXIT_CODES,
    TRAINER_CONTAINER,
    ExitCode,
    ResultRecord,
    decode_record,
)
from qlora_api.naming import RESOLVED_ANNOTATION
from qlora_api.status import QLoRAJobStatus, StepName
from qlora_api.v1alpha1 import DEFAULT_PROFILE, QLoRAJobSpec

Object = Mapping[str, Any]
ORPHANED = "orphan"
"""The finalizer of a deletion that leaves the children alone."""
MAX_RESOLVED = 64 * 1024
"""Characters of what was resolved, as JSON; one with the largest profile that the settings can have takes 40,000."""
_INTERRUPTED, _KILLED = 143, 137
_INDEX = "batch.kubernetes.io/job-completion-index"
# More than any Job has pods. Whoever may change pods can write anything there.
_INDEX_DIGITS = 9
# Enough for a sentence. A pod that somebody else has made may name a megabyte of them.
_MOST_OBJECTS, _LONGEST_OBJECT = 16, 512
_OBJECT_VOLUMES = {"secret": "Secret", "configMap": "ConfigMap"}
_LONGEST_EXPLANATION = 200
_UNEXPECTED_VALUE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What parsing raises for a value that is not as the API declares it, or is out of range."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One word for programs and one sentence for people."""

    word: str
    sentence: str


@dataclass(frozen=True)
class QLoRAJob:
    """The job as stored."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    deleting: bool
    spec: QLoRAJobSpec
    status: QLoRAJobStatus
    queue_name: str | None = None
    """Kueue's LocalQueue: of the spec, else of the label."""
    queue_priority: str | None = None
    """Kueue's WorkloadPriorityClass: of the spec, else of the label."""
    orphans: bool = False
    """Whether its children stay when it is deleted, as `kubectl delete --cascade=orphan` asks for."""
    problem: str = ""
    """Why this operator must not go on with the job, which it only stops when that is asked for; empty if it can."""


@dataclass(frozen=True, slots=True)
class Termination:
    """How the trainer's container ended."""

    exit_code: int
    reason: str
    message: str
    started: datetime | None
    finished: datetime | None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a child Job: one attempt, or one node of it if the Job has several."""

    name: str
    uid: str
    owner_uid: str
    created: datetime
    phase: str
    node: int = 0
    """Which of the Job's pods it is that train together."""
    reason: str = ""
    message: str = ""
    running_since: datetime | None = None
    termination: Termination | None = None
    waiting: Reason | None = None
    objects: tuple[str, ...] = ()
    """The Secrets and ConfigMaps that it mounts, with their keys, for people."""
    unschedulable: str = ""
    disruption: Reason | None = None
    scheduled: datetime | None = None
    deletion_requested: datetime | None = None
    deletion_due: datetime | None = None
    detached: bool = False
    """Whether somebody has taken it away from its Job or from the watches, by its labels or its owner."""
    unreadable: str = ""
    """Why it cannot be read, and so counts as there and not ended; empty if it can."""

    @property
    def ended(self) -> bool:
        """Whether none of its containers can run again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def running(self) -> bool:
        """Whether the trainer runs in it."""
        return self.running_since is not None and not self.ended

    @property
    def starting(self) -> bool:
        """Whether its trainer has not run yet."""
        return self.running_since is None and self.termination is None and not self.ended

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel killed it for its memory limit. The exit code of that varies, the reason does not."""
        return self.termination is not None and self.termination.reason == "OOMKilled" and not self.exited_well

    @property
    def exited_well(self) -> bool:
        """Whether the trainer ended with exit code 0."""
        return self.termination is not None and self.termination.exit_code == 0

    @property
    def decisive(self) -> bool:
        """Whether its end is about to end its Job too."""
        return self.termination is not None and self.termination.exit_code in (0, *PERMANENT_EXIT_CODES)

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped from outside: by a signal, an eviction, a preemption or a deletion."""
        asked = self.termination is not None and self.termination.exit_code == _INTERRUPTED
        # Deleted, and killed at the end of its grace period.
        asked = asked or (self.deletion_requested is not None and self._killed)
        if self.reason == "Evicted" and self.disruption is None:
            return False  # for what it did itself: its temporary files exceed their limit
        return asked or self.disruption is not None or (self.deletion_requested is not None and not self.ended)

    @property
    def stopping(self) -> bool:
        """Whether it was deleted, by somebody or by the suspension of its Job, and has not ended."""
        return self.deletion_requested is not None and not self.ended and self.disruption is None

    def stopped_by(self, moment: datetime) -> bool:
        """Whether it was there before that moment and was asked to stop, or had ended, by then."""
        stopped = self.deletion_requested or (self.termination.finished if self.termination else None)
        return self.created < moment and stopped is not None and stopped <= moment

    @property
    def _killed(self) -> bool:
        """Whether it ended by SIGKILL, and not for its memory."""
        return self.termination is not None and self.termination.exit_code == _KILLED and not self.out_of_memory

    @property
    def asked_to_stop(self) -> bool:
        """Whether its trainer was asked to stop and did, which its Job ignores."""
        return self.termination is not None and self.termination.exit_code == _INTERRUPTED

    @property
    def lost_peer(self) -> bool:
        """Whether it ended because another node of its attempt was gone."""
        return self.termination is not None and self.termination.exit_code == ExitCode.PEER_LOST

    @property
    def missed_peers(self) -> bool:
        """Whether it ended because not all nodes of its attempt had started in time."""
        return self.termination is not None and self.termination.exit_code == ExitCode.PEERS_MISSING

    @property
    def rejected(self) -> bool:
        """Whether the kubelet rejected it, for example because a device is not there, before any container ran."""
        return self.phase == "Failed" and self.termination is None and not self.interrupted

    @property
    def unsupported(self) -> bool:
        """Whether its trainer is too old for this operator, which costs the step nothing."""
        return self.termination is not None and self.termination.exit_code == ExitCode.UNSUPPORTED_CONTRACT

    @property
    def failed(self) -> bool:
        """Whether its trainer ran and failed by itself."""
        no_failure = self.exited_well or self.interrupted or self.rejected or self.unsupported
        return self.ended and not no_failure

    def result(self, job_uid: str, step: StepName) -> ResultRecord | None:
        """The record that the step left as its termination message, if it is there and this job's, pod's and step's."""
        if self.termination is None:
            return None
        record = decode_record(self.termination.message.strip(), job_uid=job_uid, pod_uid=self.uid)
        return record if isinstance(record, ResultRecord) and record.step == step else None


@dataclass(frozen=True, slots=True)
class ChildJob:
    """A batch/v1 Job whose controller is the QLoRAJob."""

    name: str
    uid: str
    created: datetime
    deleting: bool = False
    complete: bool = False
    failure: Reason | None = None
    backoff_limit: int | None = None
    """How many failures of its pods it allows."""
    active: int = field(default=0, compare=False)
    """How many of its pods have not ended, as the Job controller has last counted them: alone no reason for a pass."""
    failing: bool = False
    """Whether it is about to fail, and stops the pods that still run."""
    expired: bool = False
    """Whether its own deadline ends it, or has: that is no failure of the step."""
    ended: datetime | None = None
    suspended: bool = False
    """Whether it gets no pods because its `suspend` is true, which only others set, or was until just now."""
    suspended_since: datetime | None = None
    """When its pods were stopped; None if it is not suspended, or the Job controller has not seen that yet."""
    resumed: datetime | None = None
    """When it was last resumed after a suspension; None if it has never been suspended, or is."""
    resolved: str = ""
    """What was resolved for the job, as JSON; only on the first Job, which exists before the status is stored.

    Empty if it is longer than MAX_RESOLVED, which no operator has written: a half one would be another one.
    """
    unreadable: str = ""
    """Why it cannot be read, and so counts as there and not finished; empty if it can."""

    @property
    def finished(self) -> bool:
        """Whether it creates no further pods."""
        return self.complete or self.failure is not None


@dataclass(frozen=True, slots=True)
class Observed:
    """The children of one QLoRAJob."""

    children: tuple[ChildJob, ...] = ()
    pods: tuple[Pod, ...] = ()
    lost: ChildJob | None = None
    """The first Job, if it was deleted before the status has been stored."""

    def child(self, name: str) -> ChildJob | None:
        """The child Job of that name."""
        return next((child for child in self.children if child.name == name), None)

    def pods_of(self, job_uid: str) -> tuple[Pod, ...]:
        """The pods of one child Job, oldest first."""
        return tuple(pod for pod in self.pods if pod.owner_uid == job_uid)

    def is_running(self, job_uid: str) -> bool:
        """Whether the child Job's pods run, all of those that have not ended, or the last has decided how it ends."""
        pods = self.pods_of(job_uid)
        live = [pod for pod in pods if not pod.ended]
        if any(pod.running for pod in live):
            return not any(pod.starting for pod in live)
        return bool(pods) and pods[-1].decisive and not pods[-1].unsupported

    def reporting_pod(self, job_uid: str) -> Pod | None:
        """The child Job's pod that runs and reports progress: the only one, or that of node 0."""
        return next((pod for pod in self.pods_of(job_uid) if pod.running and pod.node == 0), None)

    @property
    def live_pods(self) -> tuple[Pod, ...]:
        """Pods that may still write to the workspace, including those whose Job is gone."""
        return tuple(pod for pod in self.pods if not pod.ended)


def observe(job_uid: str, jobs: Iterable[Object], pods: Iterable[Object]) -> Observed:
    """The children among `jobs` and `pods`, which have the job's label.

    A Job counts only if the QLoRAJob is its controller: anyone can set a label, but a UID is never used twice.
    """
    children = (parse_child(body) for body in jobs if controller_uid(body) == job_uid)
    return collect(children, map(parse_pod, pods))


def collect(children: Iterable[ChildJob], pods: Iterable[Pod], lost: ChildJob | None = None) -> Observed:
    """The children in the order of their creation."""
    return Observed(
        children=tuple(sorted(children, key=lambda child: (child.created, child.name))),
        pods=tuple(sorted(pods, key=lambda pod: (pod.created, pod.name))),
        lost=lost,
    )


def profile_in_use(body: Object) -> str | None:
    """Name of the profile of a QLoRAJob that has started and not ended, of whatever version; None of any other."""
    if not (body.get("status") or {}).get("resolved") or {"Succeeded", "Failed"} & _true_conditions(body).keys():
        return None
    return str(((body.get("spec") or {}).get("scheduling") or {}).get("profile") or DEFAULT_PROFILE)


def controller_uid(body: Object) -> str:
    """UID of the object's controller; empty if it has none."""
    owners = body["metadata"].get("ownerReferences") or ()
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")


def parse_time(text: str) -> datetime:
    """An API timestamp (RFC 3339)."""
    moment = datetime.fromisoformat(text)
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with seconds, as the API server writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _optional_time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None


def parse_child(body: Object) -> ChildJob:
    """A Job of the job. Raises nothing: see `ChildJob.unreadable`."""
    try:
        return _parse_child(body)
    except _UNEXPECTED_VALUE as error:
        metadata = body["metadata"]
        return ChildJob(
            name=metadata["name"],
            uid=metadata["uid"],
            created=parse_time(metadata["creationTimestamp"]),
            deleting="deletionTimestamp" in metadata,
            unreadable=_explain(error),
        )


def _explain(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_EXPLANATION]


def _parse_child(body: Object) -> ChildJob:
    metadata = body["metadata"]
    conditions = _true_conditions(body)
    failed, ended = conditions.get("Failed"), conditions.get("Failed") or conditions.get("Complete")
    stopped = conditions.get("Suspended")
    # Until the Job controller has seen that the Job is resumed, its pods are those that the suspension has ended.
    suspended = bool((body.get("spec") or {}).get("suspend")) or stopped is not None
    return ChildJob(
        name=metadata["name"],
        uid=metadata["uid"],
        created=parse_time(metadata["creationTimestamp"]),
        deleting="deletionTimestamp" in metadata,
        complete="Complete" in conditions,
        failure=Reason(failed.get("reason", ""), failed.get("message", "")) if failed else None,
        backoff_limit=(body.get("spec") or {}).get("backoffLimit"),
        active=(body.get("status") or {}).get("active") or 0,
        failing="FailureTarget" in conditions,
        expired=(failed or conditions.get("FailureTarget", {})).get("reason") == "DeadlineExceeded",
        ended=_optional_time(ended.get("lastTransitionTime")) if ended else None,
        suspended=suspended,
        suspended_since=_optional_time(stopped.get("lastTransitionTime")) if stopped else None,
        resumed=None if suspended else _resumed(body.get("status") or {}),
        resolved=_resolved(metadata),
    )


def _resolved(metadata: Object) -> str:
    text = str((metadata.get("annotations") or {}).get(RESOLVED_ANNOTATION, ""))
    return text if len(text) <= MAX_RESOLVED else ""


def _resumed(status: Object) -> datetime | None:
    """`startTime`, which the Job controller sets anew at each resumption, if there was one."""
    if not any(condition["type"] == "Suspended" for condition in status.get("conditions") or ()):
        return None
    return _optional_time(status.get("startTime"))


def parse_pod(body: Object) -> Pod:
    """A pod of one of its Jobs. Raises nothing: see `Pod.unreadable`."""
    try:
        return _parse_pod(body)
    except _UNEXPECTED_VALUE as error:
        metadata = body["metadata"]
        return Pod(
            name=metadata["name"],
            uid=metadata["uid"],
            owner_uid=controller_uid(body),
            created=parse_time(metadata["creationTimestamp"]),
            phase="Unknown",
            unreadable=_explain(error),
        )


def _parse_pod(body: Object) -> Pod:
    metadata, status = body["metadata"], body.get("status") or {}
    state = _trainer_state(status)
    waiting, running, terminated = state.get("waiting"), state.get("running"), state.get("terminated")
    disruption = _true_conditions(body).get("DisruptionTarget")
    created, due = parse_time(metadata["creationTimestamp"]), _optional_time(metadata.get("deletionTimestamp"))
    grace = metadata.get("deletionGracePeriodSeconds") or 0
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=controller_uid(body),
        created=created,
        phase=status.get("phase", "Pending"),
        node=_node(metadata),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        running_since=_optional_time(running.get("startedAt")) if running else None,
        termination=_parse_termination(terminated) if terminated else None,
        waiting=Reason(waiting.get("reason", ""), waiting.get("message", "")) if waiting else None,
        objects=_mounted_objects(body),
        unschedulable=_unschedulable(status),
        scheduled=_scheduled(body),
        disruption=Reason(disruption.get("reason", ""), disruption.get("message", "")) if disruption else None,
        deletion_requested=_deletion_requested(due, grace, created) if due else None,
        deletion_due=due,
    )


def _deletion_requested(due: datetime, grace: int, created: datetime) -> datetime:
    """When the deletion was asked for. `grace`: seconds; whoever deletes may choose any number."""
    try:
        return max(created, due - timedelta(seconds=grace))
    except OverflowError:
        return created


def _node(metadata: Object) -> int:
    index = (metadata.get("annotations") or {}).get(_INDEX, "")
    return int(index) if index.isdecimal() and len(index) <= _INDEX_DIGITS else 0


def _trainer_state(status: Object) -> Object:
    containers = status.get("containerStatuses") or ()
    states = (container.get("state") or {} for container in containers if container["name"] == TRAINER_CONTAINER)
    return next(states, {})


def _parse_termination(terminated: Object) -> Termination:
    return Termination(
        exit_code=terminated["exitCode"],
        reason=terminated.get("reason", ""),
        message=terminated.get("message", ""),
        started=_optional_time(terminated.get("startedAt")),
        finished=_optional_time(terminated.get("finishedAt")),
    )


def _true_conditions(body: Object) -> dict[str, Object]:
    conditions = (body.get("status") or {}).get("conditions") or ()
    return {condition["type"]: condition for condition in conditions if condition["status"] == "True"}


def _mounted_objects(body: Object) -> tuple[str, ...]:
    volumes = (body.get("spec") or {}).get("volumes") or ()
    sources = (
        *((kind, volume[key]) for volume in volumes for key, kind in _OBJECT_VOLUMES.items() if key in volume),
        *(
            (kind, source[key])
            for volume in volumes
            for source in (volume.get("projected") or {}).get("sources") or ()
            for key, kind in _OBJECT_VOLUMES.items()
            if key in source
        ),
    )
    names = (_name_with_keys(kind, source)[:_LONGEST_OBJECT] for kind, source in sources if not source.get("optional"))
    return tuple(dict.fromkeys(islice(names, _MOST_OBJECTS)))


def _name_with_keys(kind: str, source: Object) -> str:
    name = source.get("secretName") or source.get("name") or ""
    keys = ", ".join(item["key"] for item in source.get("items") or ())
    return f"{kind} {name!r}{f' with {keys}' if keys else ''}"


def _scheduled(body: Object) -> datetime | None:
    found = _true_conditions(body).get("PodScheduled")
    return _optional_time(found.get("lastTransitionTime")) if found else None


def _unschedulable(status: Object) -> str:
    for condition in status.get("conditions") or ():
        if (condition["type"], condition["status"], condition.get("reason")) == (
            "PodScheduled",
            "False",
            "Unschedulable",
        ):
            return str(condition.get("message", ""))
    return ""
