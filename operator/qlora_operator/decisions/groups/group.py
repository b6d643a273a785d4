"""Decides which jobs are trained together, by which of them, and what each of them waits for; pure.

The first prepared job by name leads: its train Job trains all. That it does, and whom, is stored in its status before
that Job exists, and who leads, in the status of each of the others, for which the leader waits. So every later pass
decides the same, also after a restart. Each of the others runs its own train step once that of the leader is over.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from qlora_api.memory.estimate import GIB
from qlora_api.naming import child_job_name
from qlora_api.profile import Limits
from qlora_api.spec.group import GroupMemberStatus, GroupStatus
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.members import (
    GroupFacts,
    Member,
    PodName,
    difference,
    fitting_members,
    joint_peak,
    member_of,
    odd_against,
    waiting_members,
)
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, Reason

MAX_DOCUMENTS = 240_000
"""Bytes of what one pod reads of all its jobs: all annotations of a pod may have 262,144 together, and each job may get
a gate when it has started."""
LOOK_INTERVAL = timedelta(seconds=15)
"""What is shown about the others wakes few of those who wait for it."""
_JOBS_AT_THAT_PACE = 64
_WAITING = "WaitingForGroup"


def leads(job: QLoRAJob, status: QLoRAJobStatus) -> bool:
    """Whether the job's own train Job trains its group: the others, or it alone if none of them takes part any more."""
    return status.group is not None and status.group.leader_uid == job.uid


def objection_of_group(facts: Facts) -> Reason | None:
    """Why the job must not start, as it could not be trained together with the others; None if it may."""
    own = _own(facts, facts.job.status)
    if own is None or facts.group is None or own.leader_uid:
        return None
    name = facts.job.spec.scheduling.profile
    profile = facts.profiles.get(name)
    limit = (profile.limits or Limits()).jobs if profile is not None else None
    if limit is not None and limit < own.size:
        return Reason(
            "LimitExceeded",
            f"spec.group.size is {own.size}, and profile {name!r} allows {limit} jobs at a time: create the jobs again "
            "in a smaller group, or with another profile",
        )
    return _mismatch(own, facts.group.others)


def image_of_group(facts: Facts) -> str:
    """The trainer's image with which the others have started that the job is to join; empty if none of them has."""
    own = _own(facts, facts.job.status)
    if own is None or facts.group is None or own.leader_uid:
        return ""
    own = replace(own, state="new", image="", base="")
    fitting = fitting_members(own, facts.group.others)
    return next((member.image for member in fitting if member.image and member.state != "ended"), "")


def yet_to_start(facts: Facts) -> int:
    """How many jobs must still start before a group with this new one is complete, it among them; 1 without a group."""
    own = _own(facts, facts.job.status)
    if own is None or facts.group is None or own.state != "new":
        return 1
    begun = sum(member.state != "new" for member in fitting_members(own, facts.group.others))
    return own.size - begun % own.size


def join_group(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """The status with the leader of its group, as soon as there is one, and with whom it trains if that is the job.

    A job that cannot take part in the group that was formed with it is trained alone. That is stored too, also in a job
    that has failed: the leader may be gone when it is retried.
    """
    own = _own(facts, status)
    if own is None or facts.group is None:
        return status
    others = facts.group.others
    if own.leader_uid:
        return _without_absent(status, own, others) if own.state == "prepared" else status
    leader = next((member for member in others if own.uid in member.leads), None)
    if leader is not None:
        return _joined(own, status, leader)
    chosen = _chosen(own, others) if own.state == "prepared" else None
    if chosen is None or chosen[0].uid != own.uid:
        return status
    return _led_by(own, status, list(map(_named, chosen)))


def alone(job: QLoRAJob, status: QLoRAJobStatus) -> QLoRAJobStatus:
    """The status of a job that is retried: if it has led its group, it does so no more."""
    return led_by_itself(job, status) if leads(job, status) else status


def led_by_itself(job: QLoRAJob | Member, status: QLoRAJobStatus) -> QLoRAJobStatus:
    """The status of a job that is trained alone."""
    return _led_by(job, status, [_named(job)])


def waits_for_group(status: QLoRAJobStatus, facts: Facts) -> Reason | None:
    """Why the job gets no train Job of its own yet, because of the others; None if it does, or has one.

    The word is Training while the leader's pod trains it.
    """
    own, group, step = _own(facts, status), facts.group, status.step
    if own is None or group is None or step is None or step.name != "train" or step.job_uid:
        return None
    if status.group is None:
        return _until_formed(own, group.others)
    if status.group.leader_uid == own.uid:
        return _until_noted(own, group.others)
    return _until_trained(own, status.group, group)


def look_again_after(status: QLoRAJobStatus, facts: Facts) -> timedelta | None:
    """When to look at the others again; None if the job does not wait for them.

    Less often in a group of thousands, which is somebody's mistake: each pass looks at all of them.
    """
    waits = waits_for_group(status, facts) or (status.resolved is None and objection_of_group(facts))
    if not waits or facts.group is None:
        return None
    return LOOK_INTERVAL * (1 + len(facts.group.others) // _JOBS_AT_THAT_PACE)


def reporting(job: QLoRAJob, observed: Observed, group: GroupFacts | None) -> tuple[PodName | None, tuple[str, ...]]:
    """The pod whose log tells of the job's progress, and the UIDs of the other jobs that it trains if it is its own."""
    step, joined = job.status.step, job.status.group
    pod = observed.reporting_pod(step.job_uid) if step else None
    if pod is not None:
        return PodName(pod.name, pod.uid), tuple(member.uid for member in _others(job, job.status))
    if step is None or step.name != "train" or step.job_uid or joined is None or group is None:
        return None, ()
    leader = _leader(joined, group.others)
    return (leader.pod if leader is not None and job.uid in leader.leads else None), ()


def trained_by(status: QLoRAJobStatus, facts: Facts) -> str:
    """The job whose pod trains this one now; empty if none does."""
    joined, group = status.group, facts.group
    leader = None if joined is None or group is None else _leader(joined, group.others)
    trains = leader is not None and leader.pod is not None and facts.job.uid in leader.leads
    return leader.name if trains and leader is not None and leader.uid != facts.job.uid else ""


def suffix(facts: Facts, status: QLoRAJobStatus) -> str:
    """What is to be said of the others, behind what the job's own train Job does; empty if there are none."""
    job, group = facts.job, status.group
    if group is None or status.step is None or status.step.name != "train":
        return ""
    if others := _others(job, status):
        return f"; its Job trains {_names([each.name for each in others])} too, on the same base{_needs(facts, others)}"
    return "" if leads(job, status) else f"; {group.leader} no longer trains this job"


def _needs(facts: Facts, others: Sequence[GroupMemberStatus]) -> str:
    uids, around = {other.uid for other in others}, facts.group.others if facts.group is not None else ()
    own = _own(facts, facts.job.status)
    trained = [member for member in (own, *around) if member is not None and (member is own or member.uid in uids)]
    peak = joint_peak(trained) if len(trained) > len(others) else None
    if peak is None:
        return ", which needs more GPU memory than status.memory says for this job alone"
    return f": about {peak.expected / GIB:.1f} GiB of GPU memory for all"


def trains_now(leader: QLoRAJob, job: QLoRAJob) -> bool:
    """Whether a job of the group, as it is now, is one of those that the train Job of the leader is to train."""
    member, joined = member_of(job), job.status.group
    listed = any(each.uid == job.uid for each in _others(leader, leader.status))
    noted = joined is not None and joined.leader_uid == leader.uid
    return listed and noted and member is not None and member.state == "prepared" and not member.deleting


def lingering(job: QLoRAJob, leader: QLoRAJob | None, observed: Observed) -> str:
    """A train pod of the job's leader that runs, or a train Job that may start one, for people; empty for none.

    `leader`: None if it is deleted. `observed`: its children. A Job that it has got since it trains this job no more
    does not count.
    """
    joined = job.status.group
    if joined is None:
        return ""
    member = None if leader is None else member_of(leader)
    trains = member is None or job.uid in member.leads
    later = "" if trains or leader is None or leader.status.step is None else leader.status.step.job_uid
    return left_of_train(joined.leader, observed, later=later)


def left_of_train(name: str, observed: Observed, *, later: str = "") -> str:
    """A train pod of the job of that name that runs, or a train Job that may start one, for people; empty for none.

    `observed`: the job's children. `later`: UID of a Job that does not count.
    """
    train = child_job_name(name, "train", 0).removesuffix("0")
    for pod in observed.live_pods:
        if pod.name.startswith(train) and (not later or pod.owner_uid != later):
            return f"pod {pod.name}"
    for child in observed.children:
        if child.name.startswith(train) and not (child.finished or child.deleting) and child.uid != later:
            return f"Job {child.name}"
    return ""


def waiting_for(job: QLoRAJob, status: QLoRAJobStatus, others: Sequence[Member]) -> list[str]:
    """The names of the jobs for which it matters that the job's stored status is now this one."""
    before, after = member_of(job), member_of(replace(job, status=status))
    if after is None or before == after:
        return []
    if after.leads:
        return [member.name for member in others if member.uid in after.leads]
    if after.leader_uid:
        return [member.name for member in others if member.uid == after.leader_uid]
    waiting = waiting_members(after, others)[: after.size]
    return [member.name for member in waiting if member.uid != after.uid]


def _others(job: QLoRAJob, status: QLoRAJobStatus) -> list[GroupMemberStatus]:
    """The other jobs that the job's own train Job trains."""
    members = status.group.members if status.group is not None and leads(job, status) else None
    return [member for member in members or () if member.uid != job.uid]


def _named(job: QLoRAJob | Member) -> GroupMemberStatus:
    return GroupMemberStatus(name=job.name, uid=job.uid)


def _own(facts: Facts, status: QLoRAJobStatus) -> Member | None:
    return member_of(replace(facts.job, status=status))


def _mismatch(own: Member, others: Sequence[Member]) -> Reason | None:
    """Why the job cannot be trained together with most of those that wait; None if it can, or with enough others."""
    first = odd_against(own, others)
    if first is None:
        return None
    return Reason(
        "GroupMismatch",
        f"this job cannot be trained together with {first.name} in group {own.group!r}: {difference(own, first)}; "
        "delete this job and create it again like that one, or with another spec.group.name",
    )


def _chosen(own: Member, others: Sequence[Member]) -> list[Member] | None:
    """The jobs that are trained together, the leader first; None as long as there are not enough."""
    chosen = fitting_members(own, others)[: own.size]
    if len(chosen) < own.size or not all(map(_is_ready, chosen)) or _bytes(chosen) > MAX_DOCUMENTS:
        return None
    return chosen


def _is_ready(member: Member) -> bool:
    """Whether the others need not wait for it: those that have ended hold nobody back."""
    return member.state in ("prepared", "ended")


def _bytes(chosen: Sequence[Member]) -> int:
    return sum(member.document_bytes for member in chosen if member.state != "ended")


def _joined(own: Member, status: QLoRAJobStatus, leader: Member) -> QLoRAJobStatus:
    """The status of a job that is one of the leader's: trained by it or, if it is too late or does not fit, alone."""
    if own.state != "prepared" or leader.state in ("trains", "ended") or difference(own, leader):
        # It had failed when the group was formed, or was suspended then: the leader's Job is created without it.
        return led_by_itself(own, status)
    return status.model_copy(update={"group": GroupStatus(leader=leader.name, leader_uid=leader.uid)})


def _led_by(own: QLoRAJob | Member, status: QLoRAJobStatus, members: Sequence[GroupMemberStatus]) -> QLoRAJobStatus:
    group = GroupStatus(leader=own.name, leader_uid=own.uid, members=tuple(members))
    return status.model_copy(update={"group": group})


def _without_absent(status: QLoRAJobStatus, own: Member, others: Sequence[Member]) -> QLoRAJobStatus:
    """The status of a leader that is about to get a train Job, without those who are suspended, gone or another's.

    What it does not train goes on alone, so that its status must not say that it does. Who has not noted the leader
    stays: that one could not know otherwise that the group was formed with it, and would wait for another one.
    """
    group = status.group
    if group is None or group.leader_uid != own.uid:
        return status
    present = {
        member.uid
        for member in (own, *others)
        if not member.deleting and (not member.leader_uid or (member.leader_uid == own.uid and _is_ready(member)))
    }
    kept = [member for member in group.members or () if member.uid in present]
    return status if len(kept) == len(group.members or ()) else _led_by(own, status, kept)


def _until_formed(own: Member, others: Sequence[Member]) -> Reason:
    """What the job waits for before it is known with whom it is trained."""
    if mismatch := _mismatch(own, others):
        return mismatch
    candidates = fitting_members(own, others)
    first = [] if own in candidates[: own.size] else candidates[: own.size]
    chosen = candidates[len(first) : len(first) + own.size]
    if (size := _bytes(chosen)) > MAX_DOCUMENTS:
        return Reason(
            "SpecTooLarge",
            f"the specs of group {own.group!r} have {size} bytes as JSON; the limit is {MAX_DOCUMENTS}: create its "
            "jobs again in smaller groups, or with shorter texts",
        )
    ready, missing = sum(map(_is_ready, chosen)), own.size - len(chosen)
    awaited = [f"{member.name} ({member.doing})" for member in chosen if not _is_ready(member)]
    awaited += [f"{missing} that {'does' if missing == 1 else 'do'} not exist yet"] if missing else []
    before = f"{_names([member.name for member in first])} are trained first; then " if first else ""
    counted = f"{ready} of {own.size} jobs of group {own.group!r} are prepared"
    return Reason(_WAITING, f"{before}{counted}{f': waiting for {_names(awaited)}' if awaited else ''}")


def _until_noted(own: Member, others: Sequence[Member]) -> Reason | None:
    """What a leader waits for: who has noted that it is trained by another job does not begin by itself."""
    late = [
        member.name
        for member in others
        if member.uid in own.leads and member.state == "prepared" and member.leader_uid != own.uid
    ]
    if not late:
        return None
    have = "has" if len(late) == 1 else "have"
    return Reason(_WAITING, f"the group is complete; training starts once {_names(late)} {have} recorded their leader")


def _until_trained(own: Member, joined: GroupStatus, group: GroupFacts) -> Reason | None:
    """What a job waits for that is trained by another one."""
    leader = _leader(joined, group.others)
    if leader is None or leader.trained or own.uid not in leader.leads:
        if not group.lingering:
            return None
        return Reason("WaitingForPod", f"{group.lingering} of {joined.leader} must end before this job goes on")
    if leader.pod is not None:
        return Reason("Training", f"the adapter is being trained by QLoRAJob {leader.name}, in pod {leader.pod.name}")
    why = f": {leader.waits.sentence}" if leader.waits is not None else ""
    return Reason(
        "WaitingForLeader",
        f"waiting for QLoRAJob {leader.name}, whose pod trains this job and is not running{why}",
    )


def _leader(joined: GroupStatus, others: Sequence[Member]) -> Member | None:
    return next((member for member in others if member.uid == joined.leader_uid and not member.deleting), None)


def _names(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
