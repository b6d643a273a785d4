"""A disk that answers one chosen operation, or every write from it on, with an error."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
_THAT_NEED_ROOM = ("os.mkdir", "os.rename")

_mounted: list["BadDisk"] = []


class BadDisk:
    """Files below `folder`, whose operations are counted; number `failing` is answered with error `number`.

    If the disk `stays_full`, operations that need no room are not counted, and all others from `failing` on fail.
    """

    def __init__(self, folder: Path, failing: int, number: int, *, stays_full: bool = False) -> None:
        self.operations = 0
        self._folder, self._failing, self._number, self._stays_full = str(folder), failing, number, stays_full

    def holds(self, path: object) -> bool:
        """Whether the path is one of this disk."""
        return self._folder in str(path)

    def operate(self, *, needs_room: bool) -> None:
        """Do one more operation. Raises OSError if that fails."""
        if self._stays_full and not needs_room:
            return
        self.operations += 1
        if self.operations == self._failing or (self._stays_full and self.operations > self._failing):
            raise OSError(self._number, os.strerror(self._number))


class _File(io.FileIO):
    """A file each of whose writes is an operation on the disk."""

    def __init__(self, path: Any, mode: str, disk: BadDisk) -> None:
        super().__init__(path, mode)
        self._disk = disk

    def write(self, data: Any, /) -> int:
        self._disk.operate(needs_room=True)
        return super().write(data)


@contextmanager
def bad_disk(folder: Path, failing: int, number: int, *, stays_full: bool = False) -> Iterator[BadDisk]:
    """Let the folder lie on such a disk.

    It sees Python's operations on names, writes to files that pathlib has opened, and every fsync of any file: a
    library in another language that writes to a full disk fails at the fsync.
    """
    disk, fsync, io_open = BadDisk(folder, failing, number, stays_full=stays_full), os.fsync, io.open

    def synced(descriptor: int) -> None:
        disk.operate(needs_room=True)
        fsync(descriptor)

    def opened(path: Any, mode: str = "r", buffering: int = -1, *text: Any, **text_settings: Any) -> Any:
        if mode not in ("w", "wb", "ab") or not disk.holds(path):
            return io_open(path, mode, buffering, *text, **text_settings)
        file = io.BufferedWriter(_File(path, mode, disk))
        return file if "b" in mode else io.TextIOWrapper(file, *text, **text_settings)

    _watch_names()
    _mounted.append(disk)
    try:
        with patch.object(os, "fsync", synced), patch.object(io, "open", opened):
            yield disk
    finally:
        _mounted.remove(disk)


@cache
def _watch_names() -> None:
    """Once a process: an audit hook cannot be taken away."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _mounted or event not in _EVENTS:
            return
        for disk in _mounted:
            if disk.holds(arguments[0]):
                creates = event == "open" and bool(arguments[2] & os.O_CREAT)
                disk.operate(needs_room=creates or event in _THAT_NEED_ROOM)

    sys.addaudithook(hook)
