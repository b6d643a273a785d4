"""Reads and writes artifacts of an OCI registry."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypedDict
from urllib.parse import quote, urljoin

import requests

from qlora_api.sources import RegistrySource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, unreachable, unsafe_artifact
from qlora_trainer.core.filesystem import file_sha256, partial_path
from qlora_trainer.core.network import trouble
from qlora_trainer.stores.registry_auth import RegistrySession
from qlora_trainer.stores.retry import is_retryable

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MAX_MANIFEST_BYTES = 2**22
"""The size of a manifest that every registry should accept, by the specification."""
_MAX_PAGES = 20
"""Of a list of referrers, which anybody who may push can make long."""
# So much of a transfer is lost when it is cut off.
_BLOCK_BYTES = 2**16


class Layer(TypedDict, total=False):
    """A layer of an artifact, as any client may have described it."""

    mediaType: object
    digest: object
    size: object
    annotations: object


class ImageManifest(TypedDict):
    """The part of a manifest that is read."""

    layers: list[Layer]


class Index(TypedDict, total=False):
    """The part of an index that is read."""

    manifests: object


@dataclass(frozen=True)
class Blob:
    """A blob as a manifest describes it."""

    digest: str
    """sha256:…"""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Artifact:
    """A manifest and its digest in the registry."""

    digest: str
    manifest: ImageManifest
    size: int
    """Bytes of the manifest."""


@dataclass(frozen=True)
class Referrers:
    """The referrers of an artifact, as far as the registry was asked."""

    pages: list[Index]
    """Indexes."""
    is_all: bool
    """Whether the registry lists no more."""


class Registry:
    """One repository of a registry that the administrator allows. Methods raise StepFailure.

    Missing or forbidden artifacts end as in `reject`. A registry in trouble is UNREACHABLE. For where credentials are
    sent, see RegistrySession.
    """

    def __init__(
        self,
        source: RegistrySource,
        secret: Secret,
        *,
        allowed: tuple[str, ...],
        reject: Callable[[str], StepFailure],
    ) -> None:
        """`allowed`: HOST or HOST:PORT, with http:// before it where there is no TLS."""
        self.source = source
        self._secret = secret
        self._reject = reject
        self._session = RegistrySession(source, secret, allowed)
        self._repository = f"{self._session.base}/{source.repository}"

    def manifest(self, reference: str) -> Artifact | None:
        """The manifest of a tag or digest, or None. That of a digest is checked."""
        content = self._manifest_content(reference)
        if content is None:
            return None
        manifest = parse_layers(content)
        if manifest is None:
            raise self._reject(f"{self.source} is not an artifact with layers ({MANIFEST_TYPE})")
        return Artifact(digest_of(content), manifest, len(content))

    def referrer(self, digest: str) -> ImageManifest | None:
        """The manifest of a digest, or None if it has no layers.

        A client may attach anything to an artifact.
        """
        content = self._manifest_content(digest)
        return None if content is None else parse_layers(content)

    def _manifest_content(self, reference: str) -> bytes | None:
        content, _ = self._small(self._manifest_url(reference), MANIFEST_TYPE)
        if content is not None and reference.startswith("sha256:") and digest_of(content) != reference:
            raise unsafe_artifact(f"{self.source}: the registry answered {reference} with {digest_of(content)}")
        return content

    def index(self, tag: str) -> Index | None:
        """The index of a tag, as the registry has it, or None."""
        return _index(self._small(self._manifest_url(tag), INDEX_TYPE)[0])

    def referrers(self, digest: str, artifact_type: str) -> Referrers | None:
        """The referrers of the artifact with the digest, or None from a registry without that API.

        The registry may leave out what has another type.
        """
        following: str | None = f"{self._repository}/referrers/{digest}?artifactType={quote(artifact_type, safe='')}"
        pages: list[Index] = []
        while following and len(pages) < _MAX_PAGES:
            content, further = self._small(following, INDEX_TYPE)
            page = _index(content)
            if page is None:
                break
            pages.append(page)
            following = further
        return Referrers(pages, following is None) if pages else None

    def put_referrer(self, manifest: bytes) -> bool:
        """Upload a manifest with a subject, and return whether the registry lists it."""
        with self._errors():
            url, headers = self._manifest_url(digest_of(manifest)), {"Content-Type": MANIFEST_TYPE}
            answer = self._session.ask("PUT", url, headers=headers, data=manifest)
            self._require(answer, "written")
        return "OCI-Subject" in answer.headers

    def _small(self, url: str, media_type: str) -> tuple[bytes | None, str | None]:
        """The content of a manifest or an index, and the address of its next page.

        The content is None if there is none.
        """
        content = b""
        with self._errors(), self._session.ask("GET", url, headers={"Accept": media_type}, stream=True) as answer:
            if answer.status_code == 404:
                return None, None
            self._require(answer, "read")
            following = self._next_page(answer)
            for block in answer.iter_content(_BLOCK_BYTES):
                content += block
                if len(content) > MAX_MANIFEST_BYTES:
                    raise unsafe_artifact(f"{self.source}: its manifest has more than {MAX_MANIFEST_BYTES} bytes")
        return content, following

    def _next_page(self, answer: requests.Response) -> str | None:
        """The next address in the answer's Link, or None without one.

        Empty if it is of another server, or of this page.
        """
        if "next" not in answer.links:
            return None
        try:
            following = urljoin(answer.url, answer.links["next"].get("url", ""))
        except ValueError:
            return ""
        is_other = following != answer.url and following.startswith(f"{self._session.base}/")
        return following if is_other else ""

    def has_blob(self, blob: Blob) -> bool:
        """Whether the registry has the blob with this size."""
        with self._errors():
            answer = self._session.ask("HEAD", self._blob_url(blob))
            if answer.status_code == 404:
                return False
            self._require(answer, "read")
        return answer.headers.get("Content-Length") == str(blob.size)

    def digest(self, blob: Blob) -> str:
        """The digest of the blob's content as the registry sends it now.

        The content is not stored.
        """
        found = sha256()
        for block in self._blocks(blob, 0):
            found.update(block)
        return f"sha256:{found.hexdigest()}"

    def read(self, blob: Blob) -> bytes:
        """The content of a small blob, its digest checked."""
        content = b"".join(self._blocks(blob, 0))
        if digest_of(content) != blob.digest:
            raise unsafe_artifact(f"{self.source}: {blob.digest} has content that does not match its digest")
        return content

    def download(self, blob: Blob, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Download to `path`, which then has this digest or is not there, from where an earlier attempt stopped.

        `on_bytes` is called with the bytes of this blob that have arrived. Raises OSError for a full disk.
        """
        if path.is_file() and path.stat().st_size == blob.size:
            return
        # The digest is in the name, so that parts of two versions are never joined.
        partial = partial_path(path.with_name(f"{path.name}.{blob.digest[-16:]}"))
        with partial.open("ab") as file:
            for block in self._blocks(blob, file.tell()):
                file.write(block)
                on_bytes(file.tell())
            size = file.tell()
        if size < blob.size:
            raise unreachable(f"{self.source} broke off after {size} of {blob.size} bytes of {path.name}")
        if f"sha256:{file_sha256(partial)}" != blob.digest:
            partial.unlink()
            raise unreachable(f"{self.source}: {path.name} has another SHA-256 than its digest: it is downloaded again")
        partial.replace(path)

    def upload(self, blob: Blob, content: Path | bytes) -> None:
        """Upload a blob unless the registry has it. The registry checks its digest."""
        if self.has_blob(blob):
            return
        with self._errors():
            started = self._session.ask("POST", f"{self._repository}/blobs/uploads/")
            self._require(started, "written")
            location = self._upload_location(started)
            url = f"{location}{'&' if '?' in location else '?'}digest={blob.digest}"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
            if isinstance(content, bytes):
                answer = self._session.ask("PUT", url, headers=headers, data=content)
            else:
                with content.open("rb") as file:
                    answer = self._session.ask("PUT", url, headers=headers, data=file)
            if answer.status_code == 400:
                raise unreachable(f"{self.source}: {blob.digest} did not arrive intact: it is sent again")
            self._require(answer, "written")

    def require_writable(self) -> None:
        """Begin an upload and cancel it. Raises StepFailure if credentials forbid it."""
        with self._errors():
            started = self._session.ask("POST", f"{self._repository}/blobs/uploads/")
            self._require(started, "written")
            # A registry that cannot cancel drops an upload without content after some time.
            self._session.ask("DELETE", self._upload_location(started))

    def _upload_location(self, started: requests.Response) -> str:
        """The address where the registry wants the content of an upload."""
        given = started.headers.get("Location", "")
        try:
            return urljoin(started.url, given)
        except ValueError as error:
            raise unreachable(
                f"{self.source.registry} wants an upload to continue at {given[:100]!r}, which is not an address: "
                "the step is retried; if this happens again, the registry is at fault"
            ) from error

    def tag(self, content: bytes, reference: str, *, media_type: str = MANIFEST_TYPE) -> None:
        """Upload a manifest, or an index, under a tag, and replace an existing one."""
        with self._errors():
            headers = {"Content-Type": media_type}
            self._require(
                self._session.ask("PUT", self._manifest_url(reference), headers=headers, data=content), "written"
            )

    def _blocks(self, blob: Blob, offset: int) -> Iterator[bytes]:
        """The blob's content from `offset`.

        Raises StepFailure UNSAFE_ARTIFACT if too many bytes arrive.
        """
        if offset >= blob.size:
            return
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with (
            self._errors(),
            self._session.ask("GET", self._blob_url(blob), headers=headers, stream=True) as answer,
        ):
            self._require(answer, "read")
            received = 0 if offset and answer.status_code != 206 else offset
            for block in answer.iter_content(_BLOCK_BYTES):
                # A server that does not support ranges sends everything from the start.
                fresh = block[max(offset - received, 0) :]
                received += len(block)
                if received > blob.size:
                    raise unsafe_artifact(f"{self.source}: {blob.digest} has more than {blob.size} bytes")
                yield fresh

    def _manifest_url(self, reference: str) -> str:
        return f"{self._repository}/manifests/{reference}"

    def _blob_url(self, blob: Blob) -> str:
        return f"{self._repository}/blobs/{blob.digest}"

    def _require(self, answer: requests.Response, done: Literal["read", "written"]) -> None:
        """Raise StepFailure unless the answer is a success. `done` names the request."""
        status = answer.status_code
        if status < 300:
            return
        if is_retryable(status):
            raise unreachable(f"{self.source.registry} answered HTTP {status} for {self.source}")
        raise self._reject(
            f"{self.source} does not exist, or may not be {done} with {self._secret} (HTTP {status}): check the "
            f"address, and set {self._secret.field} to a Secret whose credentials may"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise StepFailure UNREACHABLE for the errors of requests.

        Not their cause, which may quote a signed address.
        """
        try:
            yield
        except requests.RequestException as error:
            raise unreachable(
                f"{self.source.registry} cannot be reached, or broke off, for {self.source} ({type(error).__name__})"
                f"{trouble(self._session.base, str(error))}"
            ) from None


def parse_layers(content: bytes) -> ImageManifest | None:
    """The manifest of an artifact with layers, each an object, or None."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return None
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    return manifest if isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers) else None


def _index(content: bytes | None) -> Index | None:
    """The JSON object in the content, or None for anything else."""
    try:
        found = None if content is None else json.loads(content)
    except (ValueError, RecursionError):
        return None
    return Index(manifests=found.get("manifests")) if isinstance(found, dict) else None


def digest_of(content: bytes) -> str:
    """The content's digest as registries write it, sha256: and the hexadecimal digits."""
    return f"sha256:{sha256(content).hexdigest()}"
