"""Reads progress records from running pods' logs, within a limit for all jobs."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from qlora_api.contract import ProgressRecord, decode_record
from qlora_api.figures import with_progress
from qlora_api.status import QLoRAJobStatus, StepName
from qlora_operator.decisions.observed.objects import Observed, Pod, QLoRAJob, parse_time
from qlora_operator.decisions.observed.shared_pod import PodName, SharedPod, waits_for_sweep
from qlora_operator.keys import Key
from qlora_operator.settings import READS_PER_SECOND

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_READS = 10.0
SECONDS_AFTER_FAILURE = 60.0
_PUT_OFF_SECONDS, _LONGEST_OVERDUE = 1.0, 3.0
_FIGURES_PER_SECOND = 20
"""Writes of figures alone: up to 200 jobs, each reading is stored."""
_LONGEST_UNSTORED = 60.0
_FEWEST_PER_SECOND = 20
_SECONDS_OF_A_ROUND = 8
"""All jobs can be read in that time: less than the pause, so that each finds a place after it."""

ReadLog = Callable[[str, str], Awaitable[str | None]]
"""(namespace, pod) -> the end of its log; None if it cannot be read."""


@dataclass
class ReadSchedule:
    """Spreads log reads: a job at most every 10 seconds, all within a budget.

    With more jobs than the budget allows every 10 seconds, each is read less often. A slot reserved for later delays no
    read now.
    """

    per_second: int = READS_PER_SECOND
    _due: dict[Key, float] = field(default_factory=dict)
    _reserved: dict[int, int] = field(default_factory=dict)
    """The number of reserved reads in each second, from the clock's zero."""

    def seconds_until_due(self, key: Key, now: float) -> float:
        """Return the seconds from `now` until the job's log may be read, 0 when due.

        The first call reserves a slot.
        """
        if key not in self._due:
            self._due[key] = self._reserve(now, now)
        return max(0.0, self._due[key] - now)

    def done(self, key: Key, now: float, pause: float = SECONDS_BETWEEN_READS) -> float:
        """Note the read of the log. Returns the seconds until the next, at least `pause`."""
        self._due[key] = self._reserve(now + pause, now)
        return self._due[key] - now

    def put_off(self, key: Key, now: float) -> float:
        """Keep the place of a job that no reader is free for. Returns the seconds until it tries again.

        After some tries it gets another place: with nodes that do not answer, all jobs would try every second.
        """
        overdue = now - self._due[key]
        return _PUT_OFF_SECONDS if overdue < _LONGEST_OVERDUE else self.done(key, now, pause=_PUT_OFF_SECONDS)

    @property
    def jobs(self) -> int:
        """The number of jobs that share the budget."""
        return len(self._due)

    def forget(self, key: Key) -> None:
        """Drop a job that no longer runs."""
        self._due.pop(key, None)

    def _reserve(self, earliest: float, now: float) -> float:
        """Reserve a read in the first second from `earliest` on with a free share."""
        self._reserved = {second: count for second, count in self._reserved.items() if second >= int(now)}
        second = int(earliest)
        # Spread over the pause: in a burst of the whole budget, few of the logs would be read at a time.
        share = min(self.per_second, max(_FEWEST_PER_SECOND, self.jobs // _SECONDS_OF_A_ROUND))
        while self._reserved.get(second, 0) >= share:
            second += 1
        before = self._reserved.get(second, 0)
        self._reserved[second] = before + 1
        return max(earliest, second + before / share)


@dataclass(frozen=True)
class LogReading:
    """The result of reading the log of a job in one pass."""

    record: ProgressRecord | None = None
    beside: ProgressRecord | None = None
    """The latest of the other cells that the pod of a sweep trains."""
    again: float | None = None
    """Seconds until the next reading; None if the job does not run."""
    done: bool = False
    """Whether the log could be read, so that a missing record is evidence."""
    rest: float = 0.0
    """How many seconds the stored figures may stay as they are; 0 if this record was read before."""


class ProgressReader:
    """Reads the progress of one job when due: a failed read never fails the job.

    At most `concurrent` logs are read at a time: a node that does not answer must not block all workers.
    """

    def __init__(
        self,
        read_log: ReadLog,
        monotonic: Callable[[], float],
        concurrent: int,
        per_second: int = READS_PER_SECOND,
    ) -> None:
        self._read_log = read_log
        self._concurrent = concurrent
        self._reading = 0
        self._monotonic = monotonic
        self._schedule = ReadSchedule(per_second)
        self._reported: dict[Key, str] = {}
        """The time of each job's latest record."""

    async def read(
        self,
        key: Key,
        job: QLoRAJob,
        observed: Observed,
        shared: SharedPod | None = None,
        beside: Sequence[str] = (),
    ) -> LogReading:
        """Read the job's latest record in the pod that reports on it, if it is due.

        `shared`: the pod of its sweep that trains it with other cells. `beside`: UIDs of other jobs in that log.
        """
        step = job.status.step
        pod = _reporting(job, observed, shared)
        if pod is None or step is None:
            self.forget(key)
            return LogReading()
        wait = self._schedule.seconds_until_due(key, self._monotonic())
        if wait > 0:
            return LogReading(again=wait)
        if self._reading >= self._concurrent:
            return LogReading(again=self._schedule.put_off(key, self._monotonic()))
        self._reading += 1
        try:
            text = await self._read_log(job.namespace, pod.name)
        finally:
            self._reading -= 1
        if text is None:
            return LogReading(again=self._schedule.done(key, self._monotonic(), pause=SECONDS_AFTER_FAILURE))
        record = latest_record(text, job.run_uid, pod, step.name)
        others = [found for uid in beside if (found := latest_record(text, uid, pod, step.name)) is not None]
        newest = max(others, key=lambda found: parse_time(found.time), default=None)
        again, rest = self._schedule.done(key, self._monotonic()), self._rest(key, record)
        return LogReading(record, newest, again, done=True, rest=rest)

    def _rest(self, key: Key, record: ProgressRecord | None) -> float:
        """Return the seconds between two writes of figures, 0 without a new record.

        So a run that hangs after an unstored record is measured from when that was read.
        """
        if record is None or record.time == self._reported.get(key):
            return 0.0
        self._reported[key] = record.time
        seconds = self._schedule.jobs / _FIGURES_PER_SECOND
        return min(seconds, _LONGEST_UNSTORED) if seconds > SECONDS_BETWEEN_READS else 0.0

    def forget(self, key: Key) -> None:
        """Drop a job that is gone, or does not run."""
        self._schedule.forget(key)
        self._reported.pop(key, None)


def _reporting(job: QLoRAJob, observed: Observed, shared: SharedPod | None) -> PodName | None:
    """The pod whose log has the job's progress."""
    step = job.status.step
    pod = observed.reporting_pod(step.job_uid) if step else None
    if pod is not None:
        return PodName(pod.name, pod.uid)
    return shared.pod if shared is not None and waits_for_sweep(job.status, shared) is not None else None


def latest_record(log: str, job_uid: str, pod: Pod | PodName, step: StepName) -> ProgressRecord | None:
    """Return the last progress record of this job, pod and step that fits a status."""
    for line in reversed(log.splitlines()):
        record = decode_record(line, job_uid=job_uid, pod_uid=pod.uid)
        if isinstance(record, ProgressRecord) and record.step == step and _storable(record):
            return record
    return None


def _storable(record: ProgressRecord) -> bool:
    """Whether the API server would accept the record's figures.

    One bad line must not block every later status.
    """
    try:
        QLoRAJobStatus.model_validate(with_progress(QLoRAJobStatus(), record).dump())
    except (ValueError, OverflowError):
        return False
    return True
