"""Base models that the jobs of a namespace share: a folder for each, complete and with its digests, or not there.

`models/<key>/` has the files of a model and a manifest with the size and SHA-256 of each; nothing in it is changed
again. It is filled under a name of the filling pod's own, `.<key>.<job>.<pod>.partial`, and renamed at the end.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from qlora_api.contract import ModelCacheLayout
from qlora_api.schema import ObservedModel
from qlora_trainer.core.failures import StepFailure, model_unavailable
from qlora_trainer.core.filesystem import (
    PARTIAL,
    bytes_below,
    file_sha256,
    new_folder,
    remove,
    sync,
    sync_tree,
    write_atomically,
)
from qlora_trainer.core.folder_lock import ABANDONED_SECONDS, OWNER_FILE, Ownership, exclusive, own, take
from qlora_trainer.core.paths import some_names
from qlora_trainer.stores.contents import PublishedFile

CACHE_MANIFEST = "cache-manifest.json"
_LOCK_FILE = ".lock"
_MAX_MANIFEST_BYTES = 2**20
FORGOTTEN_SECONDS = 3600.0
"""So long after its owner's last sign of life, an incomplete folder is deleted by whoever fills another one."""
# Pods with other users, but with the group that owns the volume, read the files and can replace a damaged folder.
_FILE_MODE, _FOLDER_MODE, _UMASK = 0o444, 0o775, 0o002


class CacheManifest(ObservedModel):
    """What a complete folder has, by name. `source` and `version` are for people who look for a model."""

    source: str
    version: str
    files: dict[str, PublishedFile]


class DamagedCacheError(Exception):
    """A folder in the cache is not what was put there. The message is a part of a sentence about it."""

    def __init__(self, message: str, sound: Collection[str] = ()) -> None:
        """`sound`: names of the files that are as they should be all the same."""
        super().__init__(message)
        self.sound = frozenset(sound)


@dataclass(frozen=True)
class Wanted:
    """A file as the server describes it."""

    size: int
    sha256: str | None
    """Not every server knows it."""


@dataclass(frozen=True)
class CachedFolder:
    """A complete folder, or whatever else has its name."""

    path: Path
    identity: tuple[int, int]
    """Differs once the folder has been replaced, or filled again."""

    def verified_digests(self, wanted: Mapping[str, Wanted], on_bytes: Callable[[int, int], None]) -> dict[str, str]:
        """SHA-256 of each file, by name, after reading all of them. Raises DamagedCacheError unless they are `wanted`.

        `on_bytes` is called with the bytes that have been read and the total.
        """
        try:
            files = files_of(self.path)
        except OSError as error:
            raise DamagedCacheError(f"it cannot be read: {error.strerror}") from error
        if files.keys() != wanted.keys():
            raise DamagedCacheError(f"it has {some_names(files)}")
        total, finished, digests = sum(file.size for file in files.values()), 0, {}
        for name, file in files.items():
            found = _sha256(self.path / name, finished, total, on_bytes)
            if found == file.sha256 == (wanted[name].sha256 or found) and file.size == wanted[name].size:
                digests[name] = found
            finished += file.size
            on_bytes(finished, total)
        if wrong := files.keys() - digests.keys():
            raise DamagedCacheError(f"wrong content of {some_names(wrong)}", digests)
        return digests


class ModelCache:
    """The cache as one pod uses it. Methods raise OSError, as the volume does."""

    def __init__(self, layout: ModelCacheLayout, job_uid: str, pod_uid: str) -> None:
        self._models = layout.models
        # Both may come from a file of the user's, and become parts of a name.
        self._job, self._pod = _short(job_uid), _short(pod_uid)

    def find(self, key: str) -> CachedFolder | None:
        """The folder of a model, which is still to be verified."""
        self._require_no_link()
        path = self._models / key
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        return CachedFolder(path, (found.st_ino, found.st_mtime_ns))

    def bytes_being_fetched(self, key: str) -> int | None:
        """Bytes in an incomplete folder of the model, of whichever pod; None if there is none."""
        found = [partial for partial in self._partials() if self._is_of(partial, key)]
        return max(map(_plain_bytes, found), default=None)

    def free_bytes(self) -> int:
        """Free on the volume."""
        return shutil.disk_usage(self._models if self._models.is_dir() else self._models.parent).free

    @contextmanager
    def claim(self, key: str) -> Iterator[Path | None]:
        """Yield a folder to fill, perhaps with what a killed pod has left of it; None while another pod fills one.

        If the body raises, the folder stays where the next attempt may resume from it, and is removed after an error
        that another attempt cannot fix.
        """
        claimed = self._claim(key)
        if claimed is None:
            yield None
            return
        partial, ownership = claimed
        before = os.umask(_UMASK)
        try:
            yield partial
        except StepFailure as failure:
            if failure.exit_code.permanent:
                remove(partial)
            raise
        except OSError:
            remove(partial)
            raise
        finally:
            os.umask(before)
            ownership.release()

    def complete(self, partial: Path, key: str, manifest: CacheManifest) -> Path | None:
        """Make a claimed folder the model's; None, and it is removed, if another pod was faster."""
        target = self._models / key
        for path in partial.iterdir():
            if path.name not in manifest.files and path.name != OWNER_FILE:
                remove(path)
        write_atomically(partial / CACHE_MANIFEST, json.dumps(manifest.dump(), indent=2, sort_keys=True).encode())
        for name in (*manifest.files, CACHE_MANIFEST):
            _set_mode(partial / name, _FILE_MODE)
        _set_mode(partial, _FOLDER_MODE)
        sync_tree(partial)
        remove(partial / OWNER_FILE)
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            remove(partial)
            return None
        sync(self._models)
        return target

    def set_aside(self, folder: CachedFolder, sound: Collection[str]) -> None:
        """Make a damaged folder an incomplete one of this pod's, with its `sound` files; nothing if it was replaced."""
        with exclusive(self._models / _LOCK_FILE):
            if self.find(folder.path.name) != folder:
                return
            partial = self._own_partial(folder.path.name)
            remove(partial)
            folder.path.rename(partial)
        if partial.is_symlink() or not partial.is_dir():
            remove(partial)
            return
        for path in partial.iterdir():
            if path.name not in sound:
                remove(path)

    def _claim(self, key: str) -> tuple[Path, Ownership] | None:
        self._require_no_link()
        if not self._models.is_dir():
            self._models.mkdir(exist_ok=True)
            _set_mode(self._models, _FOLDER_MODE)
        with exclusive(self._models / _LOCK_FILE) as now, ExitStack() as held:
            abandoned: dict[Path, Ownership] = {}
            for partial in self._partials():
                ownership = self._take(partial, key, now)
                if ownership is not None:
                    abandoned[partial] = ownership
                    held.callback(ownership.release)
                elif self._is_of(partial, key):
                    return None
            claimed = self._first(abandoned, key)
            held.pop_all()
            for ownership in abandoned.values():
                if ownership is not claimed[1]:
                    ownership.release()
            return claimed

    def _first(self, abandoned: Mapping[Path, Ownership], key: str) -> tuple[Path, Ownership]:
        """This pod's folder: that of the abandoned ones which has most, else a new one. The others are deleted."""
        mine = self._own_partial(key)
        usable = [partial for partial in abandoned if self._is_of(partial, key) and _is_plain(partial)]
        chosen = max(usable, key=_plain_bytes, default=None)
        for partial in abandoned.keys() - {chosen}:
            # One that another user's pod has left can be in the way of nothing but space.
            with suppress(PermissionError):
                remove(partial)
        if chosen is not None:
            chosen.rename(mine)
            # Notes of the hub's client, and parts of files from which it does not resume.
            for path in (path for path in mine.iterdir() if path.is_dir()):
                remove(path)
            return mine, abandoned[chosen]
        new_folder(mine)
        try:
            _set_mode(mine, _FOLDER_MODE)
            return mine, own(mine)
        except OSError:
            remove(mine)
            raise

    def _take(self, partial: Path, key: str, now: float) -> Ownership | None:
        wanted = self._is_of(partial, key)
        if partial == self._own_partial(key):
            return own(partial)
        try:
            seconds = ABANDONED_SECONDS if wanted else FORGOTTEN_SECONDS
            return take(partial, now, seconds, same_job=wanted and partial.name.split(".")[2] == self._job)
        except PermissionError:
            if wanted:
                raise
            # Another user's, of another model: it is in nobody's way.
            return None

    def _partials(self) -> list[Path]:
        """Incomplete folders, in the order of their names. What is no folder is not looked at."""
        found = sorted(self._models.glob(f".*.*.*{PARTIAL}"))
        return [path for path in found if path.name.count(".") == 4 and path.is_dir() and not path.is_symlink()]

    def _own_partial(self, key: str) -> Path:
        return self._models / f".{key}.{self._job}.{self._pod}{PARTIAL}"

    @staticmethod
    def _is_of(partial: Path, key: str) -> bool:
        return partial.name.startswith(f".{key}.")

    def _require_no_link(self) -> None:
        if self._models.is_symlink():
            raise OSError(errno.ELOOP, f"{self._models.name} is a symbolic link")


def cache_key(version: str, names: Collection[str]) -> str:
    """The folder's name for a version of a model and these of its small files, in hexadecimal.

    Another release may use other files of the same model; a folder that it adds to would change for jobs that run.
    """
    return sha256("\n".join([version, *sorted(names)]).encode()).hexdigest()


def files_of(folder: Path) -> Mapping[str, PublishedFile]:
    """The files of a complete folder by its manifest. Only names, kinds and sizes are looked at; no link is followed.

    Raises DamagedCacheError if a file is missing, strange, of another size or too many, and OSError.
    """
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise DamagedCacheError("it is not a folder")
    with os.scandir(folder) as entries:
        found = {entry.name: entry for entry in entries}
    if CACHE_MANIFEST not in found:
        raise DamagedCacheError(f"it has no {CACHE_MANIFEST}")
    for name, entry in found.items():
        if not entry.is_file(follow_symlinks=False):
            raise DamagedCacheError(f"{name[:80]!r} in it is not a regular file")
    files = _manifest(folder / CACHE_MANIFEST).files
    if other := found.keys() ^ {*files, CACHE_MANIFEST}:
        raise DamagedCacheError(f"its manifest and its files differ in {some_names(name[:80] for name in other)}")
    for name, file in files.items():
        size = found[name].stat(follow_symlinks=False).st_size
        if size != file.size:
            raise DamagedCacheError(f"{name} has {size} bytes and not {file.size}")
    return files


def is_whole(folder: Path, cache: Path | None) -> bool:
    """Whether the base model is complete, if it is in the cache. Of a model elsewhere nothing is looked at."""
    try:
        require_whole_in_cache(folder, cache)
    except StepFailure:
        return False
    return True


def require_whole_in_cache(folder: Path, cache: Path | None) -> None:
    """Raise StepFailure MODEL_UNAVAILABLE if the base model is in the cache and no longer complete there."""
    if cache is None or not folder.is_relative_to(cache):
        return
    try:
        files_of(folder)
    except (DamagedCacheError, OSError) as error:
        raise model_unavailable(
            f"the base model is no longer whole in the model cache ({error}): nothing may delete or change files there "
            "while jobs run; create the job again, which fetches the model again"
        ) from error


def _manifest(path: Path) -> CacheManifest:
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise DamagedCacheError(f"its {CACHE_MANIFEST} has more than {_MAX_MANIFEST_BYTES} bytes")
    try:
        return CacheManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DamagedCacheError(f"its {CACHE_MANIFEST} cannot be read") from error


def _sha256(path: Path, before: int, total: int, on_bytes: Callable[[int, int], None]) -> str | None:
    """The digest of a file that `before` bytes precede; None for a bad block, or one that this pod may not read."""
    try:
        return file_sha256(path, lambda done: on_bytes(before + done, total))
    except OSError:
        return None


def _is_plain(folder: Path) -> bool:
    """Whether all below the folder are folders and regular files: nothing through which a write would leave it."""
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            return False
    return True


def _plain_bytes(folder: Path) -> int:
    """Bytes below a folder that another process may change, rename or delete meanwhile."""
    try:
        return bytes_below(folder)
    except OSError:
        return 0


def _set_mode(path: Path, mode: int) -> None:
    """Set the mode, but not the bit by which new files get a folder's group. Not every volume has modes."""
    with suppress(OSError):
        path.chmod(mode | (path.stat().st_mode & stat.S_ISGID))


def _short(name: str) -> str:
    return sha256(name.encode()).hexdigest()[:16]
