"""Extracts files from an untrusted tar stream: only the wanted ones, and only plain ones."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

_BLOCK_BYTES = 2**20
_MOST_PADDING = 2**20


class UnsafeArchiveError(Exception):
    """The stream is no tar archive, or has an entry that the message names."""


def extract(
    stream: Iterable[bytes], wanted: Mapping[str, int], folder: Path, on_bytes: Callable[[int], None] = lambda _: None
) -> dict[str, str]:
    """Write the archive's files into `folder`; returns their SHA-256 by name.

    `wanted` has the names that must come, with the most bytes that each may have; a name has no slash. Nothing is made
    but new files of these names: a path, link, device, folder or sparse file ends it, as does a second file of a name.
    `on_bytes` is called with the bytes written so far. Raises UnsafeArchiveError, OSError, and what the stream raises.
    """
    found: dict[str, str] = {}
    blocks, written = iter(stream), 0
    try:
        with tarfile.open(fileobj=io.BufferedReader(_Blocks(blocks)), mode="r|") as archive:
            for member in archive:
                _require_wanted(member, wanted, found)
                content = archive.extractfile(member)
                digest = hashlib.sha256()
                with (folder / member.name).open("xb") as file:
                    for block in _blocks(content):
                        file.write(block)
                        digest.update(block)
                        written += len(block)
                        on_bytes(written)
                found[member.name] = digest.hexdigest()
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UnsafeArchiveError(f"it is no complete tar archive ({error})") from error
    _drain(blocks)
    # The library treats a truncated header as the end.
    if missing := [name for name in wanted if name not in found]:
        raise UnsafeArchiveError(f"it is no complete tar archive (without {', '.join(missing)})")
    return found


def _require_wanted(member: tarfile.TarInfo, wanted: Mapping[str, int], found: Mapping[str, str]) -> None:
    shown = repr(member.name[:80])
    if member.name not in wanted:
        raise UnsafeArchiveError(f"it has {shown}, which was not asked for")
    if not member.isreg() or member.issparse():
        raise UnsafeArchiveError(f"{shown} in it is a link, a device, a folder or a sparse file, and no plain file")
    if member.name in found:
        raise UnsafeArchiveError(f"it has {shown} twice")
    if not 0 <= member.size <= wanted[member.name]:
        raise UnsafeArchiveError(f"{shown} in it has {member.size} bytes, and may have {wanted[member.name]}")


def _drain(blocks: Iterator[bytes]) -> None:
    """Read past the archive's end: padding, and an error that may end the stream."""
    rest = 0
    for block in blocks:
        rest += len(block)
        if rest > _MOST_PADDING:
            raise UnsafeArchiveError(f"more than {_MOST_PADDING} bytes follow its end")


def _blocks(content: IO[bytes] | None) -> Iterator[bytes]:
    while content is not None and (block := content.read(_BLOCK_BYTES)):
        yield block


class _Blocks(io.RawIOBase):
    """The stream as the file that the standard library reads archives from."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
