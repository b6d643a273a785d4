"""A job is followed, and its logs are read, through absences of the cluster and a new job of its name."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qlora_api.naming import STEP_LABEL
from qlora_client.jobs.follow import PATIENCE_SECONDS, follow_job
from qlora_client.jobs.logs import read_logs
from qlora_client.kube.cluster import LogEntry
from qlora_client.kube.errors import MissingError, UnreachableError
from qlora_client.kube.resources import JOBS, Resource

AWAY = UnreachableError("the cluster is away")
BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

Moment = dict[str, Any] | Exception


def job(version: int, phase: str = "Training", uid: str = "1") -> dict[str, Any]:
    metadata = {"name": "demo", "namespace": "team", "uid": uid, "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": {}, "status": {"phase": phase}}


def pod(name: str, *, state: str = "running", at: int = 0) -> dict[str, Any]:
    metadata = {"name": name, "uid": name, "labels": {STEP_LABEL: "train"}, "creationTimestamp": str(at)}
    return {"metadata": metadata, "status": {"containerStatuses": [{"name": "trainer", "state": {state: {}}}]}}


def line(second: int, text: str) -> LogEntry:
    return LogEntry(BEGIN + timedelta(seconds=second), text)


class Played:
    """A cluster whose reads answer with the next of these moments; an error is raised."""

    def __init__(self, *reads: Moment) -> None:
        self.reads = iter(reads)
        self.watches: Iterator[list[Moment]] = iter(())
        self.pods: list[dict[str, Any]] = []
        self.logs: dict[str, Iterator[list[LogEntry | Exception]]] = {}
        self.said: list[str] = []
        self.now = 0.0

    def get(self, _resource: Resource, _name: str) -> Any:
        return self._answer(next(self.reads))

    def changes(self, _resource: Resource, _name: str, _version: str) -> Iterator[Any]:
        yield from map(self._answer, next(self.watches, []))

    def find(self, resource: Resource, **_: str) -> list[Any]:
        assert resource is not JOBS
        return self.pods

    def log(self, name: str, *_: Any, **__: Any) -> Iterator[LogEntry]:
        yield from map(self._answer, next(self.logs[name]))

    @staticmethod
    def _answer(moment: Any) -> Any:
        if isinstance(moment, Exception):
            raise moment
        return moment

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def timed(self, read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call it with this cluster and its clock."""
        clock: Any = {"say": self.said.append, "sleep": self.sleep, "monotonic": lambda: self.now}
        return read(self, *arguments, **options, **clock)

    def phases(self) -> list[tuple[str, str]]:
        """Version and phase of each state of the job that a follower sees."""
        return [(job.version, job.phase) for job in self.timed(follow_job, "demo")]


def test_a_job_is_followed_through_watches_that_end_and_each_state_comes_once() -> None:
    cluster = Played(job(1), job(2), job(3))
    cluster.watches = iter([[job(1), job(2)], [job(2), job(3)], [job(4, "Succeeded"), job(5)]])
    assert cluster.phases() == [("1", "Training"), ("2", "Training"), ("3", "Training"), ("4", "Succeeded")]
    assert cluster.said == []


@pytest.mark.parametrize("watched", [True, False])
def test_a_job_of_the_same_name_is_not_followed(watched: bool) -> None:
    other = job(9, "Succeeded", uid="2")
    cluster = Played(job(1), other)
    cluster.watches = iter([[other] if watched else []])
    with pytest.raises(MissingError, match="demo has been deleted, and another job has its name now"):
        cluster.phases()


def test_each_absence_of_the_cluster_is_reported_once_and_has_its_own_patience() -> None:
    tries = int(PATIENCE_SECONDS / 5)
    cluster = Played(job(1), *[AWAY] * tries, job(2), *[AWAY] * tries, job(3, "Failed"))
    assert cluster.phases() == [("1", "Training"), ("2", "Training"), ("3", "Failed")]
    assert cluster.said == ["the cluster is away; trying again for 10 minutes"] * 2
    cluster = Played(job(1), *[AWAY] * (tries + 1), job(2, "Failed"))
    with pytest.raises(UnreachableError, match="the cluster is away"):
        cluster.phases()


def test_a_cluster_that_was_never_reached_is_an_error() -> None:
    for read in (lambda cluster: cluster.phases(), lambda cluster: read_all(cluster)):
        with pytest.raises(UnreachableError, match="the cluster is away"):
            read(Played(AWAY, job(1, "Failed")))


def read_all(cluster: Played, *, follow: bool = True) -> list[str]:
    return [line.text for line in cluster.timed(read_logs, "demo", ["train"], follow=follow)]


def test_logs_are_read_on_after_a_cut_and_in_the_next_pod() -> None:
    cluster = Played(job(1), AWAY, job(1), job(2, "Suspended"), job(3), job(4, "Succeeded"))
    cluster.pods = [pod("first"), pod("second", at=1)]
    cluster.logs = {
        # Each stream begins at the second of the last line.
        "first": iter([[line(0, "a"), line(0, "b")], [line(0, "a"), line(0, "b"), line(1, "c"), AWAY], [], [], []]),
        "second": iter([[], [line(2, "d")], [line(2, "d"), line(2, "e")], [line(2, "d"), line(2, "e")], []]),
    }
    assert read_all(cluster) == ["a", "b", "c", "d", "e"]


def test_a_log_that_is_complete_is_read_once_and_a_lost_one_is_named() -> None:
    cluster = Played(job(1), job(2), job(3, "Succeeded"))
    cluster.pods = [pod("lost", state="terminated"), pod("done", state="terminated", at=1)]
    cluster.logs = {"lost": iter([[MissingError("its log is gone")]]), "done": iter([[line(0, "a")]])}
    assert read_all(cluster) == ["a"]
    assert cluster.said == ["its log is gone", "demo is Training"]


def test_the_logs_of_a_job_of_the_same_name_are_not_read() -> None:
    cluster = Played(job(1), job(9, uid="2"))
    with pytest.raises(MissingError, match="demo has been deleted, and another job has its name now"):
        read_all(cluster)


def test_without_following_logs_end_and_an_absent_cluster_is_an_error() -> None:
    cluster = Played(job(1))
    cluster.pods, cluster.logs = [pod("first")], {"first": iter([[line(0, "a")]])}
    assert read_all(cluster, follow=False) == ["a"]
    cluster = Played(job(1))
    cluster.pods, cluster.logs = [pod("first")], {"first": iter([[line(0, "a"), AWAY]])}
    with pytest.raises(UnreachableError, match="the cluster is away"):
        read_all(cluster, follow=False)


def test_the_lines_of_a_restored_job_have_the_uid_that_its_records_name() -> None:
    restored = job(1)
    restored["status"]["runUid"] = "0"
    cluster = Played(restored)
    cluster.pods, cluster.logs = [pod("first")], {"first": iter([[line(0, "a")]])}
    assert [each.job_uid for each in cluster.timed(read_logs, "demo", ["train"], follow=False)] == ["0"]
