"""Reads the log of a job across all its pods, future ones included."""

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from qlora_client.jobs.follow import Monotonic, Patience, Say, Sleep
from qlora_client.jobs.job import Job
from qlora_client.jobs.pods import CONTAINER, Pod, pods_of
from qlora_client.kube.cluster import Cluster, LogEntry
from qlora_client.kube.errors import MissingError, UnreachableError
from qlora_client.kube.resources import JOBS

_SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class LogLine:
    """One line that a pod has printed."""

    job_uid: str
    """The job whose log is read. The pod may print records of others too, which it trains with it."""
    pod: str
    step: str
    text: str


class _Place:
    """The position in a log: streams end early, and the next begins at a whole second."""

    def __init__(self) -> None:
        self.time: datetime | None = None
        self._lines_at_that_time = 0

    def new(self, entries: Iterable[LogEntry]) -> Iterator[LogEntry]:
        """Those of the entries that have not been read."""
        start, known = self.time, self._lines_at_that_time
        for entry in entries:
            if start is not None and entry.time <= start:
                known -= entry.time == start
                if entry.time < start or known >= 0:
                    continue
            self._lines_at_that_time = self._lines_at_that_time + 1 if entry.time == self.time else 1
            self.time = entry.time
            yield entry


def read_logs(
    cluster: Cluster,
    name: str,
    steps: Collection[str],
    *,
    follow: bool,
    say: Say,
    sleep: Sleep = time.sleep,
    monotonic: Monotonic = time.monotonic,
) -> Iterator[LogLine]:
    """The lines of the job's pods that run one of the steps, pod by pod in the order of their creation.

    With `follow` it waits for pods that have not started, also of a job that is suspended, and continues where a
    connection has ended, until the job has ended. `say` receives the reasons for waiting. Raises MissingError if there
    is no such job, or it is deleted, and ClusterError.
    """
    patience, tell = Patience(say, sleep, monotonic), _without_repeats(say)
    places: dict[str, _Place] = {}
    read: set[str] = set()
    first: Job | None = None
    while True:
        try:
            job = Job(cluster.get(JOBS, name))
            first = first or job
            if job.uid != first.uid:
                raise MissingError(f"{name} has been deleted, and another job has its name now")
            pods = [pod for pod in pods_of(cluster, job) if pod.step in steps]
            patience.answered()
            for pod in pods:
                if pod.has_log and pod.uid not in read:
                    place = places.setdefault(pod.uid, _Place())
                    try:
                        yield from _lines(cluster, job, pod, place, follow=follow)
                    except MissingError as error:
                        # It has been deleted since, and its log with it: the job continues in another pod.
                        tell(str(error))
                    read.update({pod.uid} if pod.ended or not follow else ())
        except UnreachableError as error:
            if first is None or not follow:
                raise
            patience.wait(error)
            continue
        if not follow or job.ended:
            if not places:
                say(_nothing(job, pods))
            return
        if waiting := _waits_for(job, pods, places):
            tell(waiting)
        sleep(_SECONDS_BETWEEN_LOOKS)


def _without_repeats(say: Say) -> Say:
    """Passes on a message unless it repeats the last one."""
    last = ""

    def tell(text: str) -> None:
        nonlocal last
        if text != last:
            last = text
            say(text)

    return tell


def _lines(cluster: Cluster, job: Job, pod: Pod, place: _Place, *, follow: bool) -> Iterator[LogLine]:
    entries = cluster.log(pod.name, CONTAINER, follow=follow and not pod.ended, since=place.time)
    for entry in place.new(entries):
        yield LogLine(job.run_uid, pod.name, pod.step, entry.text)


def _waits_for(job: Job, pods: Collection[Pod], places: Collection[str]) -> str:
    """Return why a follower of the job waits, empty while a pod runs that it has read."""
    if any(pod.has_log and not pod.ended and pod.uid in places for pod in pods):
        return ""
    pending = [pod for pod in pods if not pod.has_log]
    if pending:
        reason = pending[-1].waits_for
        return f"waiting for pod {pending[-1].name} to start" + (f" ({reason})" if reason else "")
    return f"{job.name} is {job.phase}" + (f": {job.message}" if job.message else "")


def _nothing(job: Job, pods: Collection[Pod]) -> str:
    """The reason why there was no line to read."""
    if job.ended:
        return f"{job.name} is {job.phase}, and its pods are gone: the steps' logs are in records/ of its workspace"
    return f"no log yet: {_waits_for(job, pods, ())}"
