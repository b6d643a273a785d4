"""Durable writes, digests, free space and sizes of files and folders."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure

GIB = 2**30
_BLOCK_BYTES = 2**22
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# safetensors writes in Rust and only quotes the operating system's number.
_QUOTED_NUMBER = re.compile(r"\(os error (\d+)\)")


def is_full(error: BaseException) -> bool:
    """Whether the error says that the disk, the quota on it, or the largest size of a file is used up."""
    if isinstance(error, SafetensorError):
        quoted = _QUOTED_NUMBER.search(str(error))
        return quoted is not None and int(quoted[1]) in _FULL
    return isinstance(error, OSError) and error.errno in _FULL


def sizes(*counts: int) -> str:
    """Bytes for people, in the unit that suits the last of them: "1.2/13.5 GiB"."""
    unit, name = (GIB, "GiB") if counts[-1] >= GIB else (2**20, "MiB")
    return "/".join(f"{count / unit:.1f}" for count in counts) + f" {name}"


def require_space(root: Path, needed: int, purpose: str) -> None:
    """Raise StepFailure STORAGE_FULL if fewer than `needed` bytes are free below `root`."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise StepFailure(
            ExitCode.STORAGE_FULL,
            f"{purpose} needs {sizes(needed)}, but the workspace volume has {sizes(free)} free: "
            "make it larger (spec.workspace.size) or free space",
        )


def bytes_below(folder: Path) -> int:
    """Bytes of the files in the folder and its folders; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal. `on_bytes` is called with the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            if on_bytes is not None:
                on_bytes(done)
    return digest.hexdigest()


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` in one step: temporary file beside it, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames and new names in the folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
