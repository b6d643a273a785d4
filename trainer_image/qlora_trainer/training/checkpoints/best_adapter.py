"""Keeps the adapter of the best evaluation on disk, exactly: in `best/`, until the next checkpoint holds it too.

A run resumes with the best adapter that its checkpoint holds, so one that was found later does not count until the run
comes to it again.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.core.filesystem import atomic_folder, file_sha256
from qlora_trainer.training.checkpoints.checkpoint import Checkpoint, StoredFile

BEST_FILE = "best.safetensors"


def write_best(folder: Path, tensors: Mapping[str, Tensor]) -> StoredFile:
    """Write the adapter durably to `folder`. Raises as `save_checkpoint` does."""
    with atomic_folder(folder) as partial:
        save_file(dict(tensors), partial / BEST_FILE)
        sha256 = file_sha256(partial / BEST_FILE)
    return StoredFile(folder / BEST_FILE, sha256)


def best_of(checkpoint: Checkpoint) -> StoredFile | None:
    """The best adapter up to the checkpoint, or None if it holds none."""
    sha256 = checkpoint.sha256.get(BEST_FILE)
    return None if sha256 is None else StoredFile(checkpoint.path / BEST_FILE, sha256)


def read_best(stored: StoredFile) -> dict[str, Tensor]:
    """The adapter's tensors, in main memory. Raises ValueError if they changed."""
    found = file_sha256(stored.path)
    if found != stored.sha256:
        raise ValueError(f"{stored.path} has sha256 {found}, not {stored.sha256}: it was changed or damaged")
    return load_file(stored.path)
