"""Ends the jobs of a group that surely does not fit the GPU, before a GPU is asked for; pure.

The leader judges, once all others have noted that it trains them: until then one of them may still leave. Each of the
others ends when it sees that its leader has, with the same message. Whoever is retried is trained alone.
"""

from collections.abc import Sequence
from dataclasses import replace

from qlora_api.memory.advice import budget, verdict
from qlora_api.memory.estimate import GIB
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.groups.group import leads, led_by_itself, waits_for_group
from qlora_operator.decisions.observed.conditions import is_finished
from qlora_operator.decisions.observed.endings import fail, failure_of
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.members import TOO_LARGE, Member, joint_peak, member_of


def enforce_group_memory(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """The status after the end of a job that is to be trained by a pod whose GPU is too small for its group."""
    step, job = status.step, facts.job
    if is_finished(status) or job.spec.suspend or step is None or step.name != "train" or step.job_uid:
        return status
    own = member_of(replace(job, status=status))
    if own is None or facts.group is None:
        return status
    others = facts.group.others
    if leads(job, status):
        # A group that has been trained for a while fits, whatever the estimate is now.
        first = step.attempt == status.first_attempt and waits_for_group(status, facts) is None
        message = _objection([own, *(member for member in others if _is_trained_by(own, member))]) if first else ""
    else:
        message = next((member.too_large for member in others if _has_led(member, own)), "")
        status = led_by_itself(job, status) if message else status
    return fail(status, facts, failure_of("train", TOO_LARGE, message, facts)) if message else status


def _is_trained_by(leader: Member, member: Member) -> bool:
    noted = member.uid in leader.leads and member.leader_uid == leader.uid
    return noted and member.state == "prepared" and not member.deleting


def _has_led(leader: Member, member: Member) -> bool:
    return leader.uid == member.leader_uid and member.uid in leader.leads


def _objection(members: Sequence[Member]) -> str:
    """Why these jobs cannot be trained together; empty if they can, or if that is unknown."""
    peak = joint_peak(members)
    sizes = [member.gpu_gib for member in members if member.gpu_gib is not None]
    gpu_gib = min(sizes, default=None)
    if len(members) == 1 or peak is None or gpu_gib is None or verdict(peak, gpu_gib) != "exceeds":
        return ""
    return (
        f"trained together, the {len(members)} jobs of group {members[0].group!r} need about "
        f"{peak.expected / GIB:.1f} GiB of GPU memory (at least {peak.low / GIB:.1f}), but a GPU of {gpu_gib} GiB "
        f"(spec.resources.gpuMemory) has {budget(gpu_gib) / GIB:.1f} to use: create the jobs again with a smaller "
        "spec.group.size (in a sweep, spec.cellsPerPod), spec.training.microBatchSize or maxSequenceLength; one "
        "that is retried is trained alone"
    )
