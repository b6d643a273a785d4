"""Reads and writes repositories of the Hugging Face Hub."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from time import sleep
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download, hf_hub_url
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

from qlora_trainer.core.failures import StepFailure, bad_configuration, bad_dataset, model_unavailable, unreachable
from qlora_trainer.core.filesystem import is_full
from qlora_trainer.stores.contents import Contents
from qlora_trainer.stores.endpoints import server_address

RepositoryKind = Literal["model", "dataset"]
_TIMEOUT_SECONDS = 30.0
# 409 and 412: somebody else has committed meanwhile.
_TRY_AGAIN_LATER = frozenset({408, 409, 412, 425, 429})
_BLOCK_BYTES = 2**20
_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try, of what the client tries once; a longer trouble is for the step's next attempt."""
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


class Hub:
    """A hub and what it lets us read. Methods raise StepFailure, and OSError only for a full disk.

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
        """`endpoint`: address of the hub; HF_ENDPOINT, or the public one, if None. `token` is sent to it only.

        `field` names, for messages, what the token comes from; `writes` says what it is for.
        """
        self._token = token
        self._field = field
        self._writes = writes
        self._api = HfApi(endpoint=endpoint or server_address(os.environ, "HF_ENDPOINT"), token=token)

    def list(self, kind: RepositoryKind, repository: str, revision: str | None) -> Listing:
        """The files of the repository at the commit that `revision` (None: the default branch) stands for now."""
        with self._errors(kind, repository, revision):
            ask = self._api.model_info if kind == "model" else self._api.dataset_info
            info = _outlast(lambda: ask(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS))
        files = {
            entry.rfilename: HubFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
            for entry in info.siblings or ()
            # A name that leads out of the folder it is downloaded to does not exist for us.
            if not entry.rfilename.startswith("/") and ".." not in entry.rfilename.split("/")
        }
        return Listing(kind, repository, info.sha, files)

    def fetch(self, listing: Listing, file: HubFile, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        """Download one file into `folder`, going on where an earlier attempt stopped; returns its path.

        `on_bytes` is called with the bytes of this file that have arrived so far.
        """
        with self._errors(listing.kind, listing.repository, listing.commit):
            path = _outlast(
                lambda: hf_hub_download(
                    listing.repository,
                    file.name,
                    repo_type=listing.kind,
                    revision=listing.commit,
                    local_dir=folder,
                    token=self._token,
                    endpoint=self._api.endpoint,
                    tqdm_class=_byte_counter(on_bytes),
                )
            )
        return Path(path)

    def digest(self, listing: Listing, file: HubFile) -> str:
        """SHA-256 of the file's content as it is read back now, of which a block at a time is held, in hexadecimal."""
        address = hf_hub_url(
            listing.repository,
            file.name,
            repo_type=listing.kind,
            revision=listing.commit,
            endpoint=self._api.endpoint,
        )
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

    def find(self, repository: str) -> Listing | None:
        """The files of a model's repository on its default branch; None if there is none that the token may see."""
        try:
            return self.list("model", repository, None)
        except StepFailure as failure:
            # A gated repository, whose error is of a class below this one, exists.
            if type(failure.__cause__) is RepositoryNotFoundError:
                return None
            raise

    def make(self, repository: str) -> Listing:
        """Make a model's repository, a private one, unless there is one; returns its files."""
        with self._errors("model", repository, None):
            self._api.create_repo(repository, private=True, exist_ok=True)
        return self.list("model", repository, None)

    def commit(self, repository: str, files: Contents, message: str, *, parent: str) -> str:
        """Commit all these files at once to a model's repository; returns the commit.

        `parent` is the commit that they were decided upon, so that nobody else's is overwritten.
        """
        with self._errors("model", repository, None), ExitStack() as opened:
            # Given as open files they go over Git LFS, which every hub speaks; by path the client insists on Xet.
            streams = {
                name: BytesIO(content) if isinstance(content, bytes) else opened.enter_context(content.open("rb"))
                for name, content in files.items()
            }
            operations = [CommitOperationAdd(name, stream) for name, stream in streams.items()]
            made = self._api.create_commit(repository, operations, commit_message=message, parent_commit=parent)
        return str(made.oid)

    @contextmanager
    def _errors(self, kind: RepositoryKind, repository: str, revision: str | None) -> Iterator[None]:
        """Translate what the client raises."""
        try:
            yield
        except HFValidationError as error:
            raise bad_configuration(f"hf://{repository}: {error}") from error
        except OfflineModeIsEnabled as error:
            raise bad_configuration(
                f"hf://{repository} cannot be read because HF_HUB_OFFLINE is set: unset it, or use a pvc:// source"
            ) from error
        except HTTPError as error:
            raise self._http_failure(error, kind, repository, revision) from error
        except OSError as error:
            if is_full(error):
                raise
            # The client wraps the answer to its first request for a file.
            if isinstance(error.__cause__, HTTPError):
                raise self._http_failure(error.__cause__, kind, repository, revision) from error
            raise unreachable(f"the transfer of hf://{repository} was cut off: {error}") from error
        except (RuntimeError, ValueError) as error:
            # What the accelerated transfer raises, and what an answer that is not JSON leads to.
            raise unreachable(f"{self._api.endpoint} did not answer as a hub: {str(error)[:200]}") from error

    def _http_failure(
        self, error: HTTPError, kind: RepositoryKind, repository: str, revision: str | None
    ) -> StepFailure:
        refuse = bad_configuration if self._writes else model_unavailable if kind == "model" else bad_dataset
        name = f"{kind} hf://{repository}"
        done = "written" if self._writes else "read"
        token = f"the token of {self._field}" if self._token else f"no token ({self._field})"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, GatedRepoError):
            return refuse(
                f"{name} is gated and was asked for with {token}: accept its terms at "
                f"{self._api.endpoint}/{repository} and set {self._field} to a read token of that account"
            )
        if isinstance(error, RevisionNotFoundError):
            return refuse(f"{name} has no revision {revision!r}: name a branch, tag or commit that exists")
        if isinstance(error, DisabledRepoError):
            return refuse(f"{name} has been disabled by the hub: use another one")
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
            return refuse(
                f"{name} does not exist, or may not be {done} with {token} (HTTP {status}): check the name, and set "
                f"{self._field} to a token with which it may be {done}"
            )
        if status is not None and status < 500 and status not in _TRY_AGAIN_LATER:
            return refuse(f"{name} was refused by {self._api.endpoint} with HTTP {status}: check its name")
        found = f"answered HTTP {status}" if status else f"cannot be reached ({type(error).__name__}: {error})"
        return unreachable(f"{self._api.endpoint} {found} for {name}")


def hub_token(token_file: Path, secret: str | None) -> str | None:
    """The read token: mounted from a Secret, else the one of the user who is logged in here, else None.

    `secret` names the Secret and key that the job refers to; it may be created after the job, so its absence is
    UNREACHABLE.
    """
    if token_file.is_file():
        return token_file.read_text().strip()
    token: str | None = get_token()
    if token is None and secret is not None:
        raise unreachable(f"{secret} (spec.model.tokenSecretRef) does not exist in the job's namespace")
    return token


def _outlast(ask: Callable[[], _Answer]) -> _Answer:
    """The answer to a request that only reads, asked for again while the hub is in trouble or wants less to do."""
    for wait in _WAITS:
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code < 500 and error.response.status_code not in _TRY_AGAIN_LATER:
                raise
        sleep(wait)
    return ask()


def _byte_counter(on_bytes: Callable[[int], None]) -> type[Any]:
    """A progress bar, as the client wants it, that calls `on_bytes`. It may open two for a file; the larger counts."""
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
