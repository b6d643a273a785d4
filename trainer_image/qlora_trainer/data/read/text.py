"""Opens data files as text, also compressed ones.

Compression shrinks text 3 to 20 times, and repetitive logs up to 100 times. A file of more than 64 MiB and more than
200 times its compressed size is rejected as a decompression bomb.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Protocol

from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.read.files import DataFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_LINE_BYTES = 2**24
"""Of the longest row, as text."""
INFLATION_FREE_BYTES = 2**26
MAX_INFLATION = 200
"""Largest plausible compression. Text reaches 3 to 20, repetitive logs up to 100."""
_BLOCK_BYTES = 2**20
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Inflation:
    """Counts a compressed file's output, to stop a decompression bomb."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._limit = max(INFLATION_FREE_BYTES, MAX_INFLATION * file.path.stat().st_size)
        self._bytes = 0

    def add(self, count: int) -> None:
        """Count some bytes. Raises StepFailure BAD_DATASET beyond the limit."""
        self._bytes += count
        if self._bytes > self._limit:
            raise bad_dataset(
                f"{self._file.name} has more than {self._limit} bytes when it is decompressed, over {MAX_INFLATION} "
                "times its size, which no text has: decompress it yourself if that is intended"
            )


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def close(self) -> object: ...


def _zstandard(path: str) -> _Stream:
    from pyarrow import input_stream

    stream: _Stream = input_stream(path, compression="zstd")
    return stream


DECOMPRESSORS: Mapping[str, Callable[[str], _Stream]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}
"""By the ending of a compressed file's name."""
# MemoryError: the file itself states how much memory its decompressor needs.
_DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, MemoryError)


class _Decompressed(io.RawIOBase):
    """The content of a compressed file. Raises StepFailure BAD_DATASET if damaged."""

    def __init__(self, file: DataFile) -> None:
        self._file, self._inflation = file, Inflation(file)
        self._content = DECOMPRESSORS[file.path.suffix](str(file.path))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        try:
            block = self._content.read(len(view))
        except _DECOMPRESSION_ERRORS as error:
            raise bad_dataset(
                f"{self._file.name} cannot be decompressed ({error}): it is cut off, damaged, or not compressed as "
                f"its ending {self._file.path.suffix} says: copy it again"
            ) from error
        self._inflation.add(len(block))
        view[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._content.close()
        super().close()


@contextmanager
def open_data(file: DataFile) -> Iterator[IO[bytes]]:
    """The file's content, decompressed if its name ends in .gz, .bz2, .xz or .zst.

    Reading raises StepFailure BAD_DATASET where it cannot be decompressed, or grows beyond MAX_INFLATION.
    """
    if file.path.suffix in DECOMPRESSORS:
        with io.BufferedReader(_Decompressed(file), _BLOCK_BYTES) as stream:
            yield stream
    else:
        with file.path.open("rb") as stream:
            yield stream


def lines(file: DataFile) -> Iterator[tuple[int, str]]:
    """The numbered lines in UTF-8, with line ends. Raises StepFailure BAD_DATASET."""
    offset = 0
    with open_data(file) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise bad_dataset(
                    f"{file.name} line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB: "
                    "split the row, or check that there is one row per line"
                )
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            try:
                yield number, text.decode()
            except UnicodeDecodeError as error:
                at = offset + error.start + len(line) - len(text)
                raise _not_utf8(file, number, text[error.start], at, line if number == 1 else b"") from error
            offset += len(line)


def text_blocks(file: DataFile) -> Iterator[str]:
    """The content in UTF-8, a megabyte at a time. Raises StepFailure BAD_DATASET."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_data(file) as stream:
        offset, line = 0, 1
        while True:
            block = stream.read(_BLOCK_BYTES)
            begin = block if not offset else b""
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                found = error.object[error.start]
                raise _not_utf8(file, line, found, offset - pending + error.start, begin) from error
            yield text.removeprefix("\ufeff") if not offset else text
            if not block:
                return
            offset, line = offset + len(block), line + text.count("\n")


def _not_utf8(file: DataFile, line: int, byte: int, offset: int, begin: bytes) -> Exception:
    seems = " (it seems to be UTF-16)" if begin.startswith(_UTF_16) else ""
    return bad_dataset(
        f"{file.name} line {line}: byte 0x{byte:02x} at byte {offset} of the file is not UTF-8{seems}: save it as UTF-8"
    )
