"""Fetches a job's report, the page that publish has drawn."""

import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex

from qlora_client.files.adapter import published_adapter
from qlora_client.files.claims import reading
from qlora_client.files.folders import open_folder
from qlora_client.files.published import DamagedError
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster, Object
from qlora_client.kube.errors import ClusterError, MissingError

REPORT = "report.html"
_FOLDER = "report"
_MOST_BYTES = 2**26


def fetch_report(cluster: Cluster, job: Job, say: Callable[[str], None] = lambda _: None) -> bytes:
    """The report of the job: the one published with the adapter, else that in its workspace.

    `say` receives progress messages. Raises DamagedError if the published one was changed, and ClusterError with the
    reason if there is no report yet.
    """
    published: Object | None = job.status.get("report")
    if published is not None:
        try:
            return _published(cluster, job, published, say)
        except DamagedError:
            raise
        except ClusterError as error:
            say(f"the published report cannot be read, so that of the workspace is: {error}")
    return _of_workspace(cluster, job, say)


def _published(cluster: Cluster, job: Job, published: Object, say: Callable[[str], None]) -> bytes:
    with open_folder(cluster, job, published_adapter(job)["uri"], say) as folder:
        content = folder.read(REPORT, _MOST_BYTES)
    found = sha256(content).hexdigest()
    if found != published["sha256"]:
        raise DamagedError(
            f"{published['uri']} has SHA-256 {found}, and the job's status says {published['sha256']}: it was changed "
            "after it was published"
        )
    return content


def _of_workspace(cluster: Cluster, job: Job, say: Callable[[str], None]) -> bytes:
    workspace = job.status.get("workspace")
    if workspace is None:
        raise ClusterError(f"{job.name} is {job.phase}: the report is written once it is trained")
    folder = f"{workspace['path']}/{_FOLDER}"
    with reading(cluster, job, workspace["claimName"], say=say) as reader:
        try:
            return reader.read(folder, REPORT, _MOST_BYTES)
        except MissingError:
            raise MissingError(
                f"{job.name} is {job.phase} and has no report: it is written when the adapter is published"
            ) from None


def save(content: bytes, target: Path) -> None:
    """Write or replace the file, completely or not at all. Raises ClusterError."""
    partial = target.with_name(f".{target.name}.{token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ClusterError(f"{target} cannot be written: {error.strerror or error}") from None
