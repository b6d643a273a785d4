"""Kinds of data files, by the ending of their names, and the rows in them. Each kind is one entry of `_KINDS`."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.core.paths import some_names
from qlora_trainer.data.read.files import DataFile
from qlora_trainer.data.read.json_reader import read_json, read_json_lines
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.read.table_reader import read_csv, read_parquet
from qlora_trainer.data.read.text import DECOMPRESSORS
from qlora_trainer.data.sampling import used_rows


@dataclass(frozen=True)
class _Kind:
    read: Callable[[DataFile], Iterator[Row]]
    is_text: bool = True
    """Whether a file may be compressed as a whole, with the compression's ending after its own."""


_KINDS: Mapping[str, _Kind] = {
    ".jsonl": _Kind(read_json_lines),
    ".json": _Kind(read_json),
    ".csv": _Kind(read_csv),
    ".parquet": _Kind(read_parquet, is_text=False),
}


def _either(names: Collection[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


_TEXTS, _TABLES = ([ending for ending, kind in _KINDS.items() if kind.is_text is text] for text in (True, False))
DATA_ENDINGS = f"{_either(_TEXTS)}, each also with {_either(DECOMPRESSORS)} appended, or {_either(_TABLES)}"
MAX_FILES = 10_000


def data_kind(name: str) -> str | None:
    """The ending that decides how a file is read, without compression, or None."""
    plain = next((name.removesuffix(ending) for ending in DECOMPRESSORS if name.endswith(ending)), name)
    found = next((ending for ending in _KINDS if plain.endswith(ending)), None)
    return found if plain == name or found in _TEXTS else None


def require_one_kind(names: Collection[str], inside: Collection[str], uri: str) -> None:
    """Raise StepFailure BAD_DATASET unless the names are of one kind of data file, and not too many.

    `inside`: all names in the folder, for the message.
    """
    if not names:
        raise bad_dataset(f"{uri} has no data file; it has {some_names(inside)}; allowed are {DATA_ENDINGS}")
    kinds = sorted({data_kind(name) or "" for name in names})
    if len(kinds) > 1:
        raise bad_dataset(
            f"{uri} has files of several kinds, {' and '.join(kinds)}: name one file, or a folder with one kind; "
            f"it has {some_names(names)}"
        )
    if len(names) > MAX_FILES:
        raise bad_dataset(f"{uri} has {len(names)} data files, at most {MAX_FILES} are allowed: merge them")


def read_rows(files: Sequence[DataFile]) -> Iterator[Row]:
    """The rows of the files. Raises StepFailure BAD_DATASET, with file and line."""
    for file in files:
        count = 0
        for row in _KINDS[data_kind(file.name) or ""].read(file):
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
    chosen = used_rows(sum(1 for _ in read_rows(files)), limit, seed)
    rows, past = read_rows(files), 0
    for number in chosen.tolist():
        yield from islice(rows, number - past, number - past + 1)
        past = number + 1
