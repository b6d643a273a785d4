"""Parses objects of the API server once: the QLoRAJob, its child Jobs and their pods, as typed frozen values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from qlora_api.contract import PERMANENT_EXIT_CODES, TRAINER_CONTAINER, ResultRecord, decode_record
from qlora_api.status import QLoRAJobStatus, StepName
from qlora_api.v1alpha1 import QLoRAJobSpec

Object = Mapping[str, Any]
_INTERRUPTED = 143


class UnreadableJobError(ValueError):
    """A QLoRAJob that another version of the schema admitted and that this operator cannot read."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Termination:
    """How the trainer's container ended."""

    exit_code: int
    reason: str
    message: str
    started: datetime | None
    finished: datetime | None


@dataclass(frozen=True)
class Pod:
    """One attempt: a pod of a child Job."""

    name: str
    uid: str
    owner_uid: str
    created: datetime
    phase: str
    reason: str = ""
    message: str = ""
    running_since: datetime | None = None
    termination: Termination | None = None
    waiting: Reason | None = None
    unschedulable: str = ""
    disruption: Reason | None = None
    deletion_requested: datetime | None = None
    deletion_due: datetime | None = None

    @property
    def ended(self) -> bool:
        """Whether none of its containers can run again."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def running(self) -> bool:
        """Whether the trainer runs in it."""
        return self.running_since is not None and not self.ended

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
        return asked or self.disruption is not None or (self.deletion_requested is not None and not self.ended)

    def result(self, job_uid: str, step: StepName) -> ResultRecord | None:
        """The record that the step left as its termination message, if it is there and this job's, pod's and step's."""
        if self.termination is None:
            return None
        record = decode_record(self.termination.message.strip(), job_uid=job_uid, pod_uid=self.uid)
        return record if isinstance(record, ResultRecord) and record.step == step else None


@dataclass(frozen=True)
class ChildJob:
    """A batch/v1 Job whose controller is the QLoRAJob."""

    name: str
    uid: str
    created: datetime
    deleting: bool = False
    complete: bool = False
    failure: Reason | None = None

    @property
    def finished(self) -> bool:
        """Whether it creates no further pods."""
        return self.complete or self.failure is not None


@dataclass(frozen=True)
class Observed:
    """The children of one QLoRAJob."""

    children: tuple[ChildJob, ...] = ()
    pods: tuple[Pod, ...] = ()

    def child(self, name: str) -> ChildJob | None:
        """The child Job of that name."""
        return next((child for child in self.children if child.name == name), None)

    def pods_of(self, job_uid: str) -> tuple[Pod, ...]:
        """The pods of one child Job, oldest first."""
        return tuple(pod for pod in self.pods if pod.owner_uid == job_uid)

    def is_running(self, job_uid: str) -> bool:
        """Whether one of the child Job's pods runs, or the last one has decided how the Job ends."""
        pods = self.pods_of(job_uid)
        return any(pod.running for pod in pods) or (bool(pods) and pods[-1].decisive)

    @property
    def live_pods(self) -> tuple[Pod, ...]:
        """Pods that may still write to the workspace, including those whose Job is gone."""
        return tuple(pod for pod in self.pods if not pod.ended)


def parse_job(body: Object) -> QLoRAJob:
    """The stored QLoRAJob. Raises UnreadableJobError with the fields that this version cannot read."""
    metadata = body["metadata"]
    try:
        return QLoRAJob(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            resource_version=metadata.get("resourceVersion", ""),
            deleting="deletionTimestamp" in metadata,
            spec=QLoRAJobSpec.model_validate(body["spec"]),
            # After a downgrade the stored profile may have fields that this version does not know: the job continues.
            status=QLoRAJobStatus.model_validate(body.get("status") or {}, extra="ignore"),
        )
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors(include_url=False)[:3]
        )
        raise UnreadableJobError(f"this version of the operator cannot read the job: {problems}") from error


def observe(job_uid: str, jobs: Iterable[Object], pods: Iterable[Object]) -> Observed:
    """The children among `jobs` and `pods`, which have the job's label.

    A Job counts only if the QLoRAJob is its controller: anyone can set a label, but a UID is never used twice.
    """
    children = (_parse_child(body) for body in jobs if controller_uid(body) == job_uid)
    return Observed(
        children=tuple(sorted(children, key=lambda child: (child.created, child.name))),
        pods=tuple(sorted((_parse_pod(body) for body in pods), key=lambda pod: (pod.created, pod.name))),
    )


def controller_uid(body: Object) -> str:
    """UID of the object's controller; empty if it has none."""
    owners = body["metadata"].get("ownerReferences") or ()
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")


def parse_time(text: str) -> datetime:
    """An API timestamp (RFC 3339)."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with seconds, as the API server writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _optional_time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None


def _parse_child(body: Object) -> ChildJob:
    metadata = body["metadata"]
    conditions = _true_conditions(body)
    failed = conditions.get("Failed")
    return ChildJob(
        name=metadata["name"],
        uid=metadata["uid"],
        created=parse_time(metadata["creationTimestamp"]),
        deleting="deletionTimestamp" in metadata,
        complete="Complete" in conditions,
        failure=Reason(failed.get("reason", ""), failed.get("message", "")) if failed else None,
    )


def _parse_pod(body: Object) -> Pod:
    metadata, status = body["metadata"], body.get("status") or {}
    state = _trainer_state(status)
    waiting, running, terminated = state.get("waiting"), state.get("running"), state.get("terminated")
    disruption = _true_conditions(body).get("DisruptionTarget")
    due = _optional_time(metadata.get("deletionTimestamp"))
    grace = timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=controller_uid(body),
        created=parse_time(metadata["creationTimestamp"]),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        running_since=_optional_time(running.get("startedAt")) if running else None,
        termination=_parse_termination(terminated) if terminated else None,
        waiting=Reason(waiting.get("reason", ""), waiting.get("message", "")) if waiting else None,
        unschedulable=_unschedulable(status),
        disruption=Reason(disruption.get("reason", ""), disruption.get("message", "")) if disruption else None,
        deletion_requested=due - grace if due else None,
        deletion_due=due,
    )


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


def _unschedulable(status: Object) -> str:
    for condition in status.get("conditions") or ():
        if (condition["type"], condition["status"], condition.get("reason")) == (
            "PodScheduled",
            "False",
            "Unschedulable",
        ):
            return str(condition.get("message", ""))
    return ""
