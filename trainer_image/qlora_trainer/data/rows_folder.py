"""Keeps the files of tokenized rows: for the next attempt of a job, or for all cells of a sweep."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.core.filesystem import PARTIAL
from qlora_trainer.core.folder_lock import exclusive

FORGOTTEN_SECONDS = 3600.0
"""After so long, nobody is still writing a file of a shared folder that is incomplete."""
_LOCK_FILE = ".lock"
# Pods with another user, but with the group that owns the volume, add files.
_SHARED_MODE = 0o775


@dataclass(frozen=True)
class RowsFolder:
    """A folder with chunks of rows, each complete or absent. Their names say which data and settings they are of."""

    path: Path
    shared: bool = False
    """Whether other jobs use it at the same time, perhaps with other settings."""

    def prefix(self, part: str, key: str) -> Path:
        """How the paths begin of the chunks of a part whose data and settings have this key. Raises OSError.

        In a folder of the job's own, the part's chunks of other data or settings are deleted; in a shared one, only
        what a killed pod has left incomplete.
        """
        if self.shared:
            self._open_shared()
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in self.path.glob(f"{part}-*"):
                if not path.name.startswith(f"{part}-{key}-"):
                    path.unlink()
        return self.path / f"{part}-{key}"

    def _open_shared(self) -> None:
        for folder in (self.path.parent, self.path):
            if folder.is_symlink():
                raise OSError(f"{folder} is a symbolic link: delete it")
            with suppress(FileExistsError):
                folder.mkdir()
                folder.chmod(_SHARED_MODE)
        with exclusive(self.path / _LOCK_FILE) as now:
            for path in self.path.glob(f".*{PARTIAL}"):
                if now - path.lstat().st_mtime > FORGOTTEN_SECONDS:
                    path.unlink(missing_ok=True)
