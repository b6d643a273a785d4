"""Bounds the memory that a Parquet file takes: how large its pages get when they are decompressed.

The footer's `total_uncompressed_size` cannot serve as the bound. pyarrow allocates what the header of a page states,
and nothing makes the footer agree with it: in tests/trainer/promises/test_hostile_data.py a footer states 844 bytes,
and a page of the same file 2 GiB. Nor does the footer state the size of a dictionary alone, whose values pyarrow copies
for every row that has them. So the headers themselves are read here.

So is the footer, in which a column's pages are found. pyarrow has it as `ParquetFile.metadata`, but its binding lets no
exception through there: a damaged footer would abort the process. Its readers of rows do raise.

Fields are numbered in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qlora_trainer.data.read.thrift import I32, I64, LIST, STRUCT, Structure, read_structure

_ROW_GROUPS, _COLUMNS, _COLUMN_METADATA = (4, LIST), (1, LIST), (3, STRUCT)
_CHUNK_SIZE, _FIRST_DATA_PAGE, _DICTIONARY_PAGE = (7, I64), (9, I64), (11, I64)
_PAGE, _UNCOMPRESSED, _COMPRESSED = (1, I32), (2, I32), (3, I32)
_DICTIONARY = 2
_TRAILER_BYTES = 8
"""The size of the footer, in four bytes, and PAR1."""


@dataclass(frozen=True)
class RowGroupSizes:
    """What the headers of a row group's pages state, in bytes."""

    pages: int
    """All pages, decompressed."""
    dictionaries: int
    """Those of them that are dictionaries: no value of a column that has one is larger."""


def row_group_sizes(path: Path) -> list[RowGroupSizes]:
    """The sizes in each row group of a file. No page is read, only their headers.

    Raises ValueError for what is not a footer or a page, and OverflowError for an offset that no file has.
    """
    with path.open("rb") as file:
        return [_row_group(file, group) for group in _listed(_footer(file), _ROW_GROUPS)]


def _footer(file: IO[bytes]) -> Structure:
    end = file.seek(-_TRAILER_BYTES, os.SEEK_END)
    file.seek(end - int.from_bytes(file.read(4), "little"))
    return read_structure(file)


def _listed(structure: Structure, field: tuple[int, int]) -> list[Structure]:
    found: list[Structure] | None = structure.get(field)
    if found is None:
        raise ValueError("the footer does not list the row groups and their columns")
    return found


def _row_group(file: IO[bytes], group: Structure) -> RowGroupSizes:
    pages = dictionaries = 0
    for column in _listed(group, _COLUMNS):
        chunk: Structure = column.get(_COLUMN_METADATA, {})
        offsets = [offset for field in (_DICTIONARY_PAGE, _FIRST_DATA_PAGE) if (offset := chunk.get(field))]
        if not offsets:
            # A column without rows.
            continue
        first = min(offsets)
        file.seek(first)
        while file.tell() < first + chunk.get(_CHUNK_SIZE, 0):
            header = read_structure(file)
            size, compressed = header.get(_UNCOMPRESSED, -1), header.get(_COMPRESSED, -1)
            if size < 0 or compressed < 0:
                raise ValueError(f"a page at byte {file.tell()} states no size")
            pages += size
            # Of any type: that of the chunk is not the one by which pyarrow reads it, which is the schema's.
            if header.get(_PAGE) == _DICTIONARY:
                dictionaries += size
            file.seek(compressed, 1)
    return RowGroupSizes(pages, dictionaries)
