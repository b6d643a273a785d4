"""4-bit bases that the jobs of a namespace share: a folder for each, complete and with its digests, or absent.

`quantized/<key>/` has the files of a base and a manifest with the size and SHA-256 of each. Nothing in it is changed
again. It is made in a folder named after the pod, `.<key>.<job>.<pod>.partial`, and moved out at the end.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version as installed
from pathlib import Path

from qlora_api.contract import ModelCacheLayout
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import StepFailure, model_unavailable, unreachable
from qlora_trainer.core.filesystem import file_sha256, is_full, new_folder, partial_path, remove, sync, sync_tree
from qlora_trainer.core.partial_folders import FOLDER_MODE, PartialFolders, open_shared, set_mode
from qlora_trainer.core.paths import some_names
from qlora_trainer.model.base.artifact import FORMAT, MANIFEST, BaseManifest, has_size, read_manifest

_MADE = "base"
"""In a pod's own folder: where the base is made."""
_LIBRARIES = ("bitsandbytes", "torch", "transformers")
"""They choose the layers and compute the bytes."""
_LONGEST_WAIT_SECONDS = 60.0
"""For the cache's lock. A pod holds it for milliseconds, unless it hangs."""
# Pods with other users, but with the group that owns the volume, read the files and can replace a damaged folder.
_FILE_MODE, _UMASK = 0o444, 0o002


class DamagedCacheError(Exception):
    """A cached folder is damaged. The message is part of a sentence about it."""


class UnusableCacheError(Exception):
    """The cache's volume is full, read-only or broken. Its content may be sound."""

    def __init__(self, message: str, *, can_pass: bool = False) -> None:
        """`can_pass`: for an error of the volume, which another attempt may not meet."""
        super().__init__(message)
        self.can_pass = can_pass


@contextmanager
def volume_errors() -> Iterator[None]:
    """Raise UnusableCacheError for an OSError: the job continues without the cache."""
    try:
        yield
    except OSError as error:
        raise UnusableCacheError(error.strerror or type(error).__name__, can_pass=not is_full(error)) from error


@contextmanager
def read_errors() -> Iterator[None]:
    """Raise DamagedCacheError for a missing file, UnusableCacheError for a read error."""
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
        """Its manifest. Raises DamagedCacheError, UnusableCacheError."""
        return manifest_of(self.path)

    @read_errors()
    def require_sound(self, manifest: BaseManifest, on_bytes: Callable[[int, int], None]) -> None:
        """Raise DamagedCacheError unless all files are those of the manifest."""
        total, finished, wrong = sum(file.size for file in manifest.files.values()), 0, []
        for name, file in manifest.files.items():
            before = finished
            found = file_sha256(self.path / name, lambda done, before=before: on_bytes(before + done, total))  # type: ignore[misc]
            if found != file.sha256:
                wrong.append(name)
            finished += file.size
            on_bytes(finished, total)
        if wrong:
            raise DamagedCacheError(f"wrong content of {some_names(wrong)}")


class ModelCache:
    """The cache as one pod uses it. Methods raise UnusableCacheError."""

    def __init__(self, layout: ModelCacheLayout, job_uid: str, pod_uid: str) -> None:
        self._bases = layout.quantized
        self._partials = PartialFolders(self._bases, job_uid, pod_uid, _LONGEST_WAIT_SECONDS)

    @volume_errors()
    def find(self, key: str) -> CachedFolder | None:
        """The folder of a base, which is still to be verified."""
        self._validate_no_link()
        path = self._bases / key
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        return CachedFolder(path, (found.st_ino, found.st_mtime_ns))

    @volume_errors()
    def bytes_being_made(self, key: str) -> int | None:
        """Bytes in an incomplete folder of the base, of any pod, or None."""
        return self._partials.bytes_made(key)

    @volume_errors()
    def free_bytes(self) -> int:
        """Free on the volume."""
        return shutil.disk_usage(next(folder for folder in (self._bases, *self._bases.parents) if folder.is_dir())).free

    @contextmanager
    def claim(self, key: str) -> Iterator[Path | None]:
        """Yield the folder to make the base in, or None while another pod makes it.

        The folder may have what a killed pod has left. It stays for the next attempt if the body raises, unless with an
        error that another attempt cannot fix.
        """
        with volume_errors():
            self._validate_no_link()
            # Of the cells of a sweep, the first also makes the folder that they share.
            open_shared(self._bases)
            claimed = self._partials.claim(key)
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
        """Move a complete base to its name. Returns None if another pod was faster."""
        target = self._bases / key
        for path in made.iterdir():
            set_mode(path, _FILE_MODE)
        set_mode(made, FOLDER_MODE)
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
        """Remove a base, complete or not, from the folder of `claim`."""
        remove(made.parent)

    @volume_errors()
    def set_aside(self, folder: CachedFolder) -> None:
        """Make a damaged base an incomplete one of this pod, unless it was replaced."""
        with self._partials.exclusive():
            if self.find(folder.path.name) != folder:
                return
            partial = new_folder(self._partials.of_this_pod(folder.path.name))
            set_mode(partial, FOLDER_MODE)
            folder.path.rename(partial_path(partial / _MADE))

    def _validate_no_link(self) -> None:
        if self._bases.is_symlink():
            raise UnusableCacheError(f"{self._bases.name} is a symbolic link")

    @staticmethod
    def _remove(partial: Path) -> None:
        """Delete it. A volume that does not let this pod do so is no reason to fail."""
        with suppress(OSError):
            remove(partial)


def cache_key(version: str, quantization: QuantizationSpec) -> str:
    """The folder's name: SHA-256 of everything that the base's bytes depend on."""
    # Builds of a library for other devices differ behind the plus sign; it is the CPU that quantizes.
    libraries = {name: installed(name).partition("+")[0] for name in _LIBRARIES}
    parts = {"version": version, "quantization": quantization.dump(), "format": FORMAT, "libraries": libraries}
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def manifest_of(folder: Path) -> BaseManifest:
    """The manifest of a complete base. Raises DamagedCacheError, OSError."""
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
    """Whether the base is complete, or not in the cache."""
    try:
        require_whole_in_cache(folder, cache)
    except StepFailure:
        return False
    return True


def require_whole_in_cache(folder: Path, cache: Path | None) -> None:
    """Raise StepFailure if the base is in the cache, but not complete there."""
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
            "while jobs run; set a new spec.retry.request, and prepare makes it again"
        ) from error
