"""The 4-bit base of a job: a folder for transformers, with a manifest."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from qlora_api.schema import ObservedModel
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import unreachable, unsafe_artifact
from qlora_trainer.core.filesystem import file_sha256, write_atomically
from qlora_trainer.core.paths import some_names
from qlora_trainer.model.source.files import content_revision
from qlora_trainer.stores.contents import PublishedFile

MANIFEST = "base.json"
FORMAT = 1
"""A release raises it if its bytes differ for another reason than a library."""
_MAX_MANIFEST_BYTES = 2**22
_AGAIN = "create the job again"


class BaseManifest(ObservedModel):
    """The manifest: files written so far, and their origin."""

    address: str = ""
    """Of the original, for people who look for it in a cache."""
    version: str
    """Identifies the original: what is made of another one is another base."""
    quantization: QuantizationSpec
    in_16_bit: tuple[str, ...] = ()
    """Names of modules that transformers alone would have quantized, such as towers."""
    sources: dict[str, str]
    """SHA-256 of each file of the original that is in it, by name."""
    files: dict[str, PublishedFile]
    """Files that were written, by name: weights, the configuration, the index."""

    @property
    def sha256(self) -> str:
        """SHA-256 over the lines `<sha256>  <name>` of the files, sorted by name."""
        return content_revision({name: file.sha256 for name, file in self.files.items()}).removeprefix("sha256:")


def read_manifest(folder: Path) -> BaseManifest | None:
    """Read the manifest of a folder, or return None if there is none that can be read."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            return None
        manifest = BaseManifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    inside = all(name == Path(name).name for name in manifest.files)
    return manifest if inside and manifest.sources.keys() <= manifest.files.keys() else None


def write_manifest(folder: Path, manifest: BaseManifest) -> None:
    """Write it durably, or leave it as it was."""
    write_atomically(folder / MANIFEST, json.dumps(manifest.dump(), indent=2, sort_keys=True).encode() + b"\n")


def is_present(folder: Path, sha256: str, quantization: QuantizationSpec) -> bool:
    """Whether the folder has the base of this sum, by manifest and file sizes."""
    manifest = read_manifest(folder)
    if manifest is None or (manifest.sha256, manifest.quantization) != (sha256, quantization):
        return False
    return has_files(folder, manifest)


def has_files(folder: Path, manifest: BaseManifest) -> bool:
    """Whether the folder has all files of its manifest, by their sizes."""
    return all(has_size(folder / name, file.size) for name, file in manifest.files.items())


def has_size(path: Path, size: int) -> bool:
    """Whether there is a file of that size."""
    return path.is_file() and path.stat().st_size == size


def require_files(folder: Path) -> list[str]:
    """The names of the base's files. Raises StepFailure for others."""
    with _reading(folder):
        if not folder.is_dir():
            raise unreachable(f"the 4-bit base is no longer in {folder}; the step is retried")
        manifest = read_manifest(folder)
        files = {} if manifest is None else manifest.files
        for name, file in files.items():
            if not has_size(folder / name, file.size):
                raise unsafe_artifact(f"{folder / name}, a part of the 4-bit base, is missing or cut off: {_AGAIN}")
        if other := {path.name for path in folder.glob("*")} - {MANIFEST, *files}:
            raise unsafe_artifact(f"{some_names(other)} does not belong to the 4-bit base in {folder}: {_AGAIN}")
        return list(files)


def require_sha256(folder: Path, sha256: str, on_block: Callable[[], None] = lambda: None) -> None:
    """Raise StepFailure unless the base's files have the recorded sum."""
    files = require_files(folder)
    with _reading(folder):
        digests = {name: file_sha256(folder / name, lambda _done: on_block()) for name in files}
    require_sum(folder, digests, sha256)


def require_sum(folder: Path, digests: dict[str, str], sha256: str) -> None:
    """Raise StepFailure UNSAFE_ARTIFACT unless the sum is the recorded one."""
    found = content_revision(digests).removeprefix("sha256:")
    if found != sha256:
        raise unsafe_artifact(
            f"the 4-bit base in {folder} has sha256 {found}, but prepare recorded {sha256}: it was changed or damaged "
            f"afterwards, and nothing that was trained on it is published; {_AGAIN}"
        )


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Raise StepFailure UNREACHABLE for an OSError: the base is unchanged."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise unreachable(f"the 4-bit base in {folder} cannot be read ({reason}); the step is retried") from error
