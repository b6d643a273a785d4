"""Reads the rows of a data set's files, naming the place of everything that is wrong."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.files import DataFile
from qlora_trainer.data.json_reader import parse_object, read_json, read_json_lines
from qlora_trainer.data.rows import RawRow, Row
from qlora_trainer.data.table_reader import read_csv, read_parquet

_READERS: Mapping[str, Callable[[DataFile], Iterator[RawRow]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def read_rows(files: Sequence[DataFile]) -> Iterator[RawRow]:
    """The rows of the files, one after the other, without reading all of a file into memory.

    Raises StepFailure BAD_DATASET for anything that is not as it must be, and for a file without rows.
    """
    for file in files:
        count = 0
        for row in _READERS[file.kind](file):
            count += 1
            yield row
        if not count:
            size = file.path.stat().st_size
            raise bad_dataset(f"{file.name} has no rows ({size} bytes): it needs at least one")


def parse(row: RawRow) -> Row:
    """The row's values. Raises StepFailure BAD_DATASET if it is not a JSON object where it must be one."""
    values = parse_object(row.content, row.place) if isinstance(row.content, str) else row.content
    return Row(row.place, values, row.columnar)
