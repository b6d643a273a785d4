"""Reads and writes artifacts of an OCI registry."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from oras.auth.utils import parse_auth_header
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from qlora_api.sources import RegistrySource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration, unreachable, unsafe_artifact
from qlora_trainer.core.filesystem import file_sha256, partial_path
from qlora_trainer.stores.oci_auth import docker_login, parse_token

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MAX_MANIFEST_BYTES = 2**22
"""What the distribution specification asks of a registry to take."""
_PLAIN = "http://"
_TIMEOUTS = (10, 60)
# What is lost of a transfer that is cut off.
_BLOCK_BYTES = 2**16
_TRY_AGAIN_LATER = frozenset({408, 425, 429})
_RETRY = Retry(
    total=4,
    backoff_factor=0.5,
    backoff_max=8,
    # A registry may ask for hours; then the step is tried again instead.
    retry_after_max=30,
    status_forcelist=(408, 429, 500, 502, 503, 504),
    allowed_methods=("GET", "HEAD"),
    raise_on_status=False,
)


@dataclass(frozen=True)
class Blob:
    """A blob as a manifest describes it."""

    digest: str
    """sha256:…"""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Artifact:
    """A manifest and the digest under which the registry has it."""

    digest: str
    manifest: Mapping[str, Any]


class Registry:
    """One repository of a registry that the administrator allows. Methods raise StepFailure.

    What is missing or may not be read or written ends as `refuse` says; a registry in trouble is UNREACHABLE.
    Credentials, and the tokens that are got for them, are sent to the allowed registries only, with TLS unless the
    administrator says otherwise, and never after a redirect.
    """

    def __init__(
        self,
        source: RegistrySource,
        secret: Secret,
        *,
        allowed: tuple[str, ...],
        refuse: Callable[[str], StepFailure],
    ) -> None:
        """`allowed`: HOST or HOST:PORT, with http:// before it where there is no TLS."""
        self.source = source
        self._secret = secret
        self._refuse = refuse
        scheme, places = ("http" if require_allowed(source, allowed) else "https"), frozenset(map(_place, allowed))
        self._base = f"{scheme}://{source.registry}/v2"
        self._repository = f"{self._base}/{source.repository}"
        self._session = requests.Session()
        # No .netrc and no proxies of the environment: they would have credentials and hosts of their own.
        self._session.trust_env = False
        self._session.mount("https://", _Guard(places, secret.field))
        self._session.mount("http://", _Guard(places, secret.field))
        self._login = docker_login(secret, source.registry)
        self._authorization: dict[str, str] = {}

    def manifest(self, reference: str) -> Artifact | None:
        """The manifest of a tag or digest; None if there is none. Its digest is checked."""
        place, headers, content = f"{self._repository}/manifests/{reference}", {"Accept": MANIFEST_TYPE}, b""
        with self._errors(), self._ask("GET", place, headers=headers, stream=True) as answer:
            if answer.status_code == 404:
                return None
            self._require(answer, "read")
            for block in answer.iter_content(_BLOCK_BYTES):
                content += block
                if len(content) > MAX_MANIFEST_BYTES:
                    raise unsafe_artifact(f"{self.source}: its manifest has more than {MAX_MANIFEST_BYTES} bytes")
        digest = digest_of(content)
        if reference.startswith("sha256:") and digest != reference:
            raise unsafe_artifact(f"{self.source}: the registry answered {digest} with {len(content)} bytes")
        manifest = parse_layers(content)
        if manifest is None:
            raise self._refuse(f"{self.source} is no artifact with layers ({MANIFEST_TYPE})")
        return Artifact(digest, manifest)

    def has_blob(self, blob: Blob) -> bool:
        """Whether the registry has the blob with this size."""
        with self._errors():
            answer = self._ask("HEAD", f"{self._repository}/blobs/{blob.digest}")
            if answer.status_code == 404:
                return False
            self._require(answer, "read")
        return answer.headers.get("Content-Length") == str(blob.size)

    def digest(self, blob: Blob) -> str:
        """The digest of the blob's content as it is read back now, of which a block at a time is held."""
        found = sha256()
        for block in self._blocks(blob, 0):
            found.update(block)
        return f"sha256:{found.hexdigest()}"

    def read(self, blob: Blob) -> bytes:
        """The content of a small blob, its digest checked."""
        content = b"".join(self._blocks(blob, 0))
        if digest_of(content) != blob.digest:
            raise unsafe_artifact(f"{self.source}: {blob.digest} has another content than its digest says")
        return content

    def download(self, blob: Blob, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Download to `path`, which is there with this digest or not at all; goes on where an earlier attempt stopped.

        `on_bytes` is called with the bytes of this blob that have arrived. Raises OSError for a full disk.
        """
        if path.is_file() and path.stat().st_size == blob.size:
            return
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
            raise unreachable(f"{self.source}: {path.name} has another SHA-256 than its digest: it is loaded again")
        partial.replace(path)

    def upload(self, blob: Blob, content: Path | bytes) -> None:
        """Upload a blob unless it is there. The registry takes it only if its content has its digest."""
        if self.has_blob(blob):
            return
        with self._errors():
            begun = self._ask("POST", f"{self._repository}/blobs/uploads/")
            self._require(begun, "written")
            location = self._location(begun)
            place = f"{location}{'&' if '?' in location else '?'}digest={blob.digest}"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
            if isinstance(content, bytes):
                answer = self._ask("PUT", place, headers=headers, data=content)
            else:
                with content.open("rb") as file:
                    answer = self._ask("PUT", place, headers=headers, data=file)
            if answer.status_code == 400:
                raise unreachable(f"{self.source}: {blob.digest} did not arrive as it was sent: it is sent again")
            self._require(answer, "written")

    def _location(self, begun: requests.Response) -> str:
        """Where the registry wants an upload to go on."""
        given = begun.headers.get("Location", "")
        try:
            return urljoin(begun.url, given)
        except ValueError as error:
            raise unreachable(
                f"{self.source.registry} wants an upload to go on at {given[:100]!r}, which is no address: it is tried "
                "again, and if that stays so the registry is at fault"
            ) from error

    def tag(self, content: bytes, reference: str) -> None:
        """Upload a manifest under a tag, replacing one that is there."""
        with self._errors():
            headers = {"Content-Type": MANIFEST_TYPE}
            place = f"{self._repository}/manifests/{reference}"
            self._require(self._ask("PUT", place, headers=headers, data=content), "written")

    def _blocks(self, blob: Blob, offset: int) -> Iterator[bytes]:
        if offset >= blob.size:
            return
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._errors():
            place = f"{self._repository}/blobs/{blob.digest}"
            with self._ask("GET", place, headers=headers, stream=True) as answer:
                self._require(answer, "read")
                received = 0 if offset and answer.status_code != 206 else offset
                for block in answer.iter_content(_BLOCK_BYTES):
                    # A server that knows no ranges sends again what is there.
                    fresh = block[max(offset - received, 0) :]
                    received += len(block)
                    if received > blob.size:
                        raise unsafe_artifact(f"{self.source}: {blob.digest} has more than {blob.size} bytes")
                    yield fresh

    def _ask(self, method: str, url: str, **options: Any) -> requests.Response:
        """Send a request, and again with what the registry asks for if it wants to know who we are."""
        headers = options.pop("headers", {})
        answer = self._send(method, url, headers, options)
        if answer.status_code != 401 or not self._authenticate(answer):
            return answer
        answer.close()
        if hasattr(options.get("data"), "seek"):
            options["data"].seek(0)
        return self._send(method, url, headers, options)

    def _send(self, method: str, url: str, headers: dict[str, str], options: dict[str, Any]) -> requests.Response:
        return self._session.request(
            method, url, headers={**headers, **self._authorization}, timeout=_TIMEOUTS, **options
        )

    def _authenticate(self, challenge: requests.Response) -> bool:
        """Whether there is an answer to the challenge that was not given yet: credentials, or a token got for them."""
        before = self._authorization
        if challenge.headers.get("WWW-Authenticate", "").lower().startswith("basic"):
            self._authorization = {"Authorization": f"Basic {self._login}"} if self._login else {}
        else:
            token = self._token(challenge.headers.get("WWW-Authenticate", ""))
            self._authorization = {"Authorization": f"Bearer {token}"} if token else {}
        return self._authorization not in ({}, before)

    def _token(self, challenge: str) -> str | None:
        """What the server that the challenge names gives for our credentials, or without any; None if it gives nothing.

        Not by the library, which takes a server in trouble for one that refuses, and waits for one that is silent.
        """
        wanted = parse_auth_header(challenge)
        if not (wanted.realm or "").startswith(("https://", _PLAIN)):
            return None
        parameters = {"service": wanted.service, "scope": wanted.scope}
        headers = {"Authorization": f"Basic {self._login}"} if self._login else {}
        answer = self._session.get(wanted.realm, params=parameters, headers=headers, timeout=_TIMEOUTS)
        if answer.status_code >= 500 or answer.status_code in _TRY_AGAIN_LATER:
            raise unreachable(f"{urlsplit(wanted.realm).netloc} answered HTTP {answer.status_code} for a token")
        if answer.status_code != 200:
            return None
        given = parse_token(answer.content)
        if given is None:
            raise unreachable(
                f"{urlsplit(wanted.realm).netloc} answered HTTP 200 for a token of {self.source.registry}, but with "
                "something else than a JSON object that holds one"
            )
        return given

    def _require(self, answer: requests.Response, wanted: str) -> None:
        status = answer.status_code
        if status < 300:
            return
        if status >= 500 or status in _TRY_AGAIN_LATER:
            raise unreachable(f"{self.source.registry} answered HTTP {status} for {self.source}")
        raise self._refuse(
            f"{self.source} does not exist, or may not be {wanted} with {self._secret} (HTTP {status}): check the "
            f"address, and set {self._secret.field} to a Secret whose credentials may"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except requests.RequestException as error:
            raise unreachable(
                f"{self.source.registry} cannot be reached, or broke off, for {self.source} ({type(error).__name__})"
            ) from None


def parse_layers(content: bytes) -> Mapping[str, Any] | None:
    """The manifest of an artifact with layers, each an object; None for anything else."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return None
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    return manifest if isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers) else None


class _Guard(HTTPAdapter):
    """Sends requests, those with credentials to some places only. The session takes them off before a redirect."""

    def __init__(self, places: frozenset[str], field: str) -> None:
        """`places`: scheme and host, as in https://ghcr.io."""
        super().__init__(max_retries=_RETRY)
        self._places = places
        self._field = field

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        address = urlsplit(request.url or "")
        place = f"{address.scheme}://{address.netloc}"
        if "Authorization" in request.headers and place not in self._places:
            raise bad_configuration(
                f"the registry sends us to {place}, where the credentials of {self._field} are not sent: ask the "
                "administrator to add it to the profile's registries"
            )
        return super().send(request, *args, **options)


def require_allowed(source: RegistrySource, allowed: tuple[str, ...]) -> bool:
    """Raise StepFailure BAD_CONFIGURATION unless the registry is among those allowed; whether it is without TLS."""
    for entry in allowed:
        if _host(entry) == source.registry:
            return entry.startswith(_PLAIN)
    raise bad_configuration(
        f"{source}: the registry {source.registry} is not among those that the profile allows "
        f"({', '.join(map(_host, allowed)) or 'none'}): use one of them, or ask the administrator for it"
    )


def _host(entry: str) -> str:
    return entry.removeprefix(_PLAIN)


def _place(entry: str) -> str:
    return entry if entry.startswith(_PLAIN) else f"https://{entry}"


def digest_of(content: bytes) -> str:
    """The digest by which a registry knows the content."""
    return f"sha256:{sha256(content).hexdigest()}"
