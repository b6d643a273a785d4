"""Writes files and folders atomically, and measures digests, space and sizes."""

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure

GIB = 2**30
PARTIAL = ".partial"
"""Ends the name of every file and folder that is not complete yet."""
_BLOCK_BYTES = 2**22
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# safetensors writes in Rust, and only its message has the operating system's error number.
_QUOTED_NUMBER = re.compile(r"\(os error (\d+)\)")


def is_full(error: BaseException) -> bool:
    """Whether the disk is full, its quota used up, or the file too large for it."""
    # `qlora verify` needs this module without the library, which must be loaded where one of its errors is raised.
    library = sys.modules.get("safetensors")
    if library is not None and isinstance(error, library.SafetensorError):
        quoted = _QUOTED_NUMBER.search(str(error))
        return quoted is not None and int(quoted[1]) in _FULL
    return isinstance(error, OSError) and error.errno in _FULL


def sizes(*counts: int) -> str:
    """Byte counts for people, in the unit that suits the last of them: "1.2/13.5 GiB"."""
    unit, name = (GIB, "GiB") if counts[-1] >= GIB else (2**20, "MiB")
    return "/".join(f"{count / unit:.1f}" for count in counts) + f" {name}"


def require_space(root: Path, needed: int, purpose: str) -> None:
    """Raise StepFailure STORAGE_FULL unless `needed` bytes are free below `root`."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise StepFailure(
            ExitCode.STORAGE_FULL,
            f"{purpose} needs {sizes(needed)}, but the workspace volume has {sizes(free)} free: "
            "make it larger (spec.workspace.size) or free space",
        )


def bytes_below(folder: Path) -> int:
    """Bytes of the files in the folder and its folders, or 0 without it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal. `on_bytes` gets the bytes read so far."""
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
        sync(path)


def sync(path: Path) -> None:
    """Make a file durable, or the names in a folder: new, renamed and removed ones."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file, a folder with its content, or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` durably in one step, or raise OSError unchanged."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that replaces the one at `path`, durably, unless the body raises."""
    _make_folder(path.parent)
    # A pod on a lost node may still write the same file, and processes of two containers often have the same id.
    partial = partial_path(path.with_name(f"{path.name}.{token_hex(8)}"))
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def partial_path(target: Path) -> Path:
    """The path of `target` until it is complete: `.NAME.partial` in its folder."""
    return target.with_name(f".{target.name}{PARTIAL}")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new, empty folder that becomes `target` when the body ends: complete and durable, or absent.

    It replaces an existing `target`. If the body raises, its files are removed, because on a full volume their space is
    needed, and `target` stays as it was.
    """
    with scratch_folder(target) as partial:
        yield partial
        complete_folder(partial, target)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder at the partial path of `target`, and remove it at the end."""
    partial = new_folder(partial_path(target))
    try:
        yield partial
    finally:
        remove(partial)


def new_folder(path: Path) -> Path:
    """Make an empty folder at `path`, and replace an existing one."""
    remove(path)
    _make_folder(path.parent)
    path.mkdir()
    return path


def complete_folder(partial: Path, target: Path) -> None:
    """Sync the folder `partial` and rename it to its sibling `target`, replacing that."""
    sync_tree(partial)
    remove(target)
    partial.rename(target)
    sync(target.parent)


def remove_partials(folder: Path, *, but: Path | None = None) -> None:
    """Delete an earlier attempt's incomplete files in the folder, except `but`."""
    for path in folder.glob(f"*{PARTIAL}"):
        if path != but:
            remove(path)


def _make_folder(path: Path) -> None:
    """Make the folder and all above it durable: synced content must have a name."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)
