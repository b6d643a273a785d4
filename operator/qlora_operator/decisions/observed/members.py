"""What the jobs of a group know of one another: whether each is prepared, and what all of them must share; pure."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qlora_api.contract import ExitCode
from qlora_api.memory.together import JointPeak, ShareOfMemory, add_up
from qlora_api.status import QLoRAJobStatus
from qlora_api.usage import PodUsage
from qlora_operator.decisions.observed.conditions import condition, is_finished, is_true
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason

TOO_LARGE = ExitCode.DOES_NOT_FIT.reason
"""Why jobs fail that do not fit the GPU together, as one does that does not fit it alone."""
State = Literal["prepared", "started", "new", "trains", "ended"]
"""Of a job, for the forming of its group. `trains`: it has got, or is past, a train Job of its own."""

_RANKS: tuple[State, ...] = ("prepared", "started", "new", "ended")
_FIELDS: dict[str, tuple[str, ...]] = {
    "model": ("source", "revision"),
    "quantization": ("type", "doubleQuant", "computeDtype"),
    "training": ("gradientCheckpointing",),
    "workspace": ("claimName",),
    "scheduling": ("profile", "priorityClassName", "nodeSelector", "tolerations"),
}
"""Fields of the spec that must be the same in all jobs of a group, by part."""


@dataclass(frozen=True, slots=True)
class PodName:
    """A pod by name and UID."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Member:
    """A job of a group, as the others see it."""

    namespace: str
    name: str
    uid: str
    group: str
    size: int
    shared: tuple[tuple[str, str], ...]
    """What must be the same in all of them, by field, for people."""
    image: str
    """Of the trainer; empty as long as it may get another one, because it has no Job yet."""
    base: str
    """SHA-256 of the 4-bit base; empty before it is known."""
    document_bytes: int
    """Of what its pods read; 0 before it has started."""
    state: State
    doing: str
    """What it does instead of being prepared, in a word for people; empty if it is."""
    memory: ShareOfMemory | None
    """What it takes of the GPU's memory; None before that is known."""
    gpu_gib: int | None
    """Memory of its GPU in GiB; None if it does not say."""
    deleting: bool
    leader_uid: str = ""
    """The leader of the group in which it is trained; empty before there is one."""
    leads: tuple[str, ...] = ()
    """UIDs of the jobs that its own train Job trains, its own among them; empty if it is no leader."""
    trained: bool = False
    """Whether its train step is over: done, or failed for good."""
    pod: PodName | None = None
    """Its train pod, while that runs."""
    waits: Reason | None = None
    """Of a leader whose train pod does not run: why."""
    too_large: str = ""
    """Of a leader that has failed because its group does not fit the GPU: the message."""
    pods: tuple[PodUsage, ...] = dataclasses.field(default=(), compare=False)
    """Its latest train pods, with the GPU time of each: alone no reason to look at the others."""

    @property
    def rank(self) -> tuple[int, str]:
        """Its place among the jobs of which a group is formed."""
        return _RANKS.index(self.state) if self.state in _RANKS else len(_RANKS), self.name


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """The other jobs of a job's group."""

    others: tuple[Member, ...] = ()
    led: tuple[QLoRAJob, ...] = ()
    """Those that the job's own train Job trains too, with what their pods read: only where they have been read live."""
    lingering: str = ""
    """A pod or Job of the job's leader that may still write to the job's folder, although it trains the job no more."""


def member_of(job: QLoRAJob) -> Member | None:
    """The job as the others of its group see it; None if it is in no group, or cannot be read."""
    group, status = job.spec.group, job.status
    if group is None:
        return None
    recorded, resolved = status.group, status.resolved
    led = recorded.members if recorded is not None and recorded.leader_uid == job.uid else None
    trains = status.phase == "Training" and status.step is not None and status.step.name == "train"
    pod = PodName(status.step.running_pod_name, status.step.running_pod) if status.step and trains else None
    state = _state(job)
    return Member(
        namespace=job.namespace,
        name=job.name,
        uid=job.uid,
        group=group.name,
        size=group.size,
        shared=_shared(job),
        image=resolved.profile.image if resolved is not None and _has_begun(status) else "",
        base=status.base.sha256 if status.base is not None else "",
        document_bytes=len((resolved.document or "").encode()) if resolved is not None else 0,
        state=state,
        doing="" if state == "prepared" else _doing(job, state),
        memory=ShareOfMemory.of(status.memory),
        gpu_gib=job.spec.resources.gpu_memory,
        deleting=job.deleting,
        leader_uid=recorded.leader_uid if recorded is not None else "",
        leads=tuple(member.uid for member in led or ()),
        trained=is_finished(status) or is_true(status, "Trained"),
        pod=pod if pod is not None and pod.name else None,
        waits=_waits(status) if led and pod is None else None,
        too_large=_too_large(status) if led else "",
        pods=status.usage.pods if status.usage is not None else (),
    )


def difference(member: Member, first: Member) -> str:
    """What of the member keeps it from being trained together with the first; empty for nothing."""
    if member.size != first.size:
        return f"spec.group.size is {member.size}, and that of {first.name} is {first.size}"
    for (field, found), (_, wanted) in zip(member.shared, first.shared, strict=True):
        if found != wanted:
            return f"{field} is {found}, and that of {first.name} is {wanted}"
    if member.image and first.image and member.image != first.image:
        return f"its image is {member.image}, and that of {first.name} is {first.image}"
    if member.base and first.base and member.base != first.base:
        return f"its 4-bit base has other bytes than that of {first.name}, perhaps of another commit of the model"
    return ""


def joint_peak(members: Sequence[Member]) -> JointPeak | None:
    """What the GPU needs to train these together; None if that of one is not known."""
    shares = [member.memory for member in members if member.memory is not None]
    return add_up(shares) if len(shares) == len(members) > 0 else None


def waiting_members(own: Member, others: Sequence[Member]) -> list[Member]:
    """The jobs of which a group can be formed, prepared ones first; those that are in a group already are not."""
    taken = {uid for member in (own, *others) for uid in member.leads}
    free = (member for member in (own, *others) if not (member.deleting or member.leader_uid or member.uid in taken))
    return sorted((member for member in free if member.state != "trains"), key=lambda member: member.rank)


def fitting_members(own: Member, others: Sequence[Member]) -> list[Member]:
    """Those of the waiting jobs, in their order, of which a group with the job can be formed, it among them."""
    return next((each for each in _fitting(own, others) if own in each), [])


def odd_against(own: Member, others: Sequence[Member]) -> Member | None:
    """One of the jobs that most of those that wait fit, if the job does not and its own group lacks some; else None."""
    fitting = _fitting(own, others)
    most = max(fitting, key=len, default=[])
    if own in most or len(next((each for each in fitting if own in each), [])) >= own.size:
        return None
    return next(iter(most), None)


def _fitting(own: Member, others: Sequence[Member]) -> list[list[Member]]:
    """The waiting jobs by what they must share, each list in their order.

    One whose image or base is not known yet is among those of the most that it fits. So is one that has ended, of which
    neither matters any more.
    """
    # Looked up by what each has: of thousands of jobs that all differ, each would be compared with all others.
    found: dict[object, list[list[Member]]] = {}
    for member in waiting_members(own, others):
        known = member if member.state != "ended" else replace(member, image="", base="")
        alike = found.setdefault((member.size, member.shared), [])
        fits = [each for each in alike if not difference(known, each[0])]
        if fits:
            max(fits, key=len).append(member)
        elif member.state != "ended":
            alike.append([member])
    return [each for alike in found.values() for each in alike]


def _state(job: QLoRAJob) -> State:
    status = job.status
    if is_finished(status):
        return "ended"
    if status.resolved is None or status.step is None:
        return "new"
    if status.step.name == "prepare":
        return "started"
    if status.step.name != "train" or status.step.job_uid:
        return "trains"
    return "started" if job.spec.suspend or job.problem else "prepared"


def _has_begun(status: QLoRAJobStatus) -> bool:
    return status.step is not None and (status.step.name != "prepare" or bool(status.step.job_uid))


def _doing(job: QLoRAJob, state: State) -> str:
    if state == "ended":
        return "ended"
    if job.spec.suspend:
        return "suspended"
    if job.problem:
        return "InvalidSpec"
    if state == "started":
        return "preparing"
    why = condition(job.status, "Succeeded")
    return "new" if why is None or why.reason == "Pending" else why.reason


def _shared(job: QLoRAJob) -> tuple[tuple[str, str], ...]:
    spec, resolved = job.spec.dump(), job.status.resolved
    values = {f"spec.{part}.{field}": spec[part].get(field) for part, fields in _FIELDS.items() for field in fields}
    fixed = job if resolved is None else resolved
    values |= {"its queue": fixed.queue_name, "its priority in the queue": fixed.queue_priority}
    return tuple((field, "not set" if value is None else str(value)) for field, value in values.items())


def _waits(status: QLoRAJobStatus) -> Reason | None:
    why = condition(status, "Succeeded")
    return None if why is None else Reason(why.reason, why.message)


def _too_large(status: QLoRAJobStatus) -> str:
    failure, step = status.last_failure, status.step
    if not is_finished(status) or failure is None or step is None or step.job_uid:
        return ""
    return failure.message if (failure.step, failure.reason) == ("train", TOO_LARGE) else ""
