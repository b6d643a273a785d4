"""Publishes into a folder of a volume: complete or not at all, and read back."""

import glob
import os
import shutil
from pathlib import Path

from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.core.filesystem import PARTIAL, file_sha256, new_folder, remove, sync, sync_tree
from qlora_trainer.stores.contents import MAX_MANIFEST_BYTES, Contents, Manifest, parse_manifest
from qlora_trainer.stores.destinations.destination import Destination, reject_occupied


class VolumeFolder(Destination):
    """A volume's folder, with unfinished files next to it. See Destination."""

    def __init__(self, folder: Path, uri: str, *, owner: str) -> None:
        """Create. `owner` separates this process from another one that may write there."""
        self.uri = uri
        self._folder = folder
        self._owner = owner

    def read_manifest(self) -> Manifest | None:
        """See Destination."""
        path = self._folder / PUBLISHED_MANIFEST
        # Reading a pipe would block, and a link can lead to an endless device.
        if path.is_symlink() or not path.is_file():
            return None
        with path.open("rb") as file:
            return parse_manifest(file.read(MAX_MANIFEST_BYTES + 1))

    def is_free(self) -> bool:
        """See Destination."""
        return not self._folder.exists() or (self._folder.is_dir() and not any(self._folder.iterdir()))

    def require_writable(self) -> None:
        """See Destination. Volumes have no credentials: only publish mounts them writable."""

    def find_damage(self, manifest: Manifest) -> str | None:
        """See Destination."""
        return _damaged_file(self._folder, manifest)

    def write(self, contents: Contents, manifest: Manifest) -> None:
        """See Destination. Raises OSError if it cannot write.

        Then, as after a StepFailure, the folder is unchanged.
        """
        folder = self._folder
        # Not `atomic_folder`: others write next to it, and an intact folder of theirs must survive.
        prefix = f".{folder.name}.{manifest.job_uid}"
        stage = new_folder(folder.with_name(f"{prefix}.{self._owner}{PARTIAL}"))
        try:
            for name, content in contents.items():
                _write(stage / name, content)
            (stage / PUBLISHED_MANIFEST).write_bytes(manifest.text())
            sync_tree(stage)
            _require_intact(stage, manifest)
            reject_occupied(self, manifest.publisher)
            _swap(stage, folder)
        except BaseException:
            # On a full volume its space is needed.
            remove(stage)
            raise
        for leftover in folder.parent.glob(f"{glob.escape(prefix)}.*"):
            remove(leftover)
        sync(folder.parent)
        _require_intact(folder, manifest)


def _write(path: Path, content: Path | bytes) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)


def _swap(stage: Path, folder: Path) -> None:
    """Rename to an empty or absent folder. Moves an older one of the run aside first."""
    if folder.exists() and any(folder.iterdir()):
        aside = stage.with_suffix(f".replaced{PARTIAL}")
        # The folder before the last attempt, if that was killed after the swap: on a laptop all are one owner.
        remove(aside)
        folder.rename(aside)
    os.replace(stage, folder)


def _require_intact(folder: Path, manifest: Manifest) -> None:
    damaged = _damaged_file(folder, manifest)
    if damaged is not None:
        raise OSError(f"{folder / damaged} does not read back as it was written: the volume is broken")


def _damaged_file(folder: Path, manifest: Manifest) -> str | None:
    for name, described in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or file_sha256(path) != described.sha256:
            return name
    return None
