"""Chooses the pod that makes shared content on a volume, and gives it an incomplete folder for that.

The folder `.<key>.<job>.<pod>.partial` has a name of this pod only, and an owner as `folder_lock` shows it.
"""

import stat
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from hashlib import sha256
from pathlib import Path

from qlora_trainer.core.filesystem import PARTIAL, bytes_below, new_folder, remove
from qlora_trainer.core.folder_lock import ABANDONED_SECONDS, Ownership, exclusive, own, take

FORGOTTEN_SECONDS = 3600.0
"""How long an owner may be silent before another pod deletes its leftovers."""
_LOCK_FILE = ".lock"
# Pods with other users, but with the group that owns the volume, read what is shared and can replace it.
FOLDER_MODE = 0o775


class PartialFolders:
    """The incomplete folders in a shared folder, for one pod. Methods raise OSError."""

    def __init__(self, folder: Path, job_uid: str, pod_uid: str, longest_wait: float) -> None:
        """Create. The lock is held for milliseconds, so `longest_wait` ends at a hang."""
        self.folder = folder
        self._longest_wait = longest_wait
        # Both may come from a file of the user's, and become parts of a name.
        self._job, self._pod = _short(job_uid), _short(pod_uid)

    def exclusive(self) -> AbstractContextManager[float]:
        """Let in one pod, and yield the volume's time. Raises TimeoutError if one stays."""
        return exclusive(self.folder / _LOCK_FILE, self._longest_wait)

    def claim(self, key: str) -> tuple[Path, Ownership] | None:
        """This pod's folder for the content of this key (without a dot), or None while another pod makes it.

        It may have what a killed pod has left. The caller removes and releases it. Raises TimeoutError.
        """
        with self.exclusive() as now, ExitStack() as held:
            abandoned: dict[Path, Ownership] = {}
            for partial in self._all():
                ownership = self._take(partial, key, now)
                if ownership is not None:
                    abandoned[partial] = ownership
                    held.callback(ownership.release)
                elif _is_of(partial, key):
                    return None
            claimed = self._first(abandoned, key)
            held.pop_all()
            for ownership in abandoned.values():
                if ownership is not claimed[1]:
                    ownership.release()
            return claimed

    def bytes_made(self, key: str) -> int | None:
        """Bytes in an incomplete folder of this key, of any pod, or None without one."""
        found = [partial for partial in self._all() if _is_of(partial, key)]
        return max(map(_plain_bytes, found), default=None)

    def of_this_pod(self, key: str) -> Path:
        """The path of this pod's folder for the key, existing or not."""
        return self.folder / f".{key}.{self._job}.{self._pod}{PARTIAL}"

    def _first(self, abandoned: Mapping[Path, Ownership], key: str) -> tuple[Path, Ownership]:
        """This pod's folder: the largest abandoned one, or a new one. Deletes the others."""
        mine = self.of_this_pod(key)
        usable = [partial for partial in abandoned if _is_of(partial, key) and _is_plain(partial)]
        chosen = max(usable, key=_plain_bytes, default=None)
        for partial in abandoned.keys() - {chosen}:
            # One that another user's pod has left can be in the way of nothing but space.
            with suppress(PermissionError):
                remove(partial)
        if chosen is not None:
            chosen.rename(mine)
            return mine, abandoned[chosen]
        new_folder(mine)
        try:
            set_mode(mine, FOLDER_MODE)
            return mine, own(mine)
        except OSError:
            remove(mine)
            raise

    def _take(self, partial: Path, key: str, now: float) -> Ownership | None:
        wanted = _is_of(partial, key)
        if partial == self.of_this_pod(key):
            return own(partial)
        try:
            seconds = ABANDONED_SECONDS if wanted else FORGOTTEN_SECONDS
            return take(partial, now, seconds, same_job=wanted and partial.name.split(".")[2] == self._job)
        except PermissionError:
            if wanted:
                raise
            # Another user's, of other content: it blocks no pod.
            return None

    def _all(self) -> list[Path]:
        """Incomplete folders, sorted by name, without files."""
        found = sorted(self.folder.glob(f".*.*.*{PARTIAL}"))
        return [path for path in found if path.name.count(".") == 4 and path.is_dir() and not path.is_symlink()]


def open_shared(folder: Path) -> None:
    """Make a folder and its parent for pods of other users too. Raises OSError."""
    for path in (folder.parent, folder):
        if not path.is_dir():
            path.mkdir(exist_ok=True)
            set_mode(path, FOLDER_MODE)


def set_mode(path: Path, mode: int) -> None:
    """Set the mode, if the volume has modes, but keep the bit for the files' group."""
    with suppress(OSError):
        path.chmod(mode | (path.stat().st_mode & stat.S_ISGID))


def _is_of(partial: Path, key: str) -> bool:
    return partial.name.startswith(f".{key}.")


def _is_plain(folder: Path) -> bool:
    """Whether a folder has only folders and regular files, without a way out of it."""
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            return False
    return True


def _plain_bytes(folder: Path) -> int:
    """Bytes below a folder that another process may change while it is read."""
    try:
        return bytes_below(folder)
    except OSError:
        return 0


def _short(name: str) -> str:
    return sha256(name.encode()).hexdigest()[:16]
