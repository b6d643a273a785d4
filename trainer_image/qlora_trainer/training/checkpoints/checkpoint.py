"""Checkpoints on disk: each is whole and verified, or absent.

`checkpoints/step-N/` holds safetensors files, `state.json`, and `manifest.json` with the SHA-256 of each. It is written
in the same folder under a hidden name, synced, and renamed. Nothing is pickled, so reading one cannot run code. The
adapter of the best evaluation is in `best/` until the next checkpoint holds a copy of it: one damaged block must not be
in both checkpoints. A later one does not count until a resumed run comes to it again.
"""

import errno
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.core.filesystem import atomic_folder, file_sha256, remove, remove_partials
from qlora_trainer.core.paths import confine, read_regular, require_regular
from qlora_trainer.model.base.conversion import write_weights
from qlora_trainer.model.base.layout import DTYPES, Entry
from qlora_trainer.training.progress.run_state import SavedState

FORMAT_VERSION = 1
KEPT = 2
CHECKPOINT_MANIFEST = "manifest.json"
BEST_FILE = "best.safetensors"
STATE = "state.json"
CORRUPT = ".corrupt"
_MAX_JSON_BYTES = 2**24
# Errors of a damaged checkpoint. Others, as for a network volume that is away, may pass.
_DAMAGED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO})
_NAME = re.compile(r"step-(\d+)")
_NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """A file that is complete, and the SHA-256 that it was written with."""

    path: Path
    sha256: str

    def tensors(self) -> dict[str, Tensor]:
        """The file's tensors, in main memory. Raises ValueError if they changed."""
        found = file_sha256(self.path)
        if found != self.sha256:
            raise ValueError(f"{self.path} has sha256 {found}, not {self.sha256}: it was changed or damaged")
        return load_file(self.path)


@dataclass(frozen=True)
class Checkpoint:
    """A run as it stood after `step` optimizer steps."""

    path: Path
    step: int
    state: SavedState
    sha256: Mapping[str, str]
    """Of each of its files, by name."""

    @property
    def best(self) -> StoredFile | None:
        """The best adapter up to the checkpoint, or None if it holds none."""
        sha256 = self.sha256.get(BEST_FILE)
        return None if sha256 is None else StoredFile(self.path / BEST_FILE, sha256)

    def has(self, name: str) -> bool:
        """Whether there is a `<name>.safetensors`."""
        return (self.path / f"{name}.safetensors").is_file()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`, in main memory."""
        return load_file(self.path / f"{name}.safetensors")


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
    stored: Mapping[str, StoredFile] | None = None,
) -> Checkpoint:
    """Write `folder/step-N` with one file for each entry of `tensors`, read it back, then drop all but the newest two.

    `state` is what JSON can hold; `stored` are further files, by the names that they get. Raises OSError if it cannot
    be written, and ValueError if it does not read back, or a stored file has changed; the earlier checkpoints are
    untouched then.
    """
    final = folder / f"step-{step}"
    with atomic_folder(final) as partial:
        _write(partial, tensors, stored or {}, {**state, "formatVersion": FORMAT_VERSION, "step": step})
    saved = read_checkpoint(final)
    logger.info("saved %s", final)
    for _, old in numbered_checkpoints(folder)[KEPT:]:
        remove(old)
    return saved


def write_best(folder: Path, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Write the best adapter durably to `folder`. Raises as `save_checkpoint` does."""
    with atomic_folder(folder) as partial:
        sha256 = _write_tensors(partial / BEST_FILE, tensors)
    return StoredFile(folder / BEST_FILE, sha256)


def _write(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    stored: Mapping[str, StoredFile],
    state: Mapping[str, object],
) -> None:
    sums = {}
    for name, file in stored.items():
        sums[name] = file_sha256(shutil.copyfile(file.path, folder / name))
        if sums[name] != file.sha256:
            raise ValueError(f"{file.path} has sha256 {sums[name]}, not {file.sha256}: it was changed or damaged")
    for name, entries in tensors.items():
        sums[f"{name}.safetensors"] = _write_tensors(folder / f"{name}.safetensors", entries)
    content = json.dumps(state, indent=2, sort_keys=True, allow_nan=False).encode()
    (folder / STATE).write_bytes(content)
    _write_manifest(folder, sums | {STATE: sha256(content).hexdigest()})


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a durable safetensors file, and return its SHA-256. Raises OSError."""
    # Widest first, so that each tensor begins at a multiple of its item size, as readers need.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    entries = [Entry(name, _NAMES_OF_DTYPES[tensors[name].dtype], tuple(tensors[name].shape)) for name in ordered]
    return write_weights(path, entries, (tensors[name] for name in ordered)).sha256


def _write_manifest(folder: Path, sums: Mapping[str, str]) -> None:
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps({"sha256": dict(sums)}, indent=2, sort_keys=True))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises ValueError if it is damaged, OSError if reading fails."""
    try:
        return _verified(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno not in _DAMAGED:
            raise
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _verified(path: Path) -> Checkpoint:
    sums = json.loads(read_regular(path / CHECKPOINT_MANIFEST, _MAX_JSON_BYTES))["sha256"]
    present = {entry.name for entry in path.iterdir() if entry.is_file() and not entry.is_symlink()}
    # Before the sums, which would read all of it, whatever its size is now.
    content = read_regular(path / STATE, _MAX_JSON_BYTES) if STATE in present else b""
    for name, expected in sums.items():
        if name not in present:
            raise ValueError(f"{name[:80]!r} is not a file in it")
        found = file_sha256(path / name)
        if found != expected:
            raise ValueError(f"{name} has sha256 {found}, not {expected}")
    if STATE not in sums:
        raise ValueError(f"{STATE} has no sum")
    written = json.loads(content)["formatVersion"]
    if written != FORMAT_VERSION:
        raise ValueError(f"{STATE} has format {str(written)[:80]}, this program reads {FORMAT_VERSION}")
    try:
        state = SavedState.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:80] or "all of it"
        raise ValueError(f"{STATE} is not that of a run: {place}: {first['msg']}") from error
    named = _NAME.search(path.name)
    if named is None or int(named[1]) != state.step:
        raise ValueError(f"{STATE} is that of step {state.step}")
    return Checkpoint(path, state.step, state, sums)


def read_state(path: Path) -> dict[str, Any] | None:
    """The intact state of the checkpoint at `path`, without reading its other files."""
    try:
        written = json.loads(read_regular(path / CHECKPOINT_MANIFEST, _MAX_JSON_BYTES))["sha256"][STATE]
        content = read_regular(path / STATE, _MAX_JSON_BYTES)
        state = json.loads(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return state if sha256(content).hexdigest() == written and isinstance(state, dict) else None


def newest_fingerprint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and fingerprint of the newest checkpoint with an intact state, or None.

    Cheap: no other file is read.
    """
    for _, path in numbered_checkpoints(folder):
        state = read_state(confine(path, folder))
        if state is not None and isinstance(found := state.get("fingerprint"), dict):
            return path, found
    return None


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None. Others are renamed and logged."""
    remove_partials(folder)
    for _, path in numbered_checkpoints(folder):
        try:
            return read_checkpoint(path)
        except ValueError as error:
            aside = path.with_name(path.name + CORRUPT)
            remove(aside)
            path.rename(aside)
            logger.warning("%s is broken and was renamed to %s: %s", path, aside.name, error.__cause__)
    return None


def newest_intact(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint of another run's folder, which is left as it is."""
    for _, path in numbered_checkpoints(folder):
        try:
            return read_checkpoint(confine(path, folder))
        except ValueError as error:
            logger.warning("%s is broken and is passed over: %s", path, error.__cause__)
    return None


def copy_checkpoint(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Copy a verified checkpoint into another run's `folder`, and verify it again.

    Only the files that its manifest names are copied. Raises ValueError if they have changed.
    """
    final = folder / checkpoint.path.name
    with atomic_folder(final) as partial:
        for name in checkpoint.sha256:
            source = checkpoint.path / name
            require_regular(source, checkpoint.path, str(source))
            shutil.copyfile(source, partial / name)
        _write_manifest(partial, checkpoint.sha256)
        read_checkpoint(partial)
    return read_checkpoint(final)


def numbered_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of each checkpoint, intact or not, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)
