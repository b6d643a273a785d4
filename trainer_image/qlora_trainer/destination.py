"""Puts a finished folder where it belongs: whole or not at all, read back, and never over somebody else's."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from qlora_api.schema import ApiModel, ObservedModel
from qlora_trainer.disk import file_sha256, sync_tree
from qlora_trainer.failures import bad_configuration, unsafe_artefact
from qlora_trainer.files import MANIFEST_FILE
from qlora_trainer.records import sync_folder


class PublishedFile(ApiModel):
    """One file of a published folder."""

    sha256: str
    size: int


class Manifest(ObservedModel):
    """What a published folder holds, and which run made it."""

    job_uid: str
    job_name: str
    fingerprint: str = Field(description="SHA-256 of everything that determines the adapter.")
    spec_sha256: str = Field(description="SHA-256 of the job's spec with all defaults, as sorted JSON.")
    base_model: str
    base_revision: str
    libraries: dict[str, str]
    files: dict[str, PublishedFile]

    def same_run(self, other: "Manifest") -> bool:
        """Whether both are of one job with the same settings, so that one may replace the other."""
        return (self.job_uid, self.fingerprint) == (other.job_uid, other.fingerprint)


def describe_files(contents: Mapping[str, Path | bytes]) -> dict[str, PublishedFile]:
    """SHA-256 and size of each file by its name, given by a path or by its content."""
    described = {}
    for name, content in sorted(contents.items()):
        if isinstance(content, bytes):
            described[name] = PublishedFile(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        else:
            described[name] = PublishedFile(sha256=file_sha256(content), size=content.stat().st_size)
    return described


def confined(path: Path, root: Path) -> Path:
    """The path with links resolved. Raises StepFailure (UNSAFE_ARTEFACT) if a link leads out of `root`."""
    resolved = path.resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise unsafe_artefact(f"{path} leads to {resolved}, outside of its volume: remove the symbolic link")
    return resolved


def is_published(folder: Path, manifest: Manifest) -> bool:
    """Whether the folder holds exactly this, every file with its SHA-256."""
    found = read_manifest(folder)
    return found == manifest and damaged_file(folder, manifest) is None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a published folder; None if there is none that can be read."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def refuse_occupied(folder: Path, manifest: Manifest) -> None:
    """Raise StepFailure (BAD_CONFIGURATION), naming what is there, unless the folder is free or this run's own."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    found = read_manifest(folder)
    if found is None:
        raise bad_configuration(
            f"the destination {folder} holds something that no QLoRAJob has published: choose another folder"
        )
    if not found.same_run(manifest):
        raise bad_configuration(
            f"the destination {folder} holds another adapter, of job {found.job_name!r} (UID {found.job_uid}, trained "
            f"on {found.base_model}): choose another folder or delete that one"
        )


def write_folder(folder: Path, contents: Mapping[str, Path | bytes], manifest: Manifest, *, owner: str) -> None:
    """Write the files and the manifest beside `folder`, read them back, and give them its name in one step.

    `owner` tells this process from another one that may do the same. Raises StepFailure if somebody else's files are
    there, OSError if it cannot be written; then `folder` is as it was.
    """
    refuse_occupied(folder, manifest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.{manifest.job_uid}"
    stage = folder.with_name(f"{prefix}.{owner}.partial")
    _remove(stage)
    stage.mkdir()
    try:
        for name, content in contents.items():
            _write(stage / name, content)
        text = json.dumps(manifest.dump(), indent=2, sort_keys=True) + "\n"
        (stage / MANIFEST_FILE).write_text(text)
        sync_tree(stage)
        _require_intact(stage, manifest)
        _swap(stage, folder)
    except BaseException:
        # On a full volume the space is wanted back.
        _remove(stage)
        raise
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}.*"):
        _remove(leftover)
    sync_folder(folder.parent)
    _require_intact(folder, manifest)


def _write(path: Path, content: Path | bytes) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)


def _swap(stage: Path, folder: Path) -> None:
    """Rename over an empty folder or none; a folder of the same run, which is damaged or older, makes room first."""
    if folder.exists() and any(folder.iterdir()):
        folder.rename(stage.with_suffix(".replaced"))
    os.replace(stage, folder)


def _require_intact(folder: Path, manifest: Manifest) -> None:
    damaged = damaged_file(folder, manifest)
    if damaged is not None:
        raise OSError(f"{folder / damaged} does not read back as it was written: the volume is broken")


def damaged_file(folder: Path, manifest: Manifest) -> str | None:
    """The first file of the manifest that is missing in the folder or has another SHA-256; None if all is well."""
    for name, described in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or file_sha256(path) != described.sha256:
            return name
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
