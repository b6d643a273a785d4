"""Fetches an earlier adapter to continue from into the workspace, and reads it."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from qlora_api.artifact_status import InitialAdapterStatus
from qlora_api.contract import ExitCode
from qlora_api.sources import VolumeSource, parse_source
from qlora_api.spec.model import InitialAdapterSpec
from qlora_api.spec.resolved import ResolvedLora, decided_lora
from qlora_api.spec.training import MAX_RANK, LoraSpec
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import StepFailure, bad_configuration, unsafe_artifact
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from qlora_trainer.core.filesystem import complete_folder, file_sha256, new_folder, partial_path, remove, require_space
from qlora_trainer.core.paths import confine, require_regular, some_names
from qlora_trainer.model.adapter.initial_check import check_config, check_tensors
from qlora_trainer.model.adapter.shapes import MAX_CONFIG_BYTES, expected_tensors, largest_file
from qlora_trainer.model.architecture.text_part import text_part
from qlora_trainer.model.source.downloads import RemoteSource, open_remote_model
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.hub import Hub

_FIELD = "spec.lora.from"
_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_FILE)


@dataclass(frozen=True)
class InitialAdapter:
    """An earlier adapter that fits the job, in a partial folder of the workspace."""

    status: InitialAdapterStatus
    base_name: str | None
    """The base as its configuration names it, or None."""
    base_revision: str | None
    lora: ResolvedLora
    """The job's, with the rank and alpha of the adapter where it leaves them open."""
    folder: Path
    """Where `complete` puts it."""

    def complete(self) -> None:
        """Move it to its place in the workspace."""
        complete_folder(partial_path(self.folder), self.folder)

    def remark(self, base_name: str, base_revision: str) -> str | None:
        """A remark on another base. No reason to stop: the same files have many names."""
        if self.base_name is None or (self.base_name == base_name and self.base_revision in (None, base_revision)):
            return None
        return (
            f"the adapter of {_FIELD} was trained on {self.base_name} ({self.base_revision or 'no revision'}), and "
            f"this job is on {base_name} ({base_revision}): every shape fits, so that only the held-out loss at step 0 "
            "shows whether it is the same base"
        )


def get_initial_adapter(
    lora: LoraSpec,
    access: StoreAccess,
    folder: Path,
    model_folder: Path,
    target_modules: tuple[str, ...],
    earlier: InitialAdapterStatus | None = None,
) -> InitialAdapter | None:
    """Fetch the adapter of spec.lora.from for `folder` of the workspace, and check it; None if the job names none.

    `earlier` is the adapter that prepare has fetched for this job before, which must not have changed. Raises
    StepFailure: BAD_CONFIGURATION if the adapter is missing or does not fit the job, UNSAFE_ARTIFACT if it is only a
    pickle, a link out of its folder, too large, or has another SHA-256 than the job states or `earlier` has.
    """
    if lora.initial_adapter is None:
        return None
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    skeleton = text_part(config)
    partial = new_folder(partial_path(folder))
    known = earlier if earlier is not None and _is_wanted(earlier, lora.initial_adapter) else None
    address = lora.initial_adapter.source.rstrip("/") if known is None else known.source
    largest = expected_tensors(skeleton, target_modules, decided_lora(lora, MAX_RANK, 1))
    location = _fetch(access, address, partial, largest_file(largest))
    found = check_config(partial / ADAPTER_CONFIG_FILE, location, lora)
    decided = decided_lora(lora, found.rank, found.alpha)
    sha256, stated = file_sha256(partial / ADAPTER_FILE), lora.initial_adapter.sha256
    if stated not in (None, sha256):
        raise unsafe_artifact(
            f"{location}/{ADAPTER_FILE} has sha256 {sha256}, and {_FIELD}.sha256 is {stated}: name the adapter that is "
            "meant, or correct the digest"
        )
    if known is not None and known.sha256 != sha256:
        raise unsafe_artifact(
            f"{_FIELD}.source: the adapter at {location} has changed since this job was prepared (sha256 was "
            f"{known.sha256}, is {sha256}): put the earlier one back, or create the job again to begin with this one"
        )
    check_tensors(partial / ADAPTER_FILE, location, decided, expected_tensors(skeleton, target_modules, decided))
    status = InitialAdapterStatus(source=location, sha256=sha256)
    return InitialAdapter(status, found.base_name, found.base_revision, decided, folder)


def is_unchanged(record: InitialAdapterStatus | None, wanted: InitialAdapterSpec | None, folder: Path) -> bool:
    """Whether the recorded adapter matches the job, and is still in `folder`."""
    if wanted is None or record is None:
        return wanted is None and record is None
    if not _is_wanted(record, wanted):
        return False
    path = folder / ADAPTER_FILE
    return path.is_file() and not path.is_symlink() and file_sha256(path) == record.sha256


def read_initial_adapter(folder: Path, sha256: str) -> Mapping[str, Tensor]:
    """Read the adapter that prepare has checked. Raises StepFailure if it changed."""
    path = folder / ADAPTER_FILE
    if path.is_symlink() or not path.is_file() or file_sha256(path) != sha256:
        raise unsafe_artifact(
            f"{path} is no longer the adapter that prepare has checked (sha256 {sha256}): keep others from writing to "
            "the workspace, and create the job again"
        )
    return load_file(path)


def _is_wanted(record: InitialAdapterStatus, wanted: InitialAdapterSpec) -> bool:
    """Whether the record is of the job's adapter. Its location may have a commit."""
    address = wanted.source.rstrip("/")
    return wanted.sha256 in (None, record.sha256) and (
        record.source == address or record.source.startswith(f"{address}@")
    )


def _fetch(access: StoreAccess, address: str, folder: Path, largest: int) -> str:
    """Copy both files from the address into the folder, and return its exact form."""
    source = parse_source(address)
    if isinstance(source, VolumeSource):
        _copy(access.mounts, source, folder, largest)
        return address
    if not isinstance(source, RemoteSource):
        raise TypeError(f"the schema allows no adapter at {address}")
    with _explain_errors():
        remote = open_remote_model(source, lambda: _open_hub(access), access.secret, access.registries)
        _validate_files(remote.sizes, remote.location, largest)
        require_space(folder, sum(remote.sizes[name] for name in _FILES), f"the adapter {remote.location}")
        for name in _FILES:
            remote.fetch(name, folder, lambda _done: None)
    for path in folder.iterdir():
        # The hub's client also stores notes there.
        if path.name not in _FILES:
            remove(path)
    return remote.location


def _copy(mounts: Mounts, source: VolumeSource, folder: Path, largest: int) -> None:
    root = mounts.volume(VolumeSource(source.claim))
    found = confine(root / source.path, root)
    if not found.is_dir():
        raise bad_configuration(f"{_FIELD}.source: {source} is not a folder on the volume: check the path")
    names = [path.name for path in found.iterdir()]
    for name in {*_FILES} & {*names}:
        require_regular(found / name, found, f"{source}/{name}")
    sizes = {name: (found / name).stat().st_size if name in _FILES else 0 for name in names}
    _validate_files(sizes, str(source), largest)
    require_space(folder, sum(sizes[name] for name in _FILES), f"the adapter {source}")
    for name in _FILES:
        shutil.copyfile(found / name, folder / name)


def _validate_files(sizes: Mapping[str, int], location: str, largest: int) -> None:
    """Raise StepFailure unless both files exist with at most the adapter's size."""
    pickles = [name for name in sizes if name.endswith((".bin", ".pt", ".pth"))]
    if ADAPTER_FILE not in sizes and pickles:
        raise unsafe_artifact(
            f"{location} has its adapter only as {some_names(pickles)}, which can run code when it is loaded: convert "
            f"it to {ADAPTER_FILE}"
        )
    for name, most in ((ADAPTER_CONFIG_FILE, MAX_CONFIG_BYTES), (ADAPTER_FILE, largest)):
        if name not in sizes:
            raise bad_configuration(f"{_FIELD}.source: {location} has no {name}; it has {some_names(sizes)}")
        if sizes[name] > most:
            raise unsafe_artifact(
                f"{location}/{name} has {sizes[name]} bytes, and that of an adapter with this job's settings has at "
                f"most {most}: name another adapter, or set spec.lora as that adapter was trained"
            )


def _open_hub(access: StoreAccess) -> Hub:
    """Open the hub with the token of the adapter's own Secret, or else the model's."""
    secret = access.secret
    if secret.name is None:
        return access.hub()
    own = get_token()
    values = secret.require("token", has_own=own is not None)
    return Hub(own if values is None else values["token"], field=secret.field)


@contextmanager
def _explain_errors() -> Iterator[None]:
    """Report a missing or forbidden adapter as a wrong address, not a missing base."""
    try:
        yield
    except StepFailure as failure:
        if failure.exit_code is not ExitCode.MODEL_UNAVAILABLE:
            raise
        raise bad_configuration(f"{_FIELD}.source: {failure.message}") from failure
