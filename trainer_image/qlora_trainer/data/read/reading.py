"""Reads the rows of a data set's files, whatever kind of file they are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.read.files import DataFile
from qlora_trainer.data.read.json_reader import read_json, read_json_lines
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.read.table_reader import read_csv, read_parquet
from qlora_trainer.data.sampling import used_rows

_READERS: Mapping[str, Callable[[DataFile], Iterator[Row]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def read_rows(files: Sequence[DataFile]) -> Iterator[Row]:
    """The rows of the files in order, without reading a whole file into memory.

    Raises StepFailure BAD_DATASET, with file and line, for invalid content and for a file without rows.
    """
    for file in files:
        count = 0
        for row in _READERS[file.kind](file):
            count += 1
            yield row
        if not count:
            size = file.path.stat().st_size
            raise bad_dataset(f"{file.name} has no rows ({size} bytes): it needs at least one")


def read_used_rows(files: Sequence[DataFile], limit: int | None, seed: int | None) -> Iterator[Row]:
    """At most `limit` rows of the files, all if it is None: the first ones, or those that `seed` chooses if it is set.

    Reads the files twice if `seed` is set: a first time to count the rows. Raises as `read_rows`.
    """
    if limit is None or seed is None:
        yield from islice(read_rows(files), limit)
        return
    count = sum(1 for _ in read_rows(files))
    chosen = iter(used_rows(count, limit, seed))
    wanted = next(chosen, None)
    for number, row in enumerate(read_rows(files)):
        if number == wanted:
            yield row
            wanted = next(chosen, None)
        if wanted is None:
            return
