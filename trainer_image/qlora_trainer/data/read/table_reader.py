"""Reads rows from CSV and Parquet."""

import csv
from collections.abc import Iterator
from contextlib import closing

from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.core.sandbox import DryRunFailed, iterate_within_limits
from qlora_trainer.data.read.files import DataFile
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.read.text import MAX_LINE_BYTES, Inflation, lines

# Of spreadsheets, by the name for people.
_SEPARATORS = {";": "';'", "\t": "tabs"}
_PARQUET_BATCH_ROWS = 64
_PARQUET_SENT_BYTES = 2**26
"""Bytes sent together to the reading process. Single rows, shared values add more."""
_PARQUET_BUFFER_BYTES = 2**20
_PARQUET_MEMORY_BYTES = 2**30


def read_csv(file: DataFile) -> Iterator[Row]:
    """The rows below the header. All values are text."""
    # The limit holds for the whole interpreter; its default of 128 KiB is less than one document.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in lines(file)), strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for cells in reader:
            if header is None:
                header = _header(cells, file)
            elif cells:
                number += 1
                location = f"{file.name} row {number} (ends in line {reader.line_num})"
                if len(cells) != len(header):
                    wrong = bad_dataset(
                        f"{location} has {len(cells)} cells, but the header has {len(header)} ({', '.join(header)}): "
                        "put cells with commas or line breaks in double quotes"
                    )
                    yield Row(location, wrong, sum(map(len, cells)))
                else:
                    yield Row(location, dict(zip(header, cells, strict=True)), sum(map(len, cells)))
    except csv.Error as error:
        raise bad_dataset(
            f"{file.name} line {reader.line_num} (after row {number}): not valid CSV ({error}): "
            'a cell that begins with " must end with one, and a " inside is written ""'
        ) from error


def _header(cells: list[str], file: DataFile) -> list[str]:
    names = [cell.strip() for cell in cells]
    separator = next((each for each in _SEPARATORS if len(names) == 1 and each in names[0]), None)
    if separator is not None:
        raise bad_dataset(f"{file.name} is separated by {_SEPARATORS[separator]}: save it with commas")
    if not all(names) or len(set(names)) != len(names):
        found = str(names)[:200]
        raise bad_dataset(f"{file.name} line 1 must be the header: unique names, none empty; found {found}")
    return names


def read_parquet(file: DataFile) -> Iterator[Row]:
    """The rows of all row groups, which a forked process reads with a limit of memory.

    Neither the footer nor the headers of pages bound what pyarrow allocates for them, and some damage ends its process.
    """
    import pyarrow.parquet

    # Its allocator reserves a gigabyte at first use, which must not count for the limit.
    pyarrow.allocate_buffer(1)
    number = 0
    reading = iterate_within_limits(_batches, (file,), memory_bytes=_PARQUET_MEMORY_BYTES, what="reading it")
    try:
        with closing(reading) as batches:
            for rows, size in batches:
                for values in rows:
                    number += 1
                    yield Row(f"{file.name} row {number}", values, size, is_columnar=True)
    except DryRunFailed as error:
        where = f"after row {number}" if number else "at its start or end"
        raise bad_dataset(
            f"{file.name} cannot be read as Parquet ({where}: {error}): "
            "write it again, without the columns that training does not need"
        ) from error


def _batches(file: DataFile) -> Iterator[tuple[list[dict[str, object]], int]]:
    """The rows and their approximate bytes. Memory: a page per column, and 64 rows."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    # Takes what it allocates from the system, so that it counts for the limit.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    inflation = Inflation(file)
    with ParquetFile(file.path, buffer_size=_PARQUET_BUFFER_BYTES) as table:
        # Without row groups pyarrow takes them from `metadata`, which aborts on a damaged footer.
        groups = range(table.num_row_groups)
        for batch in table.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, use_threads=False):
            inflation.add(batch.nbytes)
            size = batch.nbytes // max(1, batch.num_rows)
            together = max(1, _PARQUET_SENT_BYTES // max(1, size))
            for first in range(0, batch.num_rows, together):
                yield batch.slice(first, together).to_pylist(), size
