"""Measures the entry of one pod: the seconds that it has its GPUs, its start, its end and what is in no checkpoint."""

from datetime import datetime, timedelta

from qlora_api.contract import ResultRecord
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus
from qlora_api.usage import PodEnd, PodUsage
from qlora_operator.decisions.observed.conditions import is_finished
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import ChildJob, Observed, Pod, QLoRAJob, format_time, parse_time
from qlora_operator.decisions.pods.attempts import LONGEST_WITHOUT_NEWS, is_stopped_on_purpose


def is_over(pod: Pod) -> bool:
    """Whether the trainer of the pod has ended."""
    return pod.ended or pod.termination is not None


def has_node_since(pod: Pod) -> datetime | None:
    """Return when the pod got its node, or None if it has none."""
    started = pod.termination.started if pod.termination else None
    return pod.scheduled or pod.running_since or started


def share_of_job(entry: PodUsage) -> float:
    """The part of the pod's further time that counts for the job."""
    return ((entry.trained is None) + len(entry.taken_over or ())) / entry.jobs


def last_counted(entry: PodUsage) -> datetime:
    """Until when its seconds are counted."""
    return parse_time(entry.since) + timedelta(seconds=entry.seconds)


def owner_of(pod: Pod, observed: Observed) -> ChildJob | None:
    """Return the Job of the pod, or None if it is gone."""
    return next((child for child in observed.children if child.uid == pod.owner_uid), None)


def advance_entry(entry: PodUsage, pod: Pod, status: QLoRAJobStatus, facts: Facts) -> PodUsage:
    """Return the current entry of a pod, with its end and its loss if it has ended."""
    record = facts.progress
    if record is not None and not _reports_on(record.pod_uid, pod, facts.observed):
        record = None
    result = pod.result(facts.job.run_uid, "train")
    trained_since = (record and record.training_since) or (result and result.training_since) or entry.trained_since
    if record is not None and entry.from_step is None and record.training_since is not None:
        entry = replace(entry, from_step=record.training_step)
    over = is_over(pod)
    until = facts.now if not over else _ended_at(entry, pod, facts.now)
    seconds = max(0, int((until - parse_time(entry.since)).total_seconds()))
    entry = replace(entry, seconds=seconds, trained_since=trained_since)
    if pod.missed_peers:
        # Of several nodes, it has waited for the others until the limit.
        return replace(entry, startup_seconds=seconds, end=entry.end or "disruption")
    return with_end(entry, _end_of(pod, facts.job, facts.observed), status, result) if over else _with_startup(entry)


def _reports_on(reporting: str, pod: Pod, observed: Observed) -> bool:
    """Whether the pod of that UID reports for this one too, as node 0 does."""
    if reporting == pod.uid:
        return True
    return any(each.uid == reporting and each.owner_uid == pod.owner_uid for each in observed.pods)


def _ended_at(entry: PodUsage, pod: Pod, now: datetime) -> datetime:
    """Return the latest possible end of the pod: an evicted one may not report one."""
    if pod.termination is not None and pod.termination.finished is not None:
        return pod.termination.finished
    if entry.end is not None:
        return last_counted(entry)  # decided when it was first seen
    return min(now, pod.deletion_requested or now, last_counted(entry) + LONGEST_WITHOUT_NEWS)


def _end_of(pod: Pod, job: QLoRAJob, observed: Observed) -> PodEnd:
    """Classify the end of a pod for the usage: a stop on purpose is no disruption."""
    if pod.exited_well:
        return "completed"
    if pod.interrupted or pod.lost_peer:
        child = owner_of(pod, observed)
        deleted = pod.deletion_requested is not None and pod.disruption is None and is_given_up(child, job)
        return "suspension" if deleted or is_stopped_on_purpose(child, job, pod) else "disruption"
    return "failure"


def is_given_up(child: ChildJob | None, job: QLoRAJob) -> bool:
    """Whether the operator deletes this train Job: its watch may show that after the end of the pods."""
    step = job.status.step
    left = step is not None and step.name == "train" and child is not None and child.name != step.job_name
    return left or is_finished(job.status)


def _with_startup(entry: PodUsage) -> PodUsage:
    if entry.trained_since is None:
        return entry
    startup = int((parse_time(entry.trained_since) - parse_time(entry.since)).total_seconds())
    return replace(entry, startup_seconds=min(entry.seconds, max(0, startup)))


def with_end(entry: PodUsage, end: PodEnd, status: QLoRAJobStatus, result: ResultRecord | None) -> PodUsage:
    """The entry of a pod that has ended, with the seconds that are in no checkpoint."""
    entry = replace(_with_startup(entry), end=entry.end or end)
    if end == "completed":
        return entry
    if entry.trained_since is not None and result is not None and result.outcome == "interrupted":
        return entry  # it has saved a checkpoint before it ended
    saved = status.checkpoint.saved_at if status.checkpoint is not None else None
    kept_until = max(filter(None, (entry.trained_since, saved)), key=parse_time, default=entry.since)
    kept = int((parse_time(kept_until) - parse_time(entry.since)).total_seconds())
    lost = entry.seconds - min(entry.seconds, max(kept, entry.startup_seconds))
    return replace(entry, lost_seconds=lost)


def entry_from(start: datetime, entry: PodUsage) -> PodUsage:
    """The entry without its time before `start`."""
    earlier = max(0, int((start - parse_time(entry.since)).total_seconds()))
    return replace(entry_after(earlier, entry), since=format_time(start)) if earlier else entry


def entry_after(earlier: int, entry: PodUsage) -> PodUsage:
    """The entry with the numbers of what comes after so many seconds of the pod."""
    seconds, startup = max(0, entry.seconds - earlier), max(0, entry.startup_seconds - earlier)
    lost = min(entry.lost_seconds, seconds - startup)
    return replace(entry, seconds=seconds, startup_seconds=startup, lost_seconds=lost)
