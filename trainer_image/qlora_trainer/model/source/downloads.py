"""Opens the base model at its address: hub, object store, registry or volume."""

from collections.abc import Callable, Collection, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from re import fullmatch

from qlora_api.sources import HubSource, ObjectStoreSource, RegistrySource, Source, VolumeSource, parse_source
from qlora_api.spec.model import BaseModelSpec
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration, model_unavailable, unreachable, unsafe_artifact
from qlora_trainer.core.paths import some_names
from qlora_trainer.model.source.files import content_revision
from qlora_trainer.model.source.models import DownloadedModel, RemoteModel, SharedModel, VolumeModel
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.hub import Hub
from qlora_trainer.stores.model_pack import archives, unpack
from qlora_trainer.stores.objects import ObjectFolder, version_of
from qlora_trainer.stores.registry import Registry


class HubModel:
    """A model repository of the hub. See RemoteModel."""

    def __init__(self, hub: Hub, source: HubSource, revision: str | None) -> None:
        self.uri = f"hf://{source.repository}"
        self._hub = hub
        self._listing = hub.list("model", source.repository, revision)
        if not fullmatch(r"[0-9a-f]{40}", self._listing.commit):
            raise unreachable(f"{self.uri}: the hub returned no commit for its revision, but {self._listing.commit!r}")
        self.version = self._listing.commit
        self.sizes = {name: file.size for name, file in self._listing.files.items()}
        self.digests = {name: file.sha256 for name, file in self._listing.files.items() if file.sha256 is not None}

    def fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        """See RemoteModel."""
        self._hub.fetch(self._listing, self._listing.files[name], folder, on_bytes)

    def require_readable(self, names: Iterable[str]) -> None:
        """See RemoteModel. A gated repository lists files that it does not serve."""
        for name in names:
            self._hub.require_readable(self._listing, self._listing.files[name])

    def revision(self, _digests: Callable[[], Mapping[str, str]]) -> str:
        """See RemoteModel."""
        return self.version


class ObjectStoreModel:
    """A model in a folder of an object store. See RemoteModel.

    A store reports no digest that is the same in every store and for every kind of upload (an ETag is not one), so the
    revision is the digest of what has arrived. `ObjectFolder.download` compares what it can.
    """

    def __init__(self, source: ObjectStoreSource, secret: Secret) -> None:
        self.uri = str(source)
        self._folder = ObjectFolder(source, secret, reject=model_unavailable)
        self._objects = {name: found for name, found in self._folder.list().items() if "/" not in name}
        if not self._objects:
            raise model_unavailable(f"{self.uri} has no objects: check bucket and path")
        self.sizes = {name: found.size for name, found in self._objects.items()}
        # Not every store makes its ETags from the content: they do not compare objects of two addresses.
        self.version = sha256(f"{self._folder.address} {version_of(self._objects)}".encode()).hexdigest()
        self.digests: Mapping[str, str] = {}

    def fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        """See RemoteModel."""
        self._folder.download(self._objects[name], folder / name, on_bytes)

    def require_readable(self, names: Iterable[str]) -> None:
        """See RemoteModel. The right to list a folder does not include reading it."""
        for name in names:
            self._folder.stat(name)

    def revision(self, digests: Callable[[], Mapping[str, str]]) -> str:
        """See RemoteModel."""
        return content_revision(digests())


def _has_model(names: Collection[str]) -> bool:
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


class RegistryModel:
    """A model in an OCI registry, a layer for each file. See RemoteModel."""

    def __init__(self, source: RegistrySource, secret: Secret, *, allowed: tuple[str, ...]) -> None:
        self.uri = str(source)
        self._registry = Registry(source, secret, allowed=allowed, reject=model_unavailable)
        found = self._registry.manifest(source.reference)
        if found is None:
            raise model_unavailable(f"{self.uri} does not exist: check repository and tag")
        self._digest = found.digest
        self.version = found.digest.removeprefix("sha256:")
        try:
            self._files = unpack(found.manifest)
        except ValueError as error:
            raise unsafe_artifact(f"{self.uri}: {error}") from error
        if (packed := archives(found.manifest)) and not _has_model(self._files):
            raise model_unavailable(
                f"{self.uri} has {some_names(packed)} in archives (.tar, the default of modctl), which are not "
                "unpacked: push it with one layer for each file, as `modctl build --raw` does"
            )
        self.sizes = {name: blob.size for name, blob in self._files.items()}
        self.digests = {name: blob.digest.removeprefix("sha256:") for name, blob in self._files.items()}

    def fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        """See RemoteModel."""
        self._registry.download(self._files[name], folder / name, on_bytes)

    def require_readable(self, names: Iterable[str]) -> None:
        """See RemoteModel."""
        for name in names:
            if not self._registry.has_blob(self._files[name]):
                raise model_unavailable(f"{self.uri} has no blob for {name}, which its manifest names: push it again")

    def revision(self, _digests: Callable[[], Mapping[str, str]]) -> str:
        """See RemoteModel."""
        return self._digest


def open_model_source(model: BaseModelSpec, access: StoreAccess, folder: Path) -> SharedModel:
    """Open the base model at its address, and download it below `folder` unless it is on a volume.

    Raises StepFailure BAD_CONFIGURATION for an address that a model cannot have.
    """
    source = parse_source(model.source)
    if isinstance(source, VolumeSource):
        return VolumeModel(access.mounts, source)
    return DownloadedModel(_remote_model(model, source, access), folder)


def _remote_model(model: BaseModelSpec, source: Source, access: StoreAccess) -> RemoteModel:
    if isinstance(source, HubSource):
        return HubModel(access.hub(), source, model.revision)
    if isinstance(source, ObjectStoreSource):
        return ObjectStoreModel(source, access.secret)
    if isinstance(source, RegistrySource):
        return RegistryModel(source, access.secret, allowed=access.registries)
    raise bad_configuration(
        f"spec.model.source is {model.source}: must be hf://, s3://, gs://, az://, oci:// or pvc://"
    )
