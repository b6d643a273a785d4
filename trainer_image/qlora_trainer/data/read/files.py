"""The files of a data set: their names, content and versions."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from qlora_trainer.core.filesystem import file_sha256


@dataclass(frozen=True)
class DataFile:
    """A data file on this machine, and its name for messages."""

    path: Path
    name: str


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
