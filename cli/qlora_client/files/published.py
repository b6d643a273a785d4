"""A published folder, and the names, sizes and digests of its manifest.json."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qlora_client.kube.errors import ClusterError

MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
MAX_MANIFEST_BYTES = 2**22
OnBytes = Callable[[int], None]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_FILES = 256


class DamagedError(ClusterError):
    """The stored files differ from the published ones; the message has the difference."""


@dataclass(frozen=True)
class PublishedFile:
    """One file as the manifest describes it."""

    sha256: str
    size: int
    """Bytes."""


class Folder(Protocol):
    """A published folder. Methods raise ClusterError."""

    def read(self, name: str, most: int) -> bytes:
        """The content of a small file of at most `most` bytes."""

    def fetch(self, files: Mapping[str, PublishedFile], into: Path, on_bytes: OnBytes) -> None:
        """Copy files to this machine, and pass `on_bytes` the count of bytes so far."""


def parse_manifest(content: bytes, place: str) -> dict[str, PublishedFile]:
    """The files of a manifest.json, by name. `place`: its address, for messages.

    A name is that of a file in the same folder: no slash, no dot in front. Raises DamagedError.
    """
    try:
        files = json.loads(content)["files"]
        described = {name: _parse_file(entry) for name, entry in files.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{place}/{MANIFEST} is not a manifest of published files ({error})") from None
    if len(described) > _MAX_FILES:
        raise DamagedError(f"{place}/{MANIFEST} lists {len(described)} files, and a folder has at most {_MAX_FILES}")
    for name in described:
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise DamagedError(f"{place}/{MANIFEST} lists {name[:80]!r}, which is no name of a published file")
    return described


def _parse_file(entry: Mapping[str, object]) -> PublishedFile:
    sha256, size = entry["sha256"], entry["size"]
    if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        raise ValueError(f"found the SHA-256 {str(sha256)[:80]!r}")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"found the size {str(size)[:80]!r}")
    return PublishedFile(sha256, size)


def require_same_adapter(files: Mapping[str, PublishedFile], sha256: str, place: str) -> None:
    """Raise DamagedError unless the manifest's adapter has the status's SHA-256."""
    if ADAPTER not in files:
        raise DamagedError(f"{place}/{MANIFEST} lists no {ADAPTER}: something else has been published there")
    if files[ADAPTER].sha256 != sha256:
        raise DamagedError(
            f"{place} has another adapter: its manifest says SHA-256 {files[ADAPTER].sha256}, and the job's status "
            f"{sha256}; it has been replaced since"
        )


def require_as_described(files: Mapping[str, PublishedFile], arrived: Mapping[str, PublishedFile], place: str) -> None:
    """Raise DamagedError unless every file has arrived with its size and SHA-256."""
    for name, expected in files.items():
        found = arrived.get(name)
        if found is None:
            raise DamagedError(f"{place}/{name} is missing, though the manifest lists it")
        if found != expected:
            raise DamagedError(
                f"{place}/{name} is damaged: it has {found.size} bytes with SHA-256 {found.sha256}, and was published "
                f"with {expected.size} bytes and {expected.sha256}"
            )
