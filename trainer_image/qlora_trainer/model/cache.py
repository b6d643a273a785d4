"""4-bit bases that the jobs of a namespace share: a folder for each, complete and with its digests, or not there.

`quantized/<key>/` has the files of a base and a manifest with the size and SHA-256 of each; nothing in it is changed
again. It is made in a folder with a name of the pod's own, `.<key>.<job>.<pod>.partial`, and moved out at the end.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version as installed
from pathlib import Path

from qlora_api.contract import ModelCacheLayout
from qlora_api.training import QuantizationSpec
from qlora_trainer.core.failures import StepFailure, model_unavailable, unreachable
from qlora_trainer.core.filesystem import (
    PARTIAL,
    bytes_below,
    file_sha256,
    is_full,
    new_folder,
    partial_path,
    remove,
    sync,
    sync_tree,
)
from qlora_trainer.core.folder_lock import ABANDONED_SECONDS, Ownership, exclusive, own, take
from qlora_trainer.core.paths import some_names
from qlora_trainer.model.base_artifact import FORMAT, MANIFEST, BaseManifest, has_size, read_manifest

_LOCK_FILE = ".lock"
_MADE = "base"
"""In a pod's own folder: where the base is made."""
_LIBRARIES = ("bitsandbytes", "torch", "transformers")
"""They choose the layers and compute the bytes."""
FORGOTTEN_SECONDS = 3600.0
"""So long after its owner's last sign of life, an incomplete folder is deleted by whoever fills another one."""
# Pods with other users, but with the group that owns the volume, read the files and can replace a damaged folder.
_FILE_MODE, _FOLDER_MODE, _UMASK = 0o444, 0o775, 0o002


class DamagedCacheError(Exception):
    """A folder in the cache is not what was put there. The message is a part of a sentence about it."""


class UnusableCacheError(Exception):
    """The cache's volume is full, read-only or broken. The message is a part of a sentence about it.

    What is in it may be sound, and other jobs may be reading it: nothing is set aside.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        """`may_pass`: for an error of the volume, which another attempt may not meet."""
        super().__init__(message)
        self.may_pass = may_pass


@contextmanager
def volume_errors() -> Iterator[None]:
    """Raise UnusableCacheError for an OSError: the job goes on without the cache, unlike for one of its workspace."""
    try:
        yield
    except OSError as error:
        raise UnusableCacheError(error.strerror or type(error).__name__, may_pass=not is_full(error)) from error


@contextmanager
def read_errors() -> Iterator[None]:
    """Raise DamagedCacheError for a file that is gone, and UnusableCacheError for one that cannot be read now."""
    with volume_errors():
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedCacheError("a file of it is missing") from error


@dataclass(frozen=True)
class CachedFolder:
    """A complete folder, or whatever else has its name."""

    path: Path
    identity: tuple[int, int]
    """Differs once the folder has been replaced, or filled again."""

    @read_errors()
    def manifest(self) -> BaseManifest:
        """What is in it, without reading it. Raises DamagedCacheError, UnusableCacheError."""
        return manifest_of(self.path)

    @read_errors()
    def require_sound(self, manifest: BaseManifest, on_bytes: Callable[[int, int], None]) -> None:
        """Read all files. Raises DamagedCacheError unless they are those of the manifest, UnusableCacheError.

        `on_bytes` is called with the bytes that have been read and the total.
        """
        total, finished, wrong = sum(file.size for file in manifest.files.values()), 0, []
        for name, file in manifest.files.items():
            if _sha256(self.path / name, finished, total, on_bytes) != file.sha256:
                wrong.append(name)
            finished += file.size
            on_bytes(finished, total)
        if wrong:
            raise DamagedCacheError(f"wrong content of {some_names(wrong)}")


class ModelCache:
    """The cache as one pod uses it. Methods raise UnusableCacheError if the volume does not let them."""

    def __init__(self, layout: ModelCacheLayout, job_uid: str, pod_uid: str) -> None:
        self._bases = layout.quantized
        # Both may come from a file of the user's, and become parts of a name.
        self._job, self._pod = _short(job_uid), _short(pod_uid)

    @volume_errors()
    def find(self, key: str) -> CachedFolder | None:
        """The folder of a base, which is still to be verified."""
        self._require_no_link()
        path = self._bases / key
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        return CachedFolder(path, (found.st_ino, found.st_mtime_ns))

    @volume_errors()
    def bytes_being_made(self, key: str) -> int | None:
        """Bytes in an incomplete folder of the base, of whichever pod; None if there is none."""
        found = [partial for partial in self._partials() if self._is_of(partial, key)]
        return max(map(_plain_bytes, found), default=None)

    @volume_errors()
    def free_bytes(self) -> int:
        """Free on the volume."""
        return shutil.disk_usage(next(folder for folder in (self._bases, *self._bases.parents) if folder.is_dir())).free

    @contextmanager
    def claim(self, key: str) -> Iterator[Path | None]:
        """Yield where to make the base, perhaps with what a killed pod has left of it; None while another pod makes it.

        If the body raises, the folder stays where the next attempt may resume from it, and is removed after an error
        that another attempt cannot fix.
        """
        with volume_errors():
            claimed = self._claim(key)
        if claimed is None:
            yield None
            return
        partial, ownership = claimed
        before = os.umask(_UMASK)
        try:
            yield partial / _MADE
        except StepFailure as failure:
            if failure.exit_code.permanent:
                self._remove(partial)
            raise
        except UnusableCacheError:
            self._remove(partial)
            raise
        finally:
            os.umask(before)
            ownership.release()

    @volume_errors()
    def complete(self, made: Path, key: str) -> Path | None:
        """Move a complete base from where it was made to its name; None, and it is removed, if another pod was faster.

        Returns its folder.
        """
        target = self._bases / key
        for path in made.iterdir():
            _set_mode(path, _FILE_MODE)
        _set_mode(made, _FOLDER_MODE)
        sync_tree(made)
        try:
            made.rename(target)
            first = True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            first = False
        remove(made.parent)
        sync(self._bases)
        return target if first else None

    @volume_errors()
    def discard(self, made: Path) -> None:
        """Remove what was made, or begun, where `claim` has said."""
        remove(made.parent)

    @volume_errors()
    def set_aside(self, folder: CachedFolder) -> None:
        """Make a damaged base one that this pod has begun; nothing if it was replaced."""
        with exclusive(self._bases / _LOCK_FILE):
            if self.find(folder.path.name) != folder:
                return
            partial = new_folder(self._own_partial(folder.path.name))
            _set_mode(partial, _FOLDER_MODE)
            folder.path.rename(partial_path(partial / _MADE))

    def _claim(self, key: str) -> tuple[Path, Ownership] | None:
        self._require_no_link()
        # Of the cells of a sweep, the first also makes the folder that they share.
        for folder in (self._bases.parent, self._bases):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                _set_mode(folder, _FOLDER_MODE)
        with exclusive(self._bases / _LOCK_FILE) as now, ExitStack() as held:
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
        found = sorted(self._bases.glob(f".*.*.*{PARTIAL}"))
        return [path for path in found if path.name.count(".") == 4 and path.is_dir() and not path.is_symlink()]

    def _own_partial(self, key: str) -> Path:
        return self._bases / f".{key}.{self._job}.{self._pod}{PARTIAL}"

    @staticmethod
    def _is_of(partial: Path, key: str) -> bool:
        return partial.name.startswith(f".{key}.")

    def _require_no_link(self) -> None:
        if self._bases.is_symlink():
            raise UnusableCacheError(f"{self._bases.name} is a symbolic link")

    @staticmethod
    def _remove(partial: Path) -> None:
        """Delete it. A volume that does not let this pod do so is no reason to fail."""
        with suppress(OSError):
            remove(partial)


def cache_key(version: str, quantization: QuantizationSpec) -> str:
    """The folder's name for a base, in hexadecimal: the SHA-256 of everything on which its bytes depend.

    `version` identifies the original. A base of other libraries gets another folder, because a folder never changes.
    """
    # Builds of a library for other devices differ behind the plus sign; it is the CPU that quantizes.
    libraries = {name: installed(name).partition("+")[0] for name in _LIBRARIES}
    parts = {"version": version, "quantization": quantization.dump(), "format": FORMAT, "libraries": libraries}
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def manifest_of(folder: Path) -> BaseManifest:
    """The manifest of a complete base. Only names, kinds and sizes are looked at; no link is followed.

    Raises DamagedCacheError if a file is missing, strange, of another size or too many, and OSError.
    """
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise DamagedCacheError("it is not a folder")
    with os.scandir(folder) as entries:
        found = {entry.name: entry for entry in entries}
    if MANIFEST not in found:
        raise DamagedCacheError(f"it has no {MANIFEST}")
    for name, entry in found.items():
        if not entry.is_file(follow_symlinks=False):
            raise DamagedCacheError(f"{name[:80]!r} in it is not a regular file")
    manifest = read_manifest(folder)
    if manifest is None:
        raise DamagedCacheError(f"its {MANIFEST} cannot be read")
    if other := found.keys() ^ {*manifest.files, MANIFEST}:
        raise DamagedCacheError(f"its manifest and its files differ in {some_names(name[:80] for name in other)}")
    for name, file in manifest.files.items():
        if not has_size(folder / name, file.size):
            raise DamagedCacheError(f"{name} has {(folder / name).stat().st_size} bytes and not {file.size}")
    return manifest


def is_whole(folder: Path, cache: Path | None) -> bool:
    """Whether the base is complete, if it is in the cache. Of one elsewhere nothing is looked at."""
    try:
        require_whole_in_cache(folder, cache)
    except StepFailure:
        return False
    return True


def require_whole_in_cache(folder: Path, cache: Path | None) -> None:
    """Raise StepFailure if the base is in the cache, and MODEL_UNAVAILABLE if it is no longer complete there.

    UNREACHABLE if the volume does not tell.
    """
    if cache is None or not folder.is_relative_to(cache):
        return
    try:
        with read_errors():
            manifest_of(folder)
    except UnusableCacheError as error:
        raise unreachable(f"the base model in the model cache cannot be read ({error}); the step is retried") from error
    except DamagedCacheError as error:
        raise model_unavailable(
            f"the base model is no longer whole in the model cache ({error}): nothing may delete or change files there "
            "while jobs run; raise spec.retry.request, and prepare makes it again"
        ) from error


def _sha256(path: Path, before: int, total: int, on_bytes: Callable[[int, int], None]) -> str:
    """The digest of a file that `before` bytes precede."""
    return file_sha256(path, lambda done: on_bytes(before + done, total))


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
