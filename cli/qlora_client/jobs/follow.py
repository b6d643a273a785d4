"""Follows a job until it has ended: through suspensions, watches that end, and a cluster that is away for a while."""

import time
from collections.abc import Callable, Iterator
from itertools import chain

from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import MissingError, UnreachableError
from qlora_client.kube.resources import JOBS

PATIENCE_SECONDS = 600.0
_SECONDS_BETWEEN_TRIES = 5.0
_SECONDS_BETWEEN_WATCHES = 1.0

Say = Callable[[str], None]
Sleep = Callable[[float], None]
Monotonic = Callable[[], float]


class Patience:
    """Retries for at most ten minutes while the cluster cannot be reached.

    `say` receives one message.
    """

    def __init__(self, say: Say, sleep: Sleep, monotonic: Monotonic) -> None:
        self._say = say
        self._sleep = sleep
        self._monotonic = monotonic
        self._away_since: float | None = None

    def answered(self) -> None:
        """The cluster has answered."""
        self._away_since = None

    def wait(self, error: UnreachableError) -> None:
        """Wait before the next try. Raises the error if there have been enough."""
        now = self._monotonic()
        if self._away_since is None:
            self._away_since = now
            self._say(f"{error}; trying again for {PATIENCE_SECONDS / 60:.0f} minutes")
        if now - self._away_since >= PATIENCE_SECONDS:
            raise error
        self._sleep(_SECONDS_BETWEEN_TRIES)


def follow_job(
    cluster: Cluster, name: str, *, say: Say, sleep: Sleep = time.sleep, monotonic: Monotonic = time.monotonic
) -> Iterator[Job]:
    """The job as it is, and again after each change, the last time when it has ended.

    Raises MissingError if there is none, or it is deleted, and ClusterError. `say` receives a message while the cluster
    cannot be reached.
    """
    patience = Patience(say, sleep, monotonic)
    last: Job | None = None
    while True:
        try:
            job = Job(cluster.get(JOBS, name))
            for current in chain([job], map(Job, cluster.changes(JOBS, name, job.version))):
                patience.answered()
                if last is not None and current.uid != last.uid:
                    raise MissingError(f"{name} has been deleted, and another job has its name now")
                if last is None or current.version != last.version:
                    last = current
                    yield current
                if current.ended:
                    return
            sleep(_SECONDS_BETWEEN_WATCHES)
        except UnreachableError as error:
            if last is None:
                raise
            patience.wait(error)
