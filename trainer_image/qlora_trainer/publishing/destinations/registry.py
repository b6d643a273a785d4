"""Publishes an artifact to an OCI registry and sets its tag last."""

from collections.abc import Mapping
from functools import partial

from qlora_api.sources import RegistrySource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration, unreachable
from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.publishing.destinations.destination import reject_occupied
from qlora_trainer.publishing.manifest import Manifest, parse_manifest
from qlora_trainer.stores.contents import Contents, PublishedFile, describe_files
from qlora_trainer.stores.model_pack import pack, unpack
from qlora_trainer.stores.referrers import attach
from qlora_trainer.stores.registry import MAX_MANIFEST_BYTES, Artifact, Blob, Registry, digest_of
from qlora_trainer.stores.retry import read_back


class RegistryDestination:
    """A tag of an OCI registry as a destination. See Destination."""

    def __init__(self, source: RegistrySource, secret: Secret, *, allowed: tuple[str, ...]) -> None:
        self.uri = str(source)
        self._source = source
        self._registry = Registry(source, secret, allowed=allowed, reject=bad_configuration)

    def published(self) -> Manifest | None:
        """See Destination. Other layers or packing make it another folder."""
        found = self._artifact()
        manifest = self._manifest_in(found)
        return (
            manifest
            if found is not None and manifest is not None and found.digest == artifact_digest(manifest)
            else None
        )

    def holders(self) -> tuple[Manifest, ...]:
        """See Destination. A tag always names a complete artifact."""
        manifest = self._manifest_in(self._artifact())
        return () if manifest is None else (manifest,)

    def is_free(self) -> bool:
        """See Destination."""
        return self._artifact() is None

    def require_writable(self) -> None:
        """See Destination."""
        self._registry.require_writable()

    def damaged(self, manifest: Manifest) -> str | None:
        """See Destination. The registry checks uploads only: this checks its answers."""
        files = _files(self._artifact())
        for name, described in manifest.files.items():
            blob = Blob(f"sha256:{described.sha256}", described.size)
            if files.get(name) != blob or not self._registry.has_blob(blob):
                return name
            if read_back(partial(self._registry.digest, blob)) != blob.digest:
                return name
        return None

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
        found, damaged = self._artifact(), self.damaged(manifest)
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

    def _manifest_in(self, artifact: Artifact | None) -> Manifest | None:
        blob = _files(artifact).get(PUBLISHED_MANIFEST)
        # The size comes from the publisher under this tag, and the file is read into memory.
        if blob is None or blob.size > MAX_MANIFEST_BYTES:
            return None
        return parse_manifest(self._registry.read(blob))


def artifact_digest(manifest: Manifest) -> str:
    """The digest, sha256:…, of the artifact of exactly these files and the manifest."""
    _, artifact = pack(manifest.job_name, _describe(manifest))
    return digest_of(artifact)


def _describe(manifest: Manifest) -> dict[str, PublishedFile]:
    return {**manifest.files, **describe_files({PUBLISHED_MANIFEST: manifest.text()})}


def _files(artifact: Artifact | None) -> dict[str, Blob]:
    try:
        return {} if artifact is None else unpack(artifact.manifest)
    except ValueError:
        return {}
