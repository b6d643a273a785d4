"""Keeps the files of tokenized rows: for a job's next attempt, or for all cells of a sweep, of which one makes them."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.core.filesystem import PARTIAL, remove
from qlora_trainer.core.folder_lock import Ownership
from qlora_trainer.core.partial_folders import FORGOTTEN_SECONDS, PartialFolders, open_shared
from qlora_trainer.data.chunks import Chunk

_LOOK_SECONDS = 1.0
_MOST_LOOKS = 600
"""For one chunk, which takes seconds: what takes longer hangs, whatever its owner's lock says."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowsFolder:
    """A folder with chunks of rows, each complete or absent. Their names say which data and settings they are of."""

    path: Path
    partials: PartialFolders | None = None
    """Of a folder that jobs use at the same time, perhaps with other settings: decide which of them makes a part. None
    for a job's own."""

    @contextmanager
    def part(self, part: str, key: str, on_wait: Callable[[], None]) -> "Iterator[PartOfRows]":
        """The files of a part whose data and settings have this key. Raises OSError.

        In a folder of the job's own, the part's chunks of other data or settings are deleted; in a shared one, only
        what a killed pod has left incomplete. `on_wait` is called now and then while another job makes the part.
        """
        if self.partials is not None:
            self._open_shared(self.partials)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in self.path.glob(f"{part}-*"):
                if not path.name.startswith(f"{part}-{key}-"):
                    path.unlink()
        rows = PartOfRows(self.path, f"{part}-{key}", self.partials, on_wait)
        try:
            yield rows
        finally:
            rows.close()

    def _open_shared(self, partials: PartialFolders) -> None:
        for folder in (self.path.parent, self.path):
            if folder.is_symlink():
                raise OSError(f"{folder} is a symbolic link: delete it")
        open_shared(self.path)
        with partials.exclusive() as now:
            for path in self.path.glob(f".*{PARTIAL}"):
                # One that is being written gets its name at any time.
                with suppress(FileNotFoundError):
                    if not path.is_dir() and now - path.lstat().st_mtime > FORGOTTEN_SECONDS:
                        path.unlink()


class PartOfRows:
    """The chunks of one part. Of the jobs that want it at the same time one makes it, the others wait for its files.

    A chunk has the same content whichever job makes it. Where two of them do, because one has waited for too long or
    the volume knows no locks, that costs time and nothing else.
    """

    def __init__(self, folder: Path, name: str, partials: PartialFolders | None, on_wait: Callable[[], None]) -> None:
        self._folder, self._name, self._partials, self._on_wait = folder, name, partials, on_wait
        self._makes = partials is None
        self._claimed: tuple[Path, Ownership] | None = None

    def path(self, number: int) -> Path:
        """The file of the chunk of this number."""
        return self._folder / f"{self._name}-{number:06}.safetensors"

    def has(self, path: Path) -> bool:
        """Whether the chunk of this path is there, and whole: if not, it is this job's to make. Raises OSError.

        Waits while another job makes the part, until that ends, dies, or takes too long.
        """
        for _ in range(_MOST_LOOKS):
            if Chunk.read(path, verify=True) is not None:
                return True
            if self._makes:
                return False
            if self._claim():
                self._makes = True
                # Who has made the part until now may have ended between the two.
                return Chunk.read(path, verify=True) is not None
            self._on_wait()
            time.sleep(_LOOK_SECONDS)
        logger.warning(
            "another job has not made %s in %.0f seconds: this one makes the rows itself",
            path.name,
            _MOST_LOOKS * _LOOK_SECONDS,
        )
        self._makes = True
        return False

    def close(self) -> None:
        """Let others make what is not there yet."""
        if self._claimed is None:
            return
        folder, ownership = self._claimed
        try:
            # Nothing is in it. Where it stays, it is deleted once it is forgotten.
            with suppress(OSError):
                remove(folder)
        finally:
            ownership.release()

    def _claim(self) -> bool:
        if self._partials is not None:
            self._claimed = self._partials.claim(self._name)
        return self._claimed is not None
