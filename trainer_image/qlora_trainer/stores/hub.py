"""Reads and writes repositories of the Hugging Face Hub."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from qlora_api.printable import first_line
from qlora_trainer.core.failures import StepFailure, bad_configuration, bad_dataset, model_unavailable, unreachable
from qlora_trainer.core.filesystem import file_sha256, is_full
from qlora_trainer.core.network import trouble
from qlora_trainer.stores.contents import Contents
from qlora_trainer.stores.endpoints import server_address
from qlora_trainer.stores.retry import is_retryable, retry

RepositoryKind = Literal["model", "dataset"]
_TIMEOUT_SECONDS = 30.0
_BLOCK_BYTES = 2**20
_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try of what the hub's own client tries only once."""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as its listing describes it."""

    name: str
    size: int
    """Bytes."""
    sha256: str | None
    """Of the content, where the hub knows it (large files)."""


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    kind: RepositoryKind
    repository: str
    commit: str
    files: dict[str, HubFile]


@dataclass(frozen=True)
class HubRequest:
    """A request to a hub, as far as a message about its failure needs it."""

    hub: "Hub"
    kind: RepositoryKind
    repository: str
    revision: str | None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise StepFailure for any client error in the body, OSError for a full disk."""
        try:
            yield
        except HFValidationError as error:
            raise bad_configuration(f"hf://{self.repository}: {error}") from error
        except OfflineModeIsEnabled as error:
            raise bad_configuration(
                f"hf://{self.repository} cannot be read because HF_HUB_OFFLINE is set: unset it, or use a pvc:// source"
            ) from error
        except HTTPError as error:
            raise self._http_failure(error) from error
        except OSError as error:
            if is_full(error):
                raise
            # The client wraps the answer to its first request for a file.
            if isinstance(error.__cause__, HTTPError):
                raise self._http_failure(error.__cause__) from error
            raise unreachable(f"the transfer of hf://{self.repository} was cut off: {first_line(error)}") from error
        except (RuntimeError, ValueError) as error:
            # From the accelerated transfer (Xet), or from parsing an answer that is not JSON.
            raise unreachable(f"{self.hub.endpoint} did not answer as a hub: {first_line(error)}") from error

    def _http_failure(self, error: HTTPError) -> StepFailure:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        rejected = self._rejection(error, status)
        if rejected is not None:
            permanent = (
                bad_configuration if self.hub.writes else model_unavailable if self.kind == "model" else bad_dataset
            )
            return permanent(rejected)
        found = f"answered HTTP {status}" if status else f"cannot be reached ({type(error).__name__}: {error})"
        return unreachable(f"{self.hub.endpoint} {found} for {self._name}{trouble(self.hub.endpoint, str(error))}")

    @property
    def _name(self) -> str:
        return f"{self.kind} hf://{self.repository}"

    def _rejection(self, error: HTTPError, status: int | None) -> str | None:
        """Why the hub will never do this, or None if it may later."""
        token = f"the token of {self.hub.field}" if self.hub.has_token else f"no token ({self.hub.field})"
        done = "written" if self.hub.writes else "read"
        # Its class is below that of a repository that does not exist, so that it comes first.
        if isinstance(error, GatedRepoError):
            return (
                f"{self._name} is gated and was asked for with {token}: accept its terms at "
                f"{self.hub.endpoint}/{self.repository} and set {self.hub.field} to a read token of that account"
            )
        if isinstance(error, RevisionNotFoundError):
            return f"{self._name} has no revision {self.revision!r}: name a branch, tag or commit that exists"
        if isinstance(error, DisabledRepoError):
            return f"{self._name} has been disabled by the hub: use another one"
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
            return (
                f"{self._name} does not exist, or may not be {done} with {token} (HTTP {status}): check the name, and "
                f"set {self.hub.field} to a token that allows it"
            )
        # Conflicts too: another client has committed, and the next attempt decides again.
        if status is not None and not is_retryable(status, conflicts=True):
            return f"{self._name} was rejected by {self.hub.endpoint} with HTTP {status}: check its name"
        return None


class Hub:
    """A hub, with the token that opens it. Methods raise StepFailure, and OSError only for a full disk.

    A repository that is missing, gated or forbidden is MODEL_UNAVAILABLE (a data set: BAD_DATASET) when it is read and
    BAD_CONFIGURATION when it is written; an unreachable hub is UNREACHABLE.
    """

    def __init__(
        self,
        token: str | None,
        *,
        endpoint: str | None = None,
        field: str = "spec.model.tokenSecretRef",
        writes: bool = False,
    ) -> None:
        """`endpoint`: address of the hub. None: HF_ENDPOINT, or the public one. `token` is sent to it only.

        For messages: `field` is the field of the spec that the token comes from, `writes` what it is for.
        """
        self._token = token
        self.has_token = bool(token)
        self.field = field
        self.writes = writes
        self._api = HfApi(endpoint=endpoint or server_address(os.environ, "HF_ENDPOINT"), token=token)
        self.endpoint: str = self._api.endpoint

    def list(self, kind: RepositoryKind, repository: str, revision: str | None) -> Listing:
        """The files at the current commit of `revision`, or of the default branch."""
        ask = self._api.model_info if kind == "model" else self._api.dataset_info
        with self._errors(kind, repository, revision):
            info = _retry(lambda: ask(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS))
        files = {
            entry.rfilename: HubFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
            for entry in info.siblings or ()
            # Others would leave their download folder.
            if not entry.rfilename.startswith("/") and ".." not in entry.rfilename.split("/")
        }
        return Listing(kind, repository, info.sha, files)

    def fetch(
        self, listing: Listing, file: HubFile, folder: Path, on_bytes: Callable[[int], None] = lambda _: None
    ) -> Path:
        """Download one file into `folder`, from where an earlier attempt stopped, and return its path.

        `on_bytes` is called with the bytes of this file that have arrived so far. Raises StepFailure UNREACHABLE, and
        removes the file, unless its size and SHA-256 are those that the hub lists.
        """
        with self._errors(listing.kind, listing.repository, listing.commit):
            downloaded = _retry(
                lambda: hf_hub_download(
                    listing.repository,
                    file.name,
                    repo_type=listing.kind,
                    revision=listing.commit,
                    local_dir=folder,
                    token=self._token,
                    endpoint=self.endpoint,
                    tqdm_class=_byte_counter(on_bytes),
                )
            )
        path = Path(downloaded)
        wrong = _difference(path, file)
        if wrong is not None:
            path.unlink()
            raise unreachable(f"hf://{listing.repository}/{file.name} arrived with {wrong}: it is downloaded again")
        return path

    def digest(self, listing: Listing, file: HubFile) -> str:
        """SHA-256, in hexadecimal, of the file's content as the hub sends it now."""
        address = self._address(listing, file)
        headers, found = build_hf_headers(token=self._token), sha256()
        with (
            self._errors(listing.kind, listing.repository, listing.commit),
            http_stream_backoff(
                "GET", address, headers=headers, timeout=_TIMEOUT_SECONDS, retry_on_exceptions=()
            ) as answer,
        ):
            hf_raise_for_status(answer)
            for block in answer.iter_bytes(_BLOCK_BYTES):
                found.update(block)
        return found.hexdigest()

    def require_readable(self, listing: Listing, file: HubFile) -> None:
        """Ask for the file without its content, as the hub decides who may read it."""
        with self._errors(listing.kind, listing.repository, listing.commit):
            _retry(
                lambda: get_hf_file_metadata(
                    self._address(listing, file),
                    token=self._token,
                    timeout=_TIMEOUT_SECONDS,
                    endpoint=self.endpoint,
                )
            )

    def find(self, repository: str, revision: str | None = None) -> Listing | None:
        """Return files at the revision, or None if the token sees no such model."""
        try:
            return self.list("model", repository, revision)
        except StepFailure as failure:
            # A gated repository exists; the class of its error is below this one.
            if type(failure.__cause__) is RepositoryNotFoundError:
                return None
            raise

    def make(self, repository: str) -> Listing:
        """Create a private model repository unless it exists, and return its files."""
        with self._errors("model", repository, None):
            self._api.create_repo(repository, private=True, exist_ok=True)
        return self.list("model", repository, None)

    def require_writable(self, repository: str) -> None:
        """Raise StepFailure if the token may not write to the model repository, or is for reading only.

        Whether a token with fine-grained rights may make a repository shows only when it does.
        """
        with self._errors("model", repository, None):
            try:
                _retry(lambda: self._api.auth_check(repository, write=True))
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                if self._role() in (None, "read"):
                    raise bad_configuration(
                        f"hf://{repository} does not exist and no token, or one for reading only, is to make it: set "
                        f"{self.field} to a Secret whose token may write"
                    ) from None

    def _role(self) -> str | None:
        if not self._token:
            return None
        found = _retry(self._api.whoami)
        return str(found.get("auth", {}).get("accessToken", {}).get("role", ""))

    def commit(
        self, repository: str, files: Contents, message: str, *, parent: str, without: Sequence[str] = ()
    ) -> str:
        """Commit all these files together to a model repository, delete those in `without`, and return the commit.

        `parent` is the commit that the caller has read. If another one has come since, the hub rejects this one, so
        that no other client's files are overwritten.
        """
        with self._errors("model", repository, None), ExitStack() as opened:
            # As open files they go over Git LFS, which every hub supports; given by path the client insists on Xet.
            streams = {
                name: BytesIO(content) if isinstance(content, bytes) else opened.enter_context(content.open("rb"))
                for name, content in files.items()
            }
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(CommitOperationAdd(name, stream) for name, stream in streams.items()),
                *(CommitOperationDelete(name) for name in without),
            ]
            made = self._api.create_commit(repository, operations, commit_message=message, parent_commit=parent)
        return str(made.oid)

    def _address(self, listing: Listing, file: HubFile) -> str:
        return hf_hub_url(
            listing.repository,
            file.name,
            repo_type=listing.kind,
            revision=listing.commit,
            endpoint=self.endpoint,
        )

    def _errors(self, kind: RepositoryKind, repository: str, revision: str | None) -> AbstractContextManager[None]:
        return HubRequest(self, kind, repository, revision).errors()


def hub_token(token_file: Path, secret: str | None) -> str | None:
    """The read token: mounted from a Secret, else that of the user who is logged in on this machine, else None.

    `secret` names the Secret and key that the job refers to. Raises StepFailure UNREACHABLE if neither exists: the
    Secret may be created after the job.
    """
    if token_file.is_file():
        return token_file.read_text().strip()
    token: str | None = get_token()
    if token is None and secret is not None:
        raise unreachable(f"{secret} (spec.model.tokenSecretRef) does not exist in the job's namespace")
    return token


def _difference(path: Path, file: HubFile) -> str | None:
    size = path.stat().st_size
    if size != file.size:
        return f"{size} bytes, but the hub lists {file.size}"
    if file.sha256 is not None and file_sha256(path) != file.sha256:
        return "another SHA-256 than the hub lists"
    return None


def _retry(ask: Callable[[], _Answer]) -> _Answer:
    def can_retry(error: Exception) -> bool:
        return isinstance(error, HfHubHTTPError) and is_retryable(error.response.status_code, conflicts=True)

    return retry(ask, waits=_WAITS, retryable=can_retry)


def _byte_counter(on_bytes: Callable[[int], None]) -> type[object]:
    """A progress bar class for the client, which calls `on_bytes`."""
    largest = 0

    class ByteCounter:
        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            self._received = initial

        def __enter__(self) -> "ByteCounter":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def update(self, count: float | None = 1) -> None:
            nonlocal largest
            self._received += int(count or 0)
            largest = max(largest, self._received)
            on_bytes(largest)

    return ByteCounter
