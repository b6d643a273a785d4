"""The files of a data set. A file's name decides how it is read."""

from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.core.paths import some_names


@dataclass(frozen=True)
class DataFile:
    """A data file on this machine, and its name for messages."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """How it is read: .jsonl, .json, .csv or .parquet."""
        return data_kind(self.name) or ""


@dataclass(frozen=True)
class DataFiles:
    """The files of an address, ascending by name."""

    uri: str
    files: tuple[DataFile, ...]
    relative_names: tuple[str, ...]
    """The files' names within the folder or repository."""

    def sha256(self) -> str:
        """SHA-256 of the file, or of the lines of sha256sum for several files."""
        digests = [file_sha256(file.path) for file in self.files]
        if len(digests) == 1:
            return digests[0]
        lines = (f"{digest}  {name}\n" for digest, name in zip(digests, self.relative_names, strict=True))
        return sha256("".join(lines).encode()).hexdigest()

    def versions(self) -> tuple[tuple[int, int], ...]:
        """Size in bytes and modification time in ns of each file. Writing changes them."""
        stats = [file.path.stat() for file in self.files]
        return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DATA_ENDINGS = ".jsonl, .json or .csv, each also with .gz, .bz2, .xz or .zst appended, or .parquet"
MAX_FILES = 10_000


def data_kind(name: str) -> str | None:
    """The ending that decides how a file is read, without compression, or None."""
    if name.endswith(".parquet"):
        return ".parquet"
    plain = next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)
    return next((kind for kind in (".jsonl", ".json", ".csv") if plain.endswith(kind)), None)


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
