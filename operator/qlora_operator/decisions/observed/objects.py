"""Typed frozen values of the QLoRAJob, its child Jobs and their pods."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from qlora_api.contract import (
    PERMANENT_EXIT_CODES,
    ExitCode,
    ResultRecord,
    decode_record,
)
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.status import QLoRAJobStatus, StepName

Object = Mapping[str, Any]
ORPHANED = "orphan"
"""The finalizer of a deletion that leaves the children alone."""
_INTERRUPTED, _KILLED = 143, 137


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
    """As stored, with the values of its revision if that was read."""
    revision: str = ""
    """Name of that revision, which the stored status may not name yet; empty if none was found."""
    began_as: str = ""
    """UID of the job that began the run, if another: this one was restored from a backup; else empty."""
    is_restored: bool = False
    """Whether a backup tool or a user marks it as restored, so that its run may exist."""
    queue_name: str | None = None
    """Kueue's LocalQueue: of the spec, else of the label."""
    queue_priority_class_name: str | None = None
    """Kueue's WorkloadPriorityClass: of the spec, else of the label."""
    orphans: bool = False
    """Whether its children stay when it is deleted, as `kubectl delete --cascade=orphan` asks for."""
    shares: str | None = None
    """The folder of its workspace claim that it shares with the other cells of its sweep; None if it is no cell."""
    sweep: str = ""
    """The QLoRASweep that controls it; empty if none does."""
    cells_in_pod: int = 1
    """How many cells of that sweep one pod trains, the job among them, by the annotation of its creation."""
    rungs: str = ""
    """Optimizer steps after which its sweep compares its cells, separated by commas; empty if there are none."""
    problem: str = ""
    """Why this operator must not continue the job, which it stops on request only; empty if it can."""
    hold: Reason | None = None
    """Why its profile, or its restore, stops it for now, as spec.suspend does: a running pod saves a checkpoint."""

    @property
    def run_uid(self) -> str:
        """The job's UID in the records of its run, and in the names of its folder and claim."""
        return self.began_as or self.uid

    @property
    def adopts(self) -> bool:
        """Whether it is to adopt a restored revision before it starts."""
        adopted = self.began_as or self.status.claim_deletion_time is not None
        return self.is_restored and not (adopted or self.deleting or self.spec.suspend or self.spec.cancel)

    @property
    def stops(self) -> bool:
        """Whether no pod of it may run, by its user or its profile."""
        return self.spec.suspend or bool(self.spec.cancel) or self.hold is not None


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
    """Its index among the Job's pods that train together."""
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
    """Whether a user has detached it from its Job or the watches, by its labels or its owner."""
    unreadable: str = ""
    """Why it cannot be read, and so counts as existing and not ended; empty if it can."""

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
        """Whether the kernel killed it for its memory limit.

        The exit code of that varies, the reason does not.
        """
        return self.termination is not None and self.termination.reason == "OOMKilled" and not self.exited_well

    @property
    def fatal(self) -> bool:
        """Whether its end ends the job: another attempt would end the same way."""
        return self.out_of_memory

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
        """Whether a signal, an eviction, a preemption or a deletion stopped it."""
        asked = self.termination is not None and self.termination.exit_code == _INTERRUPTED
        # Deleted, and killed at the end of its grace period.
        asked = asked or (self.deletion_requested is not None and self._killed)
        if self.reason == "Evicted" and self.disruption is None:
            return False  # for what it did itself: its temporary files exceed their limit
        return asked or self.disruption is not None or (self.deletion_requested is not None and not self.ended)

    @property
    def stopping(self) -> bool:
        """Whether it was deleted, also by the suspension of its Job, and has not ended."""
        return self.deletion_requested is not None and not self.ended and self.disruption is None

    def stopped_by(self, moment: datetime) -> bool:
        """Whether it existed before that moment, and its end or stop request came by then."""
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
        """Whether the kubelet rejected it before any container ran.

        A missing device is one cause.
        """
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
        """Read the record that the step left as its termination message.

        Returns None without one, or if its job, pod or step is another.
        """
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
    """Whether its deadline ends it, or has: that is no failure of the step."""
    ended: datetime | None = None
    suspended: bool = False
    """Whether it gets no pods because its `suspend` is true, which only others set, or was until just now."""
    suspended_since: datetime | None = None
    """When its pods were stopped; None if it is not suspended, or the Job controller has not seen that yet."""
    resumed: datetime | None = None
    """When it was last resumed after a suspension; None if it has never been suspended, or is."""
    managed_by: str = ""
    """The controller that runs it, perhaps in another cluster, and whose report of it is not read; empty if that is
    Kubernetes' own."""
    unreadable: str = ""
    """Why it cannot be read, and so counts as existing and not finished; empty if it can."""

    @property
    def finished(self) -> bool:
        """Whether it creates no further pods."""
        return self.complete or self.failure is not None


@dataclass(frozen=True, slots=True)
class Observed:
    """The children of one QLoRAJob."""

    children: tuple[ChildJob, ...] = ()
    pods: tuple[Pod, ...] = ()

    def child(self, name: str) -> ChildJob | None:
        """The child Job of that name."""
        return next((child for child in self.children if child.name == name), None)

    def pods_of(self, job_uid: str) -> tuple[Pod, ...]:
        """Return the pods of one child Job, oldest first.

        Returns none for a Job that does not exist yet, whose UID is empty.
        """
        return tuple(pod for pod in self.pods if job_uid and pod.owner_uid == job_uid)

    def is_running(self, job_uid: str) -> bool:
        """Whether all pods of the child Job that have not ended run.

        This also holds if the last pod has decided the Job's end.
        """
        pods = self.pods_of(job_uid)
        live = [pod for pod in pods if not pod.ended]
        if any(pod.running for pod in live):
            return not any(pod.starting for pod in live)
        return bool(pods) and pods[-1].decisive and not pods[-1].unsupported

    def reporting_pod(self, job_uid: str) -> Pod | None:
        """Return the child Job's running pod with progress: its only one, or node 0."""
        return next((pod for pod in self.pods_of(job_uid) if pod.running and pod.node == 0), None)

    @property
    def live_pods(self) -> tuple[Pod, ...]:
        """Pods that may still write to the workspace, including those whose Job is gone."""
        return tuple(pod for pod in self.pods if not pod.ended)


def collect(children: Iterable[ChildJob], pods: Iterable[Pod]) -> Observed:
    """The children in the order of their creation."""
    return Observed(
        children=tuple(sorted(children, key=lambda child: (child.created, child.name))),
        pods=tuple(sorted(pods, key=lambda pod: (pod.created, pod.name))),
    )


def share_of(text: str) -> float:
    """Return a number from 0 to 1, constant for this text and different for others."""
    return zlib.crc32(text.encode()) / (2**32 - 1)


def parse_time(text: str) -> datetime:
    """An API timestamp (RFC 3339)."""
    moment = datetime.fromisoformat(text)
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with seconds, as the API server writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
