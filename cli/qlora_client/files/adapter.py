"""Downloads a job's adapter: complete and verified in its folder, or not there."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import TypedDict

from qlora_client.files.folders import open_folder
from qlora_client.files.published import (
    ADAPTER,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Folder,
    PublishedFile,
    parse_manifest,
    require_as_described,
    require_same_adapter,
)
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError, RejectedError


class AdapterPlace(TypedDict):
    """The part of `status.adapter` that finds the adapter."""

    uri: str
    sha256: str


def download_adapter(
    cluster: Cluster,
    job: Job,
    target: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
    on_bytes: Callable[[int, int], None] = lambda _done, _all: None,
) -> bool:
    """Download the job's adapter into the folder `target`; False if the folder has it already.

    The weights must have the SHA-256 of the job's status, and the other files those of the manifest with them;
    otherwise nothing appears at `target`. `say` receives progress messages, `on_bytes` the received and total bytes.
    Raises ClusterError: RejectedError if `target` has other files, DamagedError if a sum is wrong.
    """
    adapter = published_adapter(job)
    if _is_occupied(target):
        if _holds(target, adapter["sha256"]):
            return False
        raise RejectedError(f"{target} exists and does not hold this adapter: name another folder (--output)")
    with open_folder(cluster, job, adapter["uri"], say) as folder:
        copy_published(folder, adapter["uri"], adapter["sha256"], target, on_bytes)
    return True


def published_adapter(job: Job) -> AdapterPlace:
    """`status.adapter`. Raises ClusterError, with the reason, for a job that has none."""
    adapter: AdapterPlace | None = job.status.get("adapter")
    if adapter is not None:
        return adapter
    why = f": {job.message}" if job.message else ""
    raise ClusterError(f"{job.name} is {job.phase} and has published no adapter{why}")


def copy_published(folder: Folder, place: str, sha256: str, target: Path, on_bytes: Callable[[int, int], None]) -> None:
    """Copy the folder of the adapter with this SHA-256 to `target`, which does not exist or is empty.

    `place` is its address, for messages. Raises ClusterError, and then leaves nothing behind.
    """
    manifest = folder.read(MANIFEST, MAX_MANIFEST_BYTES)
    files = parse_manifest(manifest, place)
    require_same_adapter(files, sha256, place)
    total = sum(file.size for file in files.values())
    with new_folder(target, total) as partial:
        folder.fetch(files, partial, lambda done: on_bytes(done, total))
        arrived = {name: _describe(partial / name) for name in files if (partial / name).is_file()}
        require_as_described(files, arrived, place)
        (partial / MANIFEST).write_bytes(manifest)


@contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A folder next to `target` that becomes it when the body ends, and is removed when the body raises.

    `size`: bytes that it will hold. Raises ClusterError if the disk has no room, or it cannot be written.
    """
    # Next to it, so that the last step is a rename: another disk would make it a copy.
    partial = target.with_name(f".{target.name}.{token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if size > free:
            raise ClusterError(f"the files have {size:,} bytes, and {target.parent} has {free:,} free")
        partial.mkdir()
        yield partial
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise ClusterError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _describe(path: Path) -> PublishedFile:
    with path.open("rb") as file:
        return PublishedFile(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def _is_occupied(target: Path) -> bool:
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _holds(target: Path, sha256: str) -> bool:
    """Whether the folder has the adapter with every file as it was published."""
    try:
        files = parse_manifest((target / MANIFEST).read_bytes(), str(target))
        require_same_adapter(files, sha256, str(target))
        require_as_described(files, {name: _describe(target / name) for name in files}, str(target))
    except (OSError, ClusterError):
        return False
    return (target / ADAPTER).is_file()
