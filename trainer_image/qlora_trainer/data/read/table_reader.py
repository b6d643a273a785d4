"""Reads rows from CSV and Parquet."""

import csv
from collections.abc import Iterator
from itertools import chain
from typing import Any

from qlora_api.printable import first_line
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.read.files import DataFile
from qlora_trainer.data.read.parquet_pages import RowGroupSizes, row_group_sizes
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.read.text import MAX_LINE_BYTES, Inflation, lines

_PARQUET_BATCH_ROWS = 64
_PARQUET_BATCH_BYTES = 2**26


def read_csv(file: DataFile) -> Iterator[Row]:
    """The rows below the header. All values are text."""
    # The limit holds for the whole interpreter; its default of 128 KiB is less than one document.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in lines(file)), strict=True)
    header: list[str] | None = None
    number = 0
    while (cells := _next_record(reader, file, number)) is not None:
        if header is None:
            header = _header(cells, file)
        elif cells:
            number += 1
            location = f"{file.name} row {number} (ends in line {reader.line_num})"
            if len(cells) != len(header):
                raise bad_dataset(
                    f"{location} has {len(cells)} cells, but the header has {len(header)} ({', '.join(header)}): "
                    "put cells with commas or line breaks in double quotes"
                )
            yield Row(location, dict(zip(header, cells, strict=True)), sum(map(len, cells)))


def _next_record(reader: Any, file: DataFile, rows_read: int) -> list[str] | None:
    try:
        record: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise bad_dataset(
            f"{file.name} line {reader.line_num} (after row {rows_read}): not valid CSV ({error}): "
            'a cell that begins with " must end with one, and a " inside is written ""'
        ) from error
    return record


def _header(cells: list[str], file: DataFile) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not all(names) or len(set(names)) != len(names):
        found = str(names)[:200]
        raise bad_dataset(f"{file.name} line 1 must be the header: unique names, none empty; found {found}")
    return names


def read_parquet(file: DataFile) -> Iterator[Row]:
    """The rows of all row groups. Memory: one row group's compressed columns, and 64 rows.

    Fewer rows where dictionaries have large values, since each row gets a copy of its value.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number, inflation = 0, Inflation(file)
    try:
        with ParquetFile(file.path) as table:
            groups = row_group_sizes(file.path)
            # Checked before any page is decompressed, since a page is decompressed whole.
            Inflation(file).add(sum(group.pages for group in groups))
            numbered = zip(range(table.num_row_groups), groups, strict=True)
            for batch in chain.from_iterable(_batches(table, index, group) for index, group in numbered):
                inflation.add(batch.nbytes)
                size = batch.nbytes // max(1, batch.num_rows)
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file.name} row {number}", values, size, columnar=True)
    except (ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        where = f"after row {number}" if number else "at its start or end"
        raise bad_dataset(
            f"{file.name} cannot be read as Parquet ({where}: {first_line(error)}): "
            "write it again, without the columns that training does not need"
        ) from error


def _batches(table: Any, index: int, sizes: RowGroupSizes) -> Iterator[Any]:
    """The rows of one row group, as many at a time as fit even if each has the largest value of every column.

    A single row whose list repeats one value many times is bounded by the pod's memory only.
    """
    rows = _PARQUET_BATCH_BYTES // max(1, sizes.dictionaries)
    batches: Iterator[Any] = table.iter_batches(batch_size=max(1, min(rows, _PARQUET_BATCH_ROWS)), row_groups=[index])
    return batches
