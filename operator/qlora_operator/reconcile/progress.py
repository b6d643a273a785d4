"""Reads progress records from running pods' logs, within a limit for all jobs."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

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
_SECONDS_FOR_A_TURN = 3.0
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


@dataclass
class ReaderLine:
    """Due jobs that wait for one of the `readers`, first come, first served."""

    readers: int
    _reading: int = 0
    _waiting: dict[Key, Callable[[], None]] = field(default_factory=dict)
    _turns: dict[Key, float] = field(default_factory=dict)
    """When each enqueued job that has not begun to read got its reader."""

    def begin(self, key: Key, enqueue: Callable[[], None], now: float) -> bool:
        """Return whether the job may read; if not, it is enqueued when it may."""
        if key not in self._turns:
            self._waiting.setdefault(key, enqueue)
            self._give_turns(now, here=key)
        if self._turns.pop(key, None) is None:
            return False
        self._reading += 1
        return True

    def end(self, now: float) -> None:
        """Give the reader to the job that has waited for longest."""
        self._reading -= 1
        self._give_turns(now)

    def forget(self, key: Key, now: float) -> None:
        """Drop a job that no longer runs."""
        self._waiting.pop(key, None)
        if self._turns.pop(key, None) is not None:
            self._give_turns(now)

    def _give_turns(self, now: float, here: Key | None = None) -> None:
        """Enqueue as many jobs as readers are free, except the one that is `here`."""
        # A job whose pass fails before it reads must not keep its reader.
        self._turns = {key: since for key, since in self._turns.items() if now - since < _SECONDS_FOR_A_TURN}
        while self._waiting and self._reading + len(self._turns) < self.readers:
            key = next(iter(self._waiting))
            enqueue = self._waiting.pop(key)
            self._turns[key] = now
            if key != here:
                enqueue()


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
    """The age in seconds that stored figures may have; 0 if this record was read before."""


class ProgressReader:
    """Reads the progress of one job when due: a failed read never fails the job.

    At most `concurrent` logs are read at a time: a node that does not answer must not block all workers. The other due
    jobs wait in line, without a worker.
    """

    def __init__(
        self,
        read_log: ReadLog,
        monotonic: Callable[[], float],
        concurrent: int,
        per_second: int = READS_PER_SECOND,
    ) -> None:
        self._read_log = read_log
        self._monotonic = monotonic
        self._schedule = ReadSchedule(per_second)
        self._line = ReaderLine(concurrent)
        self._reported: dict[Key, str] = {}
        """The time of each job's latest record."""

    async def read(
        self,
        key: Key,
        job: QLoRAJob,
        observed: Observed,
        enqueue: Callable[[], None],
        shared: SharedPod | None = None,
        beside: Sequence[str] = (),
    ) -> LogReading:
        """Read the job's latest record in the pod that reports on it, if it is due.

        `enqueue`: called when a reader is free for a due job that has found none. `shared`: the pod of its sweep that
        trains it with other cells. `beside`: UIDs of other jobs in that log.
        """
        step = job.status.step
        pod = _reporting(job, observed, shared)
        if pod is None or step is None:
            self.forget(key)
            return LogReading()
        wait = self._schedule.seconds_until_due(key, self._monotonic())
        if wait > 0:
            return LogReading(again=wait)
        if not self._line.begin(key, enqueue, self._monotonic()):
            return LogReading(again=SECONDS_AFTER_FAILURE)
        try:
            text = await self._read_log(job.namespace, pod.name)
        finally:
            self._line.end(self._monotonic())
        if text is None:
            return LogReading(again=self._schedule.done(key, self._monotonic(), pause=SECONDS_AFTER_FAILURE))
        record = latest_record(text, job.run_uid, pod, step.name)
        others = [found for uid in beside if (found := latest_record(text, uid, pod, step.name)) is not None]
        newest = max(others, key=lambda found: parse_time(found.time), default=None)
        again, rest = self._schedule.done(key, self._monotonic()), self._rest(key, record)
        return LogReading(record, newest, again, done=True, rest=rest)

    def _rest(self, key: Key, record: ProgressRecord | None) -> float:
        """Return the age that stored figures may have, 0 without a new record.

        So a run that hangs after an unstored record is measured from when that was read. With many jobs, each stores
        its figures once in each of its periods. These begin at other times than those of the other jobs: writes of all
        in one round of reads would make that round take twice as long.
        """
        if record is None or record.time == self._reported.get(key):
            return 0.0
        self._reported[key] = record.time
        seconds = min(self._schedule.jobs / _FIGURES_PER_SECOND, _LONGEST_UNSTORED)
        if seconds <= SECONDS_BETWEEN_READS:
            return 0.0
        return (self._monotonic() + crc32("/".join(key).encode())) % seconds

    def forget(self, key: Key) -> None:
        """Drop a job that is gone, or does not run."""
        self._schedule.forget(key)
        self._line.forget(key, self._monotonic())
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
