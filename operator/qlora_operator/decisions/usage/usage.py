"""Counts the GPU seconds of a job's train pods, and those in no checkpoint.

`status.usage.pods` has an entry for each of the latest pods, whose numbers only grow, and the sums grow by as much. So
a pod counts once, however often and in whatever order it is observed, and after a restart as before. An entry is
dropped once its pod has ended and many have come after it. `countedUntil` is when the last pod without an entry was
created, and `endedUntil` when the last of them had ended: a pod that was created before the one and has GPUs after the
other waited for its node in between, and counts from then on. So a user who makes many pods of a job hides none of the
others.

The pod of a sweep trains several cells, and each has an even part of its time: the sweep counts it, and the cells copy
the entry from the sweep's status. One that is deleted, or has ended, copies no more: its part of the pod's later time
is the sweep's, for good. The entry has the second of that change: the last that was stored until then, so that no other
could be copied. So each second of each part counts once, also if a cell comes back.
"""

from collections.abc import Iterable, Iterator, Set
from datetime import datetime, timedelta
from typing import Any

from qlora_api.forecast import cost_text
from qlora_api.naming import child_job_name
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, StepStatus
from qlora_api.usage import LostGpuTime, PodEnd, PodUsage, TakenOverPart, UsageStatus
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Observed, Pod, QLoRAJob, format_time, parse_time
from qlora_operator.decisions.observed.shared_pod import SharedPod
from qlora_operator.decisions.pods.attempts import LONGEST_WITHOUT_NEWS, is_stopped_on_purpose
from qlora_operator.decisions.usage.entries import (
    advance_entry,
    entry_after,
    entry_from,
    has_node_since,
    is_given_up,
    is_over,
    last_counted,
    owner_of,
    share_of_job,
    with_end,
)

_KEPT_PODS = 8
"""Pods that have ended and are still listed; of several nodes, so many more as an attempt has pods."""
_MOST_PODS = 88
"""Own pods that have not ended and are listed. A user may make thousands that look like those of the Job: as long as
one of these holds back an entry, 88 count."""
_MOST_LISTED = 160
"""Entries, above which those of pods that have ended are dropped although an earlier pod is still to be listed."""
_SEEN_AFTER = 60
"""Seconds for which a pod has its GPUs before it is listed, if its trainer does not run until then."""
_LONGEST_UNCOUNTED = timedelta(minutes=5)
"""The longest uncounted time of a silent running pod: it is lost if the pod vanishes."""


def count_usage(status: QLoRAJobStatus, facts: Facts, *, until_now: bool = False) -> QLoRAJobStatus:
    """Count the GPU time of every train pod that is observed, or has vanished.

    The time of running pods is updated where a report of progress changes the status anyway, every five minutes, or
    with `until_now`: it is no reason for a write more often.
    """
    gpus = gpus_of_a_pod(facts.job, status)
    if not gpus:
        return status
    before = status.usage or UsageStatus()
    current = until_now or _has_news(status, facts.job.status)
    entries = {entry.uid: entry for entry in before.pods}
    found = {entry.uid: entry for entry in _observed(status, facts, before, current=current)}
    found |= {entry.uid: entry for entry in _vanished(status, facts, before)}
    found |= {entry.uid: entry for entry in _of_sweep(facts, before, current=current)}
    merged = [_merged(entries.get(uid), entry, facts.gone) for uid, entry in found.items()]
    changed = [entry for entry in merged if entry != entries.get(entry.uid)]
    if not changed:
        return status
    lost, seconds = before.lost_gpu_seconds, before.gpu_seconds
    for entry in changed:
        seconds += _part(entry, "seconds", gpus) - _part(entries.get(entry.uid), "seconds", gpus)
        lost = _with_losses(lost, entries.get(entry.uid), entry, gpus)
    listed = sorted((entries | {entry.uid: entry for entry in changed}).values(), key=lambda each: each.created)
    usage = _with_pods(before, listed, _next_to_list(listed, before, status, facts), facts)
    usage = replace(usage, gpu_seconds=seconds, lost_gpu_seconds=lost)
    return replace(status, usage=_with_cost(usage, status))


def gpus_of_a_pod(job: QLoRAJob, status: QLoRAJobStatus) -> int:
    """Return the GPUs of one train pod, 0 if the profile gives it none."""
    if status.resolved is None or not status.resolved.profile.gives_gpus:
        return 0
    return job.spec.resources.gpus


def used_seconds(status: QLoRAJobStatus) -> int:
    """GPU seconds that are counted."""
    return 0 if status.usage is None else status.usage.gpu_seconds


def gpus_at_a_time(job: QLoRAJob, status: QLoRAJobStatus, pods: Iterable[Pod]) -> float:
    """Return the job's GPUs now, its part only of a pod that trains several cells."""
    return gpus_of_a_pod(job, status) * sum(map(share_of_job, _running(status, pods)))


def uncounted_seconds(job: QLoRAJob, status: QLoRAJobStatus, pods: Iterable[Pod], now: datetime) -> float:
    """GPU seconds that its pods which run have had since they were last counted."""
    gpus = gpus_of_a_pod(job, status)
    running = _running(status, pods)
    return gpus * sum((now - last_counted(entry)).total_seconds() * share_of_job(entry) for entry in running)


def counted_again_at(status: QLoRAJobStatus, pods: Iterable[Pod]) -> datetime | None:
    """Return when to recount a silent running pod, or None if none runs."""
    return min((last_counted(entry) + _LONGEST_UNCOUNTED for entry in _running(status, pods)), default=None)


def _running(status: QLoRAJobStatus, pods: Iterable[Pod]) -> list[PodUsage]:
    """The entries of the pods that have their GPUs."""
    running = {pod.uid for pod in pods if not is_over(pod)}
    return [entry for entry in (status.usage.pods if status.usage else ()) if entry.uid in running]


def has_gpus(pod: Pod) -> bool:
    """Whether it has a node, and so its GPUs, and its trainer has not ended."""
    return has_node_since(pod) is not None and not is_over(pod)


def still_counts(job: QLoRAJob) -> bool:
    """Whether a pod of the job, also a vanished one, is not counted to its end."""
    usage, own = job.status.usage, _train(job)
    return usage is not None and any(entry.end is None and entry.name.startswith(own) for entry in usage.pods)


def _has_news(status: QLoRAJobStatus, stored: QLoRAJobStatus) -> bool:
    before, now = stored.progress, status.progress
    return now is not None and (before is None or before.updated_at != now.updated_at)


def _is_behind(entry: PodUsage, now: datetime) -> bool:
    """Whether a pod that is listed was last counted long ago."""
    return now - last_counted(entry) >= _LONGEST_UNCOUNTED


def _observed(status: QLoRAJobStatus, facts: Facts, before: UsageStatus, *, current: bool) -> Iterator[PodUsage]:
    """The entries of the pods that are observed, as they are now."""
    listed = {entry.uid: entry for entry in before.pods}
    owners = _owners(facts.observed, status.step, facts.job.status.step)
    # A Job that was deleted, or that the step has left and is about to delete, may be known for the last time.
    left = owners - {status.step.job_uid if status.step is not None else ""}
    room = _MOST_PODS - sum(entry.end is None for entry in before.pods)
    crowded = len(before.pods) + len(facts.observed.pods) > _MOST_LISTED
    for pod in facts.observed.pods:
        since, entry = has_node_since(pod), listed.get(pod.uid)
        if since is None or not pod.name.startswith(_train(facts.job)):
            continue
        if entry is None:
            due = pod.running or crowded or (facts.now - since).total_seconds() >= _SEEN_AFTER or pod.owner_uid in left
            if pod.owner_uid not in owners or not (is_over(pod) or (room > 0 and due)):
                continue
            uncounted = _uncounted_since(pod, since, before)
            if uncounted is None:
                continue
            room -= not is_over(pod)
            times: dict[str, Any] = {"created": format_time(pod.created), "since": format_time(uncounted)}
            jobs: dict[str, Any] = {"jobs": len(facts.trains), "trained": facts.trains} if facts.trains else {}
            entry = PodUsage(name=pod.name, uid=pod.uid, **times, **jobs)
            yield advance_entry(entry, pod, status, facts)
        elif (current or is_over(pod) or _is_behind(entry, facts.now)) and not _ends_its_job(pod, facts.observed):
            # Also if it had vanished: a user may have hidden it from the watches.
            yield advance_entry(entry, pod, status, facts)


def _owners(observed: Observed, *steps: StepStatus | None) -> set[str]:
    """The UIDs of the Jobs whose pods are the job's: any user may set labels and a name."""
    return {child.uid for child in observed.children} | {step.job_uid for step in steps if step is not None} - {""}


def _ends_its_job(pod: Pod, observed: Observed) -> bool:
    """Whether it is counted with the end of its Job, which follows immediately."""
    child = owner_of(pod, observed)
    return pod.decisive and not pod.detached and child is not None and not child.finished


def _uncounted_since(pod: Pod, since: datetime, before: UsageStatus) -> datetime | None:
    """Return the start of an unlisted pod's uncounted time, or None without any."""
    dropped_until = _dropped_until(pod.created, before)
    if dropped_until is None or not is_over(pod):
        return max(since, dropped_until or since)
    finished = pod.termination.finished if pod.termination is not None else None
    return max(since, dropped_until) if finished is not None and finished > dropped_until else None


def _dropped_until(created: datetime, before: UsageStatus) -> datetime | None:
    """Return the end of an unlisted pod's time in the sums, or None without any."""
    if before.counted_until is None or created > parse_time(before.counted_until):
        return None
    return parse_time(before.ended_until or before.counted_until)


def _train(job: QLoRAJob) -> str:
    """How the names of the train step's pods begin."""
    return child_job_name(job.name, "train", 0).removesuffix("0")


def _vanished(status: QLoRAJobStatus, facts: Facts, before: UsageStatus) -> Iterator[PodUsage]:
    """Yield entries of pods that are gone without an end, by force or with their node."""
    there, own = {pod.uid for pod in facts.observed.pods}, _train(facts.job)
    for entry in before.pods:
        if entry.uid in there or entry.end is not None or not entry.name.startswith(own):
            continue
        since, seen, step = entry.since, last_counted(entry), facts.job.status.step
        if step is not None and step.running_pod == entry.uid and step.progressed_at is not None:
            since, seen = step.running_since or since, max(seen, parse_time(step.progressed_at))
        later = [pod.created for pod in facts.observed.pods if pod.created > seen]
        until = min(facts.now, seen + LONGEST_WITHOUT_NEWS, *later)
        seconds = max(0, int((until - parse_time(entry.since)).total_seconds()))
        jobs = (child for child in facts.observed.children if f"{entry.name}-".startswith(f"{child.name}-"))
        child = next(jobs, None)
        on_purpose = is_given_up(child, facts.job) or is_stopped_on_purpose(child, facts.job, parse_time(since))
        end: PodEnd = "suspension" if on_purpose else "disruption"
        yield with_end(replace(entry, seconds=seconds), end, status, None)


def _of_sweep(facts: Facts, before: UsageStatus, *, current: bool) -> Iterator[PodUsage]:
    """Yield the entries of the sweep's pods that train, or have trained, the job."""
    known = {entry.uid: entry for entry in before.pods}
    for entry in _copied(facts.job, facts.shared):
        old = known.get(entry.uid)
        if old is None and not _is_uncounted(entry, before):
            continue
        start = parse_time(old.since) if old else _dropped_until(parse_time(entry.created), before)
        counted = old or replace(entry, seconds=0)
        if current or entry.end is not None or _is_behind(counted, facts.now):
            yield entry if start is None else entry_from(start, entry)


def _copied(job: QLoRAJob, shared: SharedPod | None) -> Iterator[PodUsage]:
    """Yield the sweep's entries up to the takeover of the cell's part by the sweep."""
    for entry in shared.counted if shared is not None else ():
        parts = (part.after_seconds for part in entry.taken_over or () if part.uid == job.uid)
        later = entry_after(next(parts, entry.seconds), entry)
        yield replace(
            entry,
            trained=None,
            taken_over=None,
            seconds=entry.seconds - later.seconds,
            startup_seconds=entry.startup_seconds - later.startup_seconds,
            lost_seconds=entry.lost_seconds - later.lost_seconds,
        )


def _is_uncounted(entry: PodUsage, before: UsageStatus) -> bool:
    """Whether some time of a sweep's pod that is not listed here is in no sum."""
    dropped_until = _dropped_until(parse_time(entry.created), before)
    return dropped_until is None or entry.end is None or last_counted(entry) > dropped_until


def _merged(old: PodUsage | None, new: PodUsage, gone: Set[str]) -> PodUsage:
    """Both entries of one pod as one: no number is less than it was.

    `gone`: the cells whose parts of what it grows by count for the sweep, if it is a pod of one.
    """
    counted = old.seconds if old is not None else 0
    if new.jobs > 1 and new.seconds > counted:
        taken_over = new.taken_over or ()
        more = sorted((gone & set(new.trained or ())) - {part.uid for part in taken_over})
        parts = (TakenOverPart(uid=uid, after_seconds=counted) for uid in more)
        new = replace(new, taken_over=(*taken_over, *parts) or None)
    if old is None:
        return new
    seconds = max(old.seconds, new.seconds)
    # One that had vanished may be seen again, and only then when it began to train: no second is lost twice.
    lost = max(old.lost_seconds, min(new.lost_seconds, seconds - old.startup_seconds))
    startup = max(old.startup_seconds, min(new.startup_seconds, seconds - lost))
    new = replace(new, seconds=seconds, lost_seconds=lost, startup_seconds=startup)
    return replace(new, jobs=old.jobs, since=old.since, end=old.end or new.end)


def _part(entry: PodUsage | None, name: str, gpus: int) -> int:
    """Return the job's or the sweep's part of the pod's seconds, times its GPUs."""
    if entry is None:
        return 0
    counted = [entry] if entry.trained is None else []
    counted += [entry_after(part.after_seconds, entry) for part in entry.taken_over or ()]
    seconds: int = sum(getattr(each, name) for each in counted)
    return seconds * gpus // entry.jobs


def _with_losses(lost: LostGpuTime, old: PodUsage | None, new: PodUsage, gpus: int) -> LostGpuTime:
    startup = _part(new, "startup_seconds", gpus) - _part(old, "startup_seconds", gpus)
    more = _part(new, "lost_seconds", gpus) - _part(old, "lost_seconds", gpus)
    lost = replace(lost, startup=lost.startup + startup)
    if new.end == "suspension":
        return replace(lost, suspension=lost.suspension + more)
    if new.end == "disruption":
        return replace(lost, disruption=lost.disruption + more)
    return replace(lost, failure=lost.failure + more) if new.end == "failure" else lost


def _next_to_list(listed: list[PodUsage], before: UsageStatus, status: QLoRAJobStatus, facts: Facts) -> datetime | None:
    """Return when the first unlisted pod with a node was created: it waits to report."""
    known = {entry.uid for entry in listed}
    pods = (pod for pod in facts.observed.pods if pod.uid not in known and pod.name.startswith(_train(facts.job)))
    owners = _owners(facts.observed, status.step, facts.job.status.step)
    own = (pod.created for pod in pods if has_gpus(pod) and pod.owner_uid in owners)
    of_sweep = (entry for entry in _copied(facts.job, facts.shared) if entry.uid not in known)
    copied = (parse_time(entry.created) for entry in of_sweep if _is_uncounted(entry, before))
    return min((*own, *copied), default=None)


def _with_pods(usage: UsageStatus, entries: list[PodUsage], next_to_list: datetime | None, facts: Facts) -> UsageStatus:
    """List the entries that stay, and the latest creation and end of dropped ones."""
    over = sorted((entry for entry in entries if entry.end is not None), key=last_counted)
    surplus = max(0, len(over) - _KEPT_PODS - facts.job.spec.resources.node_count)
    excess = len(entries) - _MOST_LISTED
    dropped = [
        entry
        for number, entry in enumerate(over[:surplus])
        if number < excess
        or (last_counted(entry) <= facts.now and (next_to_list is None or parse_time(entry.created) < next_to_list))
    ]
    if not dropped:
        return replace(usage, pods=tuple(entries))
    gone = {entry.uid for entry in dropped}
    created = [entry.created for entry in dropped]
    ended = [format_time(last_counted(entry)) for entry in dropped]
    return replace(
        usage,
        pods=tuple(entry for entry in entries if entry.uid not in gone),
        counted_until=max(filter(None, (*created, usage.counted_until)), key=parse_time),
        ended_until=max(filter(None, (*ended, usage.ended_until, usage.counted_until)), key=parse_time),
    )


def _with_cost(usage: UsageStatus, status: QLoRAJobStatus) -> UsageStatus:
    """Add the cost, at the profile's price at the last start or retry."""
    profile = status.resolved.profile if status.resolved is not None else None
    cost = None if profile is None else cost_text(usage.gpu_seconds, profile.gpu_hour_price, profile.currency)
    return replace(usage, cost=cost)
