"""Reads files of a PersistentVolumeClaim through a short-lived pod, with the user's rights."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_client.files.archive import UnsafeArchiveError, extract
from qlora_client.files.fixed_profile import profile_of
from qlora_client.files.published import DamagedError
from qlora_client.files.reader_pod import MOUNT, failure_of_start, is_running, reader_pod, why_not_started
from qlora_client.jobs.job import Job
from qlora_client.jobs.pods import CONTAINER, Pod, events_of
from qlora_client.kube.channels import CommandError
from qlora_client.kube.cluster import Cluster, Object, require
from qlora_client.kube.errors import ClusterError, ForbiddenError, MissingError, RejectedError
from qlora_client.kube.resources import EXEC, PODS, REVISIONS

START_SECONDS = 300.0
"""Seconds to wait for the pod. Its image is on the nodes where the job ran."""
_LIFE_SECONDS = 3600
_BETWEEN_LOOKS = 0.5
NEEDED = {REVISIONS: ("get",), PODS: ("create", "get", "delete"), EXEC: ("create", "get")}
"""The required rights: get and create, as the API server checks either to open a connection."""


@dataclass(frozen=True)
class ClaimReader:
    """A running pod that has a claim mounted."""

    cluster: Cluster
    pod: str
    claim: str

    def fetch(
        self, folder: str, wanted: Mapping[str, int], into: Path, on_bytes: Callable[[int], None] = lambda _: None
    ) -> dict[str, str]:
        """Copy files of a folder of the claim; returns their SHA-256 by name.

        `wanted`: the most bytes that each may have, by name. Raises MissingError if one is not there, DamagedError for
        anything but plain files of these names, and ClusterError.
        """
        command = ["tar", "--create", "--file=-", f"--directory={MOUNT}/{folder}", "--", *wanted]
        place = f"pvc://{self.claim}/{folder}"
        try:
            return extract(self.cluster.exec(self.pod, CONTAINER, command), wanted, into, on_bytes)
        except CommandError as error:
            if "No such file" in str(error):
                raise MissingError(f"{', '.join(wanted)} of {place} cannot be found: it was moved or deleted") from None
            raise
        except UnsafeArchiveError as error:
            raise DamagedError(f"what the pod sends of {place} is not what was asked for: {error}") from None

    def read(self, folder: str, name: str, most: int) -> bytes:
        """The content of a small file of at most `most` bytes. Raises as `fetch` does."""
        with TemporaryDirectory() as scratch:
            self.fetch(folder, {name: most}, Path(scratch))
            return (Path(scratch) / name).read_bytes()


@contextmanager
def reading(
    cluster: Cluster,
    job: Job,
    claim: str,
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ClaimReader]:
    """A pod that reads the claim for as long as the body runs; it is deleted also when the body raises.

    `job` is one whose pods have used the claim: the pod gets their image, user and nodes. `say` receives progress
    messages. Raises ForbiddenError with the missing rules, RejectedError if the namespace does not admit the pod, and
    ClusterError if it does not start.
    """
    require(cluster, NEEDED, f"reading the claim {claim} through a pod")
    if "workspace" not in job.status:
        raise ClusterError(f"{job.name} is {job.phase} and has no workspace yet: wait until it has started")
    say(f"reading the claim {claim} through a pod")
    try:
        pod = cluster.create(PODS, reader_pod(job, profile_of(cluster, job), claim, _LIFE_SECONDS))
    except RejectedError as error:
        raise RejectedError(
            f"the namespace {cluster.namespace} does not admit the pod that reads the claim {claim}: {error}"
        ) from None
    try:
        _wait(cluster, pod, say=say, sleep=sleep, clock=clock)
        yield ClaimReader(cluster, str(pod["metadata"]["name"]), claim)
    finally:
        _delete(cluster, pod, say)


def _wait(
    cluster: Cluster,
    pod: Object,
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    name, started, told = str(pod["metadata"]["name"]), clock(), ""
    while not is_running(pod):
        seconds, reason = clock() - started, Pod(pod).waits_for
        if reason not in ("", told):
            say(f"waiting for the pod {name} to start ({reason})")
            told = reason
        if failure_of_start(pod) or seconds > START_SECONDS:
            raise ClusterError(why_not_started(pod, _warnings(cluster, pod), seconds))
        sleep(_BETWEEN_LOOKS)
        pod = cluster.get(PODS, name)


def _warnings(cluster: Cluster, pod: Object) -> list[str]:
    try:
        events = events_of(cluster, str(pod["metadata"]["uid"]))
    except ForbiddenError:
        return []
    return [f"{event.reason}: {event.message}" for event in events if event.kind == "Warning"]


def _delete(cluster: Cluster, pod: Object, say: Callable[[str], None]) -> None:
    """Delete the pod; a failure is reported and does not hide the body's error."""
    name = str(pod["metadata"]["name"])
    try:
        cluster.delete(PODS, name, str(pod["metadata"]["uid"]))
    except MissingError:
        return
    except ClusterError as error:
        say(f"the pod {name} could not be deleted and ends within the hour: {error}")
