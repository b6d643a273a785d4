"""Shows the processes that share a volume, also those of other nodes, which folders are being written to.

A folder's owner holds a lock on the file `.owner` in it and touches that file now and then. Both are needed: not every
volume supports locks, some support them on one node only, and a clock alone would keep a killed owner's folder waiting.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

OWNER_FILE = ".owner"
ABANDONED_SECONDS = 120.0
"""So long after its owner has touched it last, a folder that nobody has locked is abandoned. Clients of a network file
system may see a time that is a minute old."""
_TOUCH_SECONDS = 15.0
_LOOK_SECONDS = 0.1
_MODE = 0o664
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class Ownership:
    """Of a folder, from `own` or `take` until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._released = Event()
        self._thread = Thread(target=self._touch, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others have the folder."""
        self._released.set()
        self._thread.join()
        os.close(self._descriptor)

    def _touch(self) -> None:
        while not self._released.wait(_TOUCH_SECONDS):
            try:
                os.utime(self._descriptor)
            except OSError:
                # The folder or the volume is gone: its writer gets the error.
                return


@contextmanager
def exclusive(path: Path, longest_wait: float) -> Iterator[float]:
    """Let in one process at a time that names this file, or all of them if the volume supports no locks.

    Yields the time by the clock of the volume, to compute ages of its files. Raises TimeoutError if another process was
    in for `longest_wait` seconds.
    """
    descriptor = _open(path, os.O_CREAT)
    try:
        _lock_within(descriptor, longest_wait, path)
        os.utime(descriptor)
        yield os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def own(folder: Path) -> Ownership:
    """Own a folder that only this process names. Raises BlockingIOError if owned."""
    descriptor, _ = _lock_file(folder / OWNER_FILE, os.O_CREAT)
    os.utime(descriptor)
    return Ownership(descriptor)


def take(folder: Path, now: float, seconds: float, *, same_job: bool) -> Ownership | None:
    """Become the owner of a folder that is abandoned, or return None if it is not, or is gone.

    It is abandoned if its owner has not touched it for so many `seconds` before `now`, or was an earlier pod of the
    `same_job`, which has ended if it holds no lock. Raises PermissionError if this pod may not take it.
    """
    path = folder / OWNER_FILE
    try:
        if not os.path.lexists(path):
            # Its owner may be about to give it its final name, and a new file must not come with it.
            return own(folder) if now - folder.lstat().st_mtime > seconds else None
        abandoned = now - path.lstat().st_mtime > seconds
        descriptor, has_locks = _lock_file(path)
    except (BlockingIOError, FileNotFoundError):
        return None
    if abandoned or (same_job and has_locks):
        os.utime(descriptor)
        return Ownership(descriptor)
    os.close(descriptor)
    return None


def _lock_file(path: Path, flags: int = 0) -> tuple[int, bool]:
    """Open and lock the file, and return whether the volume supports locks."""
    descriptor = _open(path, flags)
    try:
        return descriptor, _lock(descriptor)
    except OSError:
        os.close(descriptor)
        raise


def _open(path: Path, flags: int = 0) -> int:
    """Open or make the file for writing, for pods of another user and the same group."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, _MODE)
    if flags:
        with suppress(OSError):
            os.fchmod(descriptor, _MODE)
    return descriptor


def _lock_within(descriptor: int, seconds: float, path: Path) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            _lock(descriptor)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                found = f"another process holds a lock for more than {seconds:.0f} s"
                raise TimeoutError(errno.ETIMEDOUT, found, str(path)) from error
            time.sleep(_LOOK_SECONDS)
        else:
            return


def _lock(descriptor: int) -> bool:
    """Lock, and return whether that is supported. Raises BlockingIOError if locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True
