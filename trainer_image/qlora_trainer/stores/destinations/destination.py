"""Publishes a folder to any destination, if the run may write there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.core.paths import some_names
from qlora_trainer.stores.contents import (
    MAX_MANIFEST_BYTES,
    SHARED_BASES,
    Contents,
    Manifest,
    Publisher,
    parse_manifest,
)
from qlora_trainer.stores.retry import read_back


class Destination(ABC):
    """A location for one published folder. Methods raise StepFailure."""

    uri: str
    """Its address, as the spec has it."""

    @abstractmethod
    def read_manifest(self) -> Manifest | None:
        """The manifest of the existing folder, complete or damaged, or None."""

    def holders(self) -> tuple[Manifest, ...]:
        """The manifests of the runs that have published there or begun to, one of each."""
        manifest = self.read_manifest()
        return () if manifest is None else (manifest,)

    @abstractmethod
    def is_free(self) -> bool:
        """Whether the destination is empty."""

    @abstractmethod
    def require_writable(self) -> None:
        """Raise StepFailure if the credentials forbid writing, as far as can be tested."""

    @abstractmethod
    def find_damage(self, manifest: Manifest) -> str | None:
        """The first file of the manifest that is missing or differs there, or None."""

    @abstractmethod
    def write(self, contents: Contents, manifest: Manifest) -> None:
        """Write the files, read them back, and write the manifest last. Resumes an earlier attempt.

        Calls `reject_occupied` once more, as late as it can: another run may have published in the meantime.
        """

    def location(self, manifest: Manifest) -> str:
        """The address of exactly the manifest's files, with a commit or digest if any."""
        return self.uri


@dataclass(frozen=True)
class StoredFile:
    """A file of a published folder, as its store lists it."""

    size: int
    """Bytes."""
    digest: Callable[[], str]
    """Reads the content as the store sends it now, and returns its SHA-256 in hexadecimal."""
    download: Callable[[Path, Callable[[int], None]], object]
    """Downloads to that path, and calls the function with the bytes that have arrived."""


class StoreFolder(Destination):
    """A folder of a hub, bucket or registry: destination, and source of downloads."""

    @abstractmethod
    def files(self) -> Mapping[str, StoredFile]:
        """Its files by name; empty without a folder."""

    def find(self, names: Iterable[str]) -> Mapping[str, StoredFile]:
        """Those of the files that exist. Raises StepFailure."""
        stored = self.files()
        return {name: stored[name] for name in names if name in stored}

    @abstractmethod
    def read(self, name: str, *, most: int) -> bytes | None:
        """Return a file's content, None if missing or larger than `most` bytes."""

    def read_manifest(self) -> Manifest | None:
        """See Destination."""
        return parse_manifest(self.read(PUBLISHED_MANIFEST, most=MAX_MANIFEST_BYTES))

    def find_damage(self, manifest: Manifest) -> str | None:
        """See Destination. Reads every file, as a store may list other bytes."""
        stored = self.files()
        for name, described in manifest.files.items():
            file = stored.get(name)
            if file is None or file.size != described.size or read_back(file.digest) != described.sha256:
                return name
        return None


def reject_occupied(destination: Destination, publisher: Publisher) -> None:
    """Raise StepFailure unless the destination is free or the publisher's."""
    if destination.is_free():
        return
    holders = destination.holders()
    if not holders:
        raise bad_configuration(
            f"the destination {destination.uri} has files that no QLoRAJob published: choose another one"
        )
    for holder in holders:
        if not publisher.owns(holder):
            raise bad_configuration(f"the destination {destination.uri} {_occupation(holder, publisher)}")


def _occupation(holder: Manifest, publisher: Publisher) -> str:
    if not holder.is_shared:
        is_own = holder.job_uid == publisher.job_uid
        restart = "; `qlora run --restart` deletes that of its own workspace" if is_own else ""
        return (
            f"holds another adapter, of job {holder.job_name!r} (UID {holder.job_uid}, trained on "
            f"{holder.base_model}): give each job a destination of its own, or delete that adapter{restart}"
        )
    if (holder.job_uid, holder.fingerprint) != (publisher.job_uid, publisher.fingerprint):
        return (
            f"holds the {_label(holder)} of {holder.base_model} ({holder.base_revision}), and not what is to "
            "be published: choose another one, or delete that base"
        )
    there, own = holder.tokenizer, publisher.tokenizer or {}
    different = [name for name in {**there, **own} if there.get(name) != own.get(name)]
    return (
        "holds this base with another tokenizer: choose another destination, or delete that base (different: "
        f"{some_names(different)})"
    )


def _label(base: Manifest) -> str:
    return "4-bit base" if base.job_uid == SHARED_BASES["quantized"] else "16-bit base"


def publish_folder(destination: Destination, contents: Contents, manifest: Manifest) -> str:
    """Publish the files with their manifest, verify them, and return their exact address.

    Writes nothing if they exist already. Raises StepFailure: BAD_CONFIGURATION if the destination is occupied.
    """
    if not is_published(destination, manifest):
        reject_occupied(destination, manifest.publisher)
        destination.write(contents, manifest)
    return destination.location(manifest)


def is_published(destination: Destination, manifest: Manifest) -> bool:
    """Whether exactly this exists, every file with its SHA-256."""
    return destination.read_manifest() == manifest and destination.find_damage(manifest) is None
