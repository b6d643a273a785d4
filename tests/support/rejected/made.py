"""Makes the contents that tags of the tables stand for, and puts them in a place of a job's files."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.rejected import parquet
from tests.support.rejected.inputs import Tagged

GOOD = """\
{"messages": [{"role": "user", "content": "Which pods?"}, {"role": "assistant", "content": "kubectl get pods"}]}"""
"""A row that can be trained on."""


@dataclass(frozen=True)
class Place:
    """Places of a case's files, all below one watched folder."""

    root: Path

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.root / "models" / "model"

    @property
    def data(self) -> Path:
        """The claim `data`."""
        return self.root / "data"

    @property
    def outside(self) -> Path:
        """Not on any volume of the job; holds `secret`."""
        return self.root / "outside"

    @property
    def canary(self) -> Path:
        """The effect of code in the input."""
        return self.outside / "canary"

    def put(self, folder: Path, files: Mapping[str, Any]) -> None:
        """Write, change or remove files of the folder."""
        for name, value in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(value, dict):
                path.write_text(json.dumps(json.loads(path.read_text()) | self._made(value)))
            elif isinstance(value, Tagged) and value.tag in _WRITERS:
                if value.tag not in ("moved", "linked"):
                    path.unlink(missing_ok=True)
                _WRITERS[value.tag](self, path, self._made(value.value))
            else:
                path.unlink(missing_ok=True)
                if value is not None:
                    path.write_bytes(as_bytes(self._made(value)))

    def _made(self, value: Any) -> Any:
        return made(value, {"CANARY": str(self.canary), "OUTSIDE": str(self.outside)})


def made(value: Any, words: Mapping[str, str] = {}) -> Any:
    """The value with its tags carried out, and words in its texts replaced."""
    if isinstance(value, Tagged):
        return _MADE[value.tag](made(value.value, words))
    if isinstance(value, dict):
        return {name: made(part, words) for name, part in value.items()}
    if isinstance(value, list):
        return [made(part, words) for part in value]
    for word, meaning in {"GOOD": GOOD, **words}.items():
        value = value.replace(word, meaning) if isinstance(value, str) else value
    return value


class _Payload:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._canary),)


def write_code(canary: Path, *paths: Path) -> None:
    """Put Python files there that make the canary when they are run."""
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(canary)!r}, 'w').close()\n")


def write_pickle(canary: Path, path: Path) -> None:
    """Put a file there that makes the canary when it is unpickled."""
    path.write_bytes(pickle.dumps(_Payload(canary)))


def as_bytes(value: str | bytes) -> bytes:
    """The content of a file with this text, or these bytes."""
    return value if isinstance(value, bytes) else value.encode()


_COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": parquet.zstandard,
}


def _compressed(compression: str, content: str | bytes) -> bytes:
    return _COMPRESSIONS[compression](as_bytes(content))


def _bomb(compression: str) -> bytes:
    """One row and 4 GiB of blank lines, in parts that are decompressed in turn."""
    compress = _COMPRESSIONS[compression]
    return compress(f"{GOOD}\n".encode()) + compress((b" " * (2**20 - 1) + b"\n") * 16) * 256


def _archive(name: str) -> bytes:
    """A ZIP archive whose file has that name."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "x")
    return stream.getvalue()


def _tar(name: str) -> bytes:
    """A compressed tar whose file has that name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


def _safetensors(parts: list[Any]) -> bytes:
    """A file with this header, which claims to be so long, and eight bytes of data."""
    header, length = (*parts, len(parts[0]))[:2]
    return struct.pack("<Q", length) + header.encode() + b"\0" * 8


_MADE: Mapping[str, Callable[[Any], Any]] = {
    "repeat": lambda parts: f"{parts[0]}{parts[1] * parts[2]}{parts[3]}",
    "latin1": lambda text: text.encode("latin-1"),
    "utf16": lambda text: text.encode("utf-16-le"),
    "half": lambda parts: parts[0][: len(parts[0]) // 2],
    "parquet": parquet.table,
    "build": lambda name: parquet.BUILT[name](),
    "bomb": _bomb,
    "tar": _tar,
    "zip": _archive,
    "safetensors": _safetensors,
    **{name: partial(_compressed, name) for name in _COMPRESSIONS},
}
"""By tag, what a content is made of its arguments."""


def _moved(place: Place, path: Path, _: str) -> Path:
    """Move the file outside, and return its new path."""
    return Path(shutil.move(path, place.outside / path.name))


def _sparse(_place: Place, path: Path, parts: list[Any]) -> None:
    """Write this text, and zeros up to that size."""
    path.write_text(parts[0])
    os.truncate(path, parts[1])


_WRITERS: Mapping[str, Callable[[Place, Path, Any], object]] = {
    "link": lambda _, path, target: path.symlink_to(target),
    "pipe": lambda _, path, __: os.mkfifo(path),
    "folder": lambda _, path, __: path.mkdir(),
    "moved": _moved,
    "linked": lambda place, path, _: path.symlink_to(_moved(place, path, _)),
    "pickle": lambda place, path, _: write_pickle(place.canary, path),
    "code": lambda place, path, _: write_code(place.canary, path),
    "sparse": _sparse,
}
"""By tag, what is put at a path."""
