"""Keeps tokenized rows for a job's next attempt, or for all cells of a sweep."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.core.filesystem import PARTIAL, remove
from qlora_trainer.core.folder_lock import Ownership
from qlora_trainer.core.partial_folders import FORGOTTEN_SECONDS, PartialFolders, open_shared
from qlora_trainer.data.tokenize.chunks import Chunk, Limits

_LOOK_SECONDS = 1.0
_MOST_LOOKS = 600
"""For one chunk, which takes seconds. A longer one hangs, whatever its lock shows."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowsFolder:
    """A folder with chunks of rows, complete or absent, named by data and settings."""

    own: Path
    """The job's own."""
    shared: PartialFolders | None = None
    """In the folder that is used instead, by jobs at the same time, perhaps with other settings: decide which of them
    makes a part. What this job may not write there goes into its own folder."""

    @classmethod
    def from_shared(cls, own: Path, shared: Path, job_uid: str, pod_uid: str) -> "RowsFolder":
        """The rows of one of the jobs that share them."""
        # No job waits for the lock: without it, another job counts as the one that makes the rows.
        return cls(own, PartialFolders(shared, job_uid, pod_uid, longest_wait=0))

    @contextmanager
    def part(self, part: str, key: str, limits: Limits, on_wait: Callable[[], None]) -> "Iterator[PartOfRows]":
        """The files of a part whose data and settings have this key, and whose tokens these limits. Raises OSError.

        Deletes the job's own chunks of other settings, and what a killed pod has left. Waiting calls `on_wait`.
        """
        for path in self.own.glob(f"{part}-*"):
            if not path.name.startswith(f"{part}-{key}-"):
                path.unlink()
        shared = None if self.shared is None else _open(self.shared)
        with closing(PartOfRows(self.own, shared, f"{part}-{key}", limits, on_wait)) as rows:
            yield rows


@dataclass(frozen=True)
class ChunkFile:
    """Where a chunk is kept."""

    path: Path
    own: Path | None = None
    """Of one in a shared folder: where this job keeps it if it may not write there."""

    def read(self, limits: Limits) -> Chunk | None:
        """The chunk, if it exists, whole and within the limits. Raises OSError."""
        chunk = Chunk.read(self.path, limits, verify=True)
        if chunk is None and self.own is not None:
            return Chunk.read(self.own, limits, verify=True)
        return chunk

    def write(self, chunk: Chunk) -> Path:
        """Write or replace the chunk, and return its file. Raises OSError."""
        try:
            chunk.write(self.path)
        except (PermissionError, IsADirectoryError) as error:
            if self.own is None:
                raise
            logger.warning(
                "the rows of this job go into its own folder: other jobs do not allow writing theirs: %s", error
            )
            chunk.write(self.own)
            return self.own
        return self.path


class PartOfRows:
    """The chunks of one part. Of the jobs that want it at the same time one makes it, the others wait for its files.

    Where two jobs make a chunk, it has the same content: that costs time and nothing else.
    """

    def __init__(
        self, own: Path, shared: PartialFolders | None, name: str, limits: Limits, on_wait: Callable[[], None]
    ) -> None:
        self._own, self._shared, self._name, self._limits, self._on_wait = own, shared, name, limits, on_wait
        self._makes = shared is None
        self._claimed: tuple[Path, Ownership] | None = None

    def file(self, number: int) -> ChunkFile:
        """The path of the chunk of this number, existing or not."""
        name = f"{self._name}-{number:06}.safetensors"
        if self._shared is None:
            return ChunkFile(self._own / name)
        return ChunkFile(self._shared.folder / name, self._own / name)

    def find(self, number: int) -> Chunk | None:
        """The chunk, or None for this job to make it. Waits while another job makes it."""
        file = self.file(number)
        for _ in range(_MOST_LOOKS):
            chunk = file.read(self._limits)
            if chunk is not None or self._makes:
                return chunk
            if self._claim():
                self._makes = True
                # The job that made the part may have ended between the two.
                return file.read(self._limits)
            self._on_wait()
            time.sleep(_LOOK_SECONDS)
        logger.warning(
            "in %.0f seconds another job has not made %s, or not released the lock next to it: this one makes the rows "
            "itself",
            _MOST_LOOKS * _LOOK_SECONDS,
            file.path,
        )
        self._makes = True
        return None

    def close(self) -> None:
        """Let others make what is not there yet."""
        if self._claimed is None:
            return
        folder, ownership = self._claimed
        try:
            # Nothing is in it. A folder that stays is deleted as an outdated one later.
            with suppress(OSError):
                remove(folder)
        finally:
            ownership.release()

    def _claim(self) -> bool:
        """Whether this job is to make the part."""
        if self._shared is None:
            return True
        try:
            self._claimed = self._shared.claim(self._name)
        except TimeoutError:
            return False
        except PermissionError as error:
            logger.warning("it cannot be known whether another job makes the same rows: %s", error)
            return True
        return self._claimed is not None


def _open(shared: PartialFolders) -> PartialFolders | None:
    """The folder without killed pods' files, or None if unusable. Raises OSError."""
    folder = shared.folder
    for path in (folder.parent, folder):
        if path.is_symlink():
            raise OSError(f"{path} is a symbolic link: delete it")
    try:
        open_shared(folder)
        # The lock's holder may be doing the same. If it hangs, the next job does it.
        with suppress(TimeoutError), shared.exclusive() as now:
            for path in folder.glob(f".*{PARTIAL}"):
                # One that is being written gets its name at any time, and another user's may stay.
                with suppress(FileNotFoundError, PermissionError):
                    if not path.is_dir() and now - path.lstat().st_mtime > FORGOTTEN_SECONDS:
                        path.unlink()
    except PermissionError as error:
        logger.warning("the rows of this job go into its own folder: those of the sweep cannot be shared: %s", error)
        return None
    return shared
