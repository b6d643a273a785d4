"""Publishes an artifact to an OCI registry and sets its tag last."""

from collections.abc import Callable, Mapping
from functools import partial

from qlora_api.sources import RegistrySource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration, unreachable
from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.stores.contents import (
    MAX_MANIFEST_BYTES,
    Contents,
    Manifest,
    PublishedFile,
    describe_files,
    parse_manifest,
)
from qlora_trainer.stores.destinations.destination import StoredFile, StoreFolder, reject_occupied
from qlora_trainer.stores.model_pack import pack, unpack
from qlora_trainer.stores.referrers import attach
from qlora_trainer.stores.registry import Artifact, Blob, Registry, digest_of


class RegistryDestination(StoreFolder):
    """A tag of an OCI registry. See StoreFolder."""

    def __init__(
        self,
        source: RegistrySource,
        secret: Secret,
        *,
        allowed: tuple[str, ...],
        reject: Callable[[str], StepFailure] = bad_configuration,
    ) -> None:
        """`allowed`: the registries that the profile allows."""
        self.uri = str(source)
        self._source = source
        self._registry = Registry(source, secret, allowed=allowed, reject=reject)

    def files(self) -> Mapping[str, StoredFile]:
        """See StoreFolder. None of an artifact that is packed in another way."""
        return {
            name: StoredFile(blob.size, partial(self._digest, blob), partial(self._registry.download, blob))
            for name, blob in _blobs(self._artifact()).items()
        }

    def read(self, name: str, *, most: int) -> bytes | None:
        """See StoreFolder."""
        return self._read(self._artifact(), name, most)

    def read_manifest(self) -> Manifest | None:
        """See Destination. Other layers or packing make it another folder."""
        # Once: the tag may move to another artifact.
        found = self._artifact()
        manifest = parse_manifest(self._read(found, PUBLISHED_MANIFEST, MAX_MANIFEST_BYTES))
        is_same = manifest is not None and found is not None and found.digest == artifact_digest(manifest)
        return manifest if is_same else None

    def holders(self) -> tuple[Manifest, ...]:
        """See Destination. Of other layers too."""
        manifest = super().read_manifest()
        return () if manifest is None else (manifest,)

    def is_free(self) -> bool:
        """See Destination."""
        return self._registry.manifest(self._source.reference) is None

    def require_writable(self) -> None:
        """See Destination."""
        self._registry.require_writable()

    def write(self, contents: Contents, manifest: Manifest) -> None:
        """See Destination. Skips layers that an earlier attempt has uploaded."""
        described = _describe(manifest)
        for name, content in {**contents, PUBLISHED_MANIFEST: manifest.text()}.items():
            self._registry.upload(Blob(f"sha256:{described[name].sha256}", described[name].size), content)
        config, artifact = pack(manifest.job_name, described)
        self._registry.upload(Blob(digest_of(config), len(config)), config)
        # A registry moves a tag from any artifact, and uploading may have taken long.
        reject_occupied(self, manifest.publisher)
        self._registry.tag(artifact, self._source.reference)
        found, damaged = self._registry.manifest(self._source.reference), self.find_damage(manifest)
        if found is None or found.digest != digest_of(artifact) or damaged is not None:
            raise unreachable(
                f"{self.uri}: {damaged or 'the tag'} does not read back as it was written: the next attempt writes it "
                "again"
            )

    def location(self, manifest: Manifest) -> str:
        """See Destination. Without the tag, which any client with push access can move."""
        return f"{self.uri}@{artifact_digest(manifest)}"

    def attach(self, document: bytes, media_type: str, annotations: Mapping[str, str], manifest: Manifest) -> None:
        """Attach a document to the artifact of the manifest, which is published there."""
        wanted = artifact_digest(manifest)
        found = self._registry.manifest(wanted)
        if found is None:
            raise unreachable(f"{self.uri} no longer has {wanted}: the next attempt publishes it again")
        attach(self._registry, found, document, media_type, annotations)

    def _artifact(self) -> Artifact | None:
        return self._registry.manifest(self._source.reference)

    def _read(self, artifact: Artifact | None, name: str, most: int) -> bytes | None:
        blob = _blobs(artifact).get(name)
        return None if blob is None or blob.size > most else self._registry.read(blob)

    def _digest(self, blob: Blob) -> str:
        """Return the registry's digest of the content, empty if it has no such blob."""
        return self._registry.digest(blob).removeprefix("sha256:") if self._registry.has_blob(blob) else ""


def _blobs(artifact: Artifact | None) -> dict[str, Blob]:
    try:
        return {} if artifact is None else unpack(artifact.manifest)
    except ValueError:
        return {}


def artifact_digest(manifest: Manifest) -> str:
    """The digest, sha256:…, of the artifact of exactly these files and the manifest."""
    _, artifact = pack(manifest.job_name, _describe(manifest))
    return digest_of(artifact)


def _describe(manifest: Manifest) -> dict[str, PublishedFile]:
    return {**manifest.files, **describe_files({PUBLISHED_MANIFEST: manifest.text()})}
