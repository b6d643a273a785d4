"""Bounds the memory that a Parquet file takes: how large its pages get when they are decompressed.

The footer's `total_uncompressed_size` (pyarrow's metadata) cannot serve as the bound. pyarrow allocates what the header
of a page states, and nothing makes the footer agree with it: in tests/trainer/promises/test_hostile_data.py a footer
states 844 bytes, and a page of the same file 2 GiB. Nor does the footer state the size of a dictionary alone, whose
values pyarrow copies for every row that has them. So the headers themselves are read here; they are structures of
Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_DICTIONARY = 2
_TYPE, _UNCOMPRESSED, _COMPRESSED = 1, 2, 3
_BYTES = frozenset({"BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"})
# Types of Thrift's compact protocol. Page headers have no lists and no maps.
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12
_DEEPEST = 4
_LONGEST_NUMBER = 10


@dataclass(frozen=True)
class RowGroupSizes:
    """What the headers of a row group's pages state, in bytes."""

    pages: int
    """All pages, decompressed."""
    dictionaries: int
    """Those of them that hold values of text or bytes: no single value is larger."""


def row_group_sizes(path: Path, metadata: Any) -> list[RowGroupSizes]:
    """The sizes in each row group of the file with this FileMetaData. No page is read, only their headers.

    Raises ValueError for what is not a page, and OverflowError for an offset that no file has.
    """
    with path.open("rb") as file:
        return [_row_group(file, metadata.row_group(number)) for number in range(metadata.num_row_groups)]


def _row_group(file: IO[bytes], group: Any) -> RowGroupSizes:
    pages = dictionaries = 0
    for column in map(group.column, range(group.num_columns)):
        offsets = [offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset]
        if not offsets:
            # A column without rows.
            continue
        first = min(offsets)
        file.seek(first)
        while file.tell() < first + column.total_compressed_size:
            header = _fields(file)
            size, compressed = header.get(_UNCOMPRESSED, -1), header.get(_COMPRESSED, -1)
            if size < 0 or compressed < 0:
                raise ValueError(f"a page at byte {file.tell()} states no size")
            pages += size
            if header.get(_TYPE) == _DICTIONARY and column.physical_type in _BYTES:
                dictionaries += size
            file.seek(compressed, 1)
    return RowGroupSizes(pages, dictionaries)


def _fields(file: IO[bytes], depth: int = 0) -> dict[int, int]:
    """The integers of a structure, by field; the rest of it is skipped."""
    if depth > _DEEPEST:
        raise ValueError(f"the header of a page at byte {file.tell()} nests without end")
    found: dict[int, int] = {}
    number = 0
    while lead := _byte(file):
        step, kind = lead >> 4, lead & 15
        number = number + step if step else _signed(file)
        if kind in _INTEGERS:
            found[number] = _signed(file)
        elif kind in (_BYTE, _DOUBLE):
            file.seek(1 if kind == _BYTE else 8, 1)
        elif kind == _BINARY:
            file.seek(_unsigned(file), 1)
        elif kind == _STRUCT:
            _fields(file, depth + 1)
        elif kind not in _BOOLEANS:
            raise ValueError(f"there is no page at byte {file.tell()}")
    return found


def _signed(file: IO[bytes]) -> int:
    value = _unsigned(file)
    return value >> 1 ^ -(value & 1)


def _unsigned(file: IO[bytes]) -> int:
    value = 0
    for index in range(_LONGEST_NUMBER):
        byte = _byte(file)
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value
    raise ValueError(f"a number at byte {file.tell()} has no end")


def _byte(file: IO[bytes]) -> int:
    byte = file.read(1)
    if not byte:
        raise ValueError("a page begins after the end of the file")
    return byte[0]
