"""Sums up the GPU time of each namespace by month, so that it outlives the jobs.

A job's usage only grows, and its status has it. The profile's status has, for each job, how much of that the sums
include: `unsettled`. One write changes both, so that no second counts twice, with any answer lost or repeated. When a
job has ended and all of its usage is in the sums, its own status notes that (`settledGpuHours`), and only then does the
entry go: from then on the job's status has the number. So the entries are bounded by the jobs that run, and not by
those that exist. The entry of a deleted job goes with a later write than the one that counts its last seconds: if the
answer to that is lost, it is repeated, and must find the entry.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from qlora_api.profile_status import MAX_UNSETTLED, NamespaceUsage, QLoRAProfileStatus, UsageOfMonth
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.observed.conditions import is_finished
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.usage.usage import still_counts


@dataclass(frozen=True, slots=True)
class UsageLine:
    """The GPU time of one job, or of one sweep for the cells that have ended."""

    uid: str
    namespace: str
    gpu_seconds: int
    settled: int = 0
    """How much of it is in the sums by the job's own status."""
    is_gone: bool = False
    """Whether the job was deleted."""


def with_usage(
    status: QLoRAProfileStatus, lines: Iterable[UsageLine], gone: Collection[str], now: datetime
) -> QLoRAProfileStatus:
    """Add what the lines have more than the sums. `gone`: UIDs of entries whose job is known not to exist."""
    of_namespace: dict[str, list[UsageLine]] = defaultdict(list)
    for line in lines:
        of_namespace[line.namespace].append(line)
    before = {each.namespace: each for each in status.namespaces}
    names = sorted(before.keys() | of_namespace.keys())
    entries = (
        _with_lines(before.get(name, NamespaceUsage(namespace=name)), of_namespace[name], gone, now) for name in names
    )
    return replace(status, namespaces=tuple(entry for entry in entries if entry.months or entry.unsettled))


def _with_lines(
    before: NamespaceUsage, lines: Iterable[UsageLine], gone: Collection[str], now: datetime
) -> NamespaceUsage:
    unsettled = {uid: seconds for uid, seconds in before.unsettled.items() if uid not in gone}
    more = 0
    for line in lines:
        counted = max(before.unsettled.get(line.uid, 0), line.settled)
        if line.gpu_seconds > counted and (line.uid in unsettled or len(unsettled) < MAX_UNSETTLED):
            more += line.gpu_seconds - counted
            unsettled[line.uid] = line.gpu_seconds
        if line.settled >= unsettled.get(line.uid, 0):
            unsettled.pop(line.uid, None)
    return replace(before, months=_months(before, more, now), unsettled=unsettled)


def _months(before: NamespaceUsage, more: int, now: datetime) -> tuple[UsageOfMonth, ...]:
    this = month_of(now)
    seconds = {each.month: each.gpu_seconds for each in before.months}
    seconds |= {this: seconds.get(this, 0) + more} if more else {}
    last = month_of(now.replace(day=1) - timedelta(days=1))
    kept = {month: seconds[month] for month in (last, this) if month in seconds}
    return tuple(UsageOfMonth(month=month, gpu_seconds=used) for month, used in kept.items())


def month_of(now: datetime) -> str:
    """The month as the sums name it."""
    return f"{now:%Y-%m}"


def seconds_of_month(status: QLoRAProfileStatus, namespace: str, now: datetime) -> int:
    """GPU seconds that the namespace has used in this month."""
    months = (each.months for each in status.namespaces if each.namespace == namespace)
    return sum(each.gpu_seconds for of_namespace in months for each in of_namespace if each.month == month_of(now))


def unknown(status: QLoRAProfileStatus, lines: Iterable[UsageLine], over: Collection[str] = ()) -> dict[str, str]:
    """Return the namespace of each entry without a line, by its UID, without those in `over`."""
    known = {line.uid for line in lines}.union(over)
    entries = ((uid, each.namespace) for each in status.namespaces for uid in each.unsettled)
    return {uid: namespace for uid, namespace in entries if uid not in known}


def counted_seconds(status: QLoRAProfileStatus, namespace: str, uid: str) -> int:
    """GPU seconds of the job that the stored sums include; 0 without an entry."""
    return next((each.unsettled.get(uid, 0) for each in status.namespaces if each.namespace == namespace), 0)


def is_counted(status: QLoRAProfileStatus, line: UsageLine) -> bool:
    """Whether the stored sums include all of the line."""
    return line.gpu_seconds <= max(line.settled, counted_seconds(status, line.namespace, line.uid))


def is_to_be_settled(job: QLoRAJob, status: QLoRAJobStatus, counted: int) -> bool:
    """Whether the job has ended, and the sums include all of its usage, which it has not noted yet."""
    usage = status.usage
    if usage is None or not is_finished(status) or still_counts(job):
        return False
    return (usage.settled_gpu_seconds or 0) < usage.gpu_seconds <= counted


def settled(job: QLoRAJob, status: QLoRAJobStatus, counted: int) -> QLoRAJobStatus:
    """Note in the status of a job that the sums include all of its usage, once they do."""
    usage = status.usage
    if usage is None or not is_to_be_settled(job, status, counted):
        return status
    return replace(status, usage=replace(usage, settled_gpu_seconds=usage.gpu_seconds))
