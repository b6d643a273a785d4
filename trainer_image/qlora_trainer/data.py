"""Reads the rows of a data file, naming the place of everything that is wrong; changes with the file formats."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qlora_trainer.data_source import DataFile
from qlora_trainer.failures import bad_dataset

MAX_LINE_BYTES = 2**24
_PARQUET_BATCH_ROWS = 64
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row as it stands in the file."""

    place: str
    """File and line (JSONL), or file and row from 1 (CSV, Parquet), for messages."""
    values: Mapping[str, object]


def read_rows(file: DataFile) -> Iterator[Row]:
    """The rows of a .jsonl, .csv or .parquet file, one after the other, without reading all of it into memory.

    Blank lines of a .jsonl file are passed over. Raises StepFailure BAD_DATASET for anything that is not as it must
    be, and for a file without rows.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    read = readers[file.path.suffix]
    count = 0
    for row in read(file):
        count += 1
        yield row
    if not count:
        size = file.path.stat().st_size
        raise bad_dataset(f"{file.name} has no rows ({size} bytes): it needs at least one")


def _read_jsonl(file: DataFile) -> Iterator[Row]:
    for number, line in _lines(file):
        if line.strip():
            place = f"{file.name} line {number}"
            yield Row(place, _json_object(line, place))


def _lines(file: DataFile) -> Iterator[tuple[int, str]]:
    """The lines with their numbers from 1, each with its line end, decoded from UTF-8."""
    offset = 0
    with file.path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise bad_dataset(
                    f"{file.name} line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB: "
                    "split the row, or check that there is one row a line"
                )
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            try:
                yield number, text.decode()
            except UnicodeDecodeError as error:
                at = offset + error.start + len(line) - len(text)
                raise bad_dataset(
                    f"{file.name} line {number}: byte 0x{text[error.start]:02x} at byte {at} of the file is not UTF-8: "
                    "save it as UTF-8"
                ) from error
            offset += len(line)


def _json_object(line: str, place: str) -> dict[str, object]:
    def refuse_number(found: str) -> NoReturn:
        raise bad_dataset(f"{place}: {found} is not a JSON value: only finite numbers are allowed")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields: dict[str, object] = {}
        for key, value in pairs:
            if key in fields:
                raise bad_dataset(f"{place}: field {key!r} appears twice: keep one")
            fields[key] = value
        return fields

    try:
        value: object = json.loads(line, parse_constant=refuse_number, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        cut = "; the file seems to be cut off here" if not line.endswith("\n") else ""
        raise bad_dataset(
            f"{place} column {error.colno}: not valid JSON ({error.msg}){cut}: a .jsonl file has one whole JSON object "
            "a line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise bad_dataset(f"{place}: not valid JSON ({error}): a number or a nesting is too long") from error
    if not isinstance(value, dict):
        raise bad_dataset(f"{place} is {describe(value)}: must be a JSON object, {{…}}")
    return value


def _read_csv(file: DataFile) -> Iterator[Row]:
    # The limit is the interpreter's; its default of 128 KiB is less than one document.
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in _lines(file)), strict=True)
    header: list[str] | None = None
    number = 0
    while (cells := _next_record(reader, file, number)) is not None:
        if header is None:
            header = _csv_header(cells, file)
        elif cells:
            number += 1
            place = f"{file.name} row {number} (ends in line {reader.line_num})"
            if len(cells) != len(header):
                raise bad_dataset(
                    f"{place} has {len(cells)} cells, but the header has {len(header)} ({', '.join(header)}): "
                    "put cells with commas or line breaks in double quotes"
                )
            yield Row(place, dict(zip(header, cells, strict=True)))


def _next_record(reader: Any, file: DataFile, rows_read: int) -> list[str] | None:
    try:
        record: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise bad_dataset(
            f"{file.name} line {reader.line_num} (after row {rows_read}): not valid CSV ({error}): "
            'a cell that begins with " must end with one, and a " inside is written ""'
        ) from error
    return record


def _csv_header(cells: list[str], file: DataFile) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not all(names) or len(set(names)) != len(names):
        raise bad_dataset(f"{file.name} line 1 must be the header: unique names, none empty; found {names}")
    return names


def _read_parquet(file: DataFile) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file.path) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file.name} row {number}", values)
    except (ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        where = f"after row {number}" if number else "at its start or end"
        raise bad_dataset(
            f"{file.name} cannot be read as Parquet ({where}: {str(error).splitlines()[0][:200]}): write it again, "
            "without columns that the data set does not need"
        ) from error


def describe(value: object) -> str:
    """What a value of a row is, for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number (NaN)" if math.isnan(value) else "an infinite number"
    if isinstance(value, (int, float)):
        return "a number"
    kinds: list[tuple[type, str]] = [(str, "text"), (list, "a list"), (dict, "an object")]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)
