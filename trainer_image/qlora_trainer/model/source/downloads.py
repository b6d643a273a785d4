"""Opens a model's files on a server: hub, object store or registry."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from re import fullmatch
from typing import Protocol

from qlora_api.sources import HubSource, ObjectStoreSource, RegistrySource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import model_unavailable, unreachable, unsafe_artifact
from qlora_trainer.core.paths import some_names
from qlora_trainer.stores.hub import Hub
from qlora_trainer.stores.model_pack import archives, unpack
from qlora_trainer.stores.objects import ObjectFolder, version_of
from qlora_trainer.stores.registry import Registry


class RemoteModel(Protocol):
    """The files of a model on a server. Methods raise StepFailure."""

    uri: str
    """The model's address, for messages."""
    location: str
    """The address with the commit or the digest, if the server has one."""
    version: str
    """Identifies the server's current content. Can be a folder's name."""
    revision: str | None
    """Commit or digest, or None if the server has none."""
    sizes: Mapping[str, int]
    """Bytes of each file, by its name."""
    digests: Mapping[str, str]
    """SHA-256 of each file, by its name, as far as the server reports it."""

    def fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        """Download the whole file into `folder`, and resume an earlier attempt."""

    def require_readable(self, name: str) -> None:
        """Check with the server that the job's credentials open this file."""


RemoteSource = HubSource | ObjectStoreSource | RegistrySource
"""An address of files on a server."""


def open_remote_model(
    source: RemoteSource,
    hub: Callable[[], Hub],
    secret: Secret,
    registries: tuple[str, ...],
    revision: str | None = None,
) -> RemoteModel:
    """Open the files at the address. `revision` is that of the hub, if its address names none."""
    if isinstance(source, HubSource):
        return _HubModel(hub(), source, source.commit or revision)
    if isinstance(source, ObjectStoreSource):
        return _ObjectStoreModel(source, secret)
    return _RegistryModel(source, secret, registries)


class _HubModel(RemoteModel):
    def __init__(self, hub: Hub, source: HubSource, revision: str | None) -> None:
        self.uri = f"hf://{source.repository}"
        self._hub = hub
        self._listing = hub.list("model", source.repository, revision)
        if not fullmatch(r"[0-9a-f]{40}", self._listing.commit):
            raise unreachable(f"{self.uri}: the hub returned no commit for its revision, but {self._listing.commit!r}")
        self.version = self.revision = self._listing.commit
        self.location = f"{self.uri}@{self.version}"
        self.sizes = {name: file.size for name, file in self._listing.files.items()}
        self.digests = {name: file.sha256 for name, file in self._listing.files.items() if file.sha256 is not None}

    def fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        self._hub.fetch(self._listing, self._listing.files[name], folder, on_bytes)

    def require_readable(self, name: str) -> None:
        # A gated repository lists files that it does not serve.
        self._hub.require_readable(self._listing, self._listing.files[name])


class _ObjectStoreModel(RemoteModel):
    """No digest is the same in every store and for every kind of upload. An ETag is not one.

    `ObjectFolder.download` compares what it can.
    """

    revision = None

    def __init__(self, source: ObjectStoreSource, secret: Secret) -> None:
        self.uri = self.location = str(source)
        self._folder = ObjectFolder(source, secret, reject=model_unavailable)
        self._objects = {name: found for name, found in self._folder.list().items() if "/" not in name}
        if not self._objects:
            raise model_unavailable(f"{self.uri} has no objects: check bucket and path")
        self.sizes = {name: found.size for name, found in self._objects.items()}
        # Not every store makes its ETags from the content: they do not compare objects of two addresses.
        self.version = sha256(f"{self._folder.address} {version_of(self._objects)}".encode()).hexdigest()
        self.digests = {}

    def fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        self._folder.download(self._objects[name], folder / name, on_bytes)

    def require_readable(self, name: str) -> None:
        # The right to list a folder does not include reading it.
        self._folder.stat(name)


class _RegistryModel(RemoteModel):
    """A layer for each file."""

    def __init__(self, source: RegistrySource, secret: Secret, allowed: tuple[str, ...]) -> None:
        self.uri = str(source)
        self._registry = Registry(source, secret, allowed=allowed, reject=model_unavailable)
        found = self._registry.manifest(source.reference)
        if found is None:
            raise model_unavailable(f"{self.uri} does not exist: check repository and tag")
        self.revision = found.digest
        self.version = found.digest.removeprefix("sha256:")
        self.location = str(replace(source, digest=found.digest))
        try:
            self._files = unpack(found.manifest)
        except ValueError as error:
            raise unsafe_artifact(f"{self.uri}: {error}") from error
        has_model = "config.json" in self._files and any(name.endswith(".safetensors") for name in self._files)
        if (packed := archives(found.manifest)) and not has_model:
            raise model_unavailable(
                f"{self.uri} has {some_names(packed)} in archives (.tar, the default of modctl), which are not "
                "unpacked: push it with one layer for each file, as `modctl build --raw` does"
            )
        self.sizes = {name: blob.size for name, blob in self._files.items()}
        self.digests = {name: blob.digest.removeprefix("sha256:") for name, blob in self._files.items()}

    def fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        self._registry.download(self._files[name], folder / name, on_bytes)

    def require_readable(self, name: str) -> None:
        if not self._registry.has_blob(self._files[name]):
            raise model_unavailable(f"{self.uri} has no blob for {name}, which its manifest names: push it again")
