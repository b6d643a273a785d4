"""Reads and writes objects of a bucket: S3, Google Cloud Storage, or Azure."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest, new, sha256
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from qlora_api.sources import SCHEMES, ObjectStoreSource, series
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration, unreachable
from qlora_trainer.core.filesystem import partial_path
from qlora_trainer.stores.bucket import Bucket
from qlora_trainer.stores.clouds import OPEN
from qlora_trainer.stores.retry import is_retryable

if TYPE_CHECKING:
    from obstore import GetOptions

_PART_BYTES = 2**23
_BLOCK_BYTES = 2**20
# The ETag of an object that was uploaded in one part, in S3 and GCS: its MD5. That of a multipart upload ends in the
# number of parts.
_PLAIN_ETAG = re.compile(r'"?([0-9a-f]{32})"?', re.IGNORECASE)
_STATUS = re.compile(r"status code: (\d{3})")
_MOVED = "redirect without LOCATION"
_ERROR_CODE = re.compile(r"<Code>(\w{1,64})</Code>")


@dataclass(frozen=True)
class StoredObject:
    """An object, as the listing of its folder describes it."""

    name: str
    """Below the folder."""
    size: int
    """Bytes."""
    etag: str
    """Differs if the content does. No digest: a multipart upload's has the parts."""


def version_of(objects: Mapping[str, StoredObject]) -> str:
    """A name, in hexadecimal, for these objects' names, sizes and ETags."""
    lines = (f"{found.etag} {found.size} {name}\n" for name, found in sorted(objects.items()))
    return sha256("".join(lines).encode()).hexdigest()


def _open(source: ObjectStoreSource, secret: Secret) -> Bucket:
    """Open the bucket. Raises StepFailure BAD_CONFIGURATION for bad credentials."""
    try:
        return OPEN[source.scheme](source.bucket, secret)
    except BaseError:
        raise bad_configuration(
            f"{source} cannot be opened with {secret}: {SCHEMES[source.scheme].credential} must be as the "
            "store issues it; store it again, whole and once encoded in base64"
        ) from None


class ObjectFolder:
    """An object, or the objects below a prefix, of one bucket. Methods raise StepFailure.

    Missing or forbidden objects end as in `reject`. A store in trouble is UNREACHABLE.
    """

    def __init__(self, source: ObjectStoreSource, secret: Secret, *, reject: Callable[[str], StepFailure]) -> None:
        """Open the store. Its address is in environment variables, set by the profile."""
        self.uri = str(source)
        self._prefix = source.path
        self._secret = secret
        self._reject = reject
        self._bucket = _open(source, secret)
        self._settings = series((".".join(setting.path) for setting in SCHEMES[source.scheme].settings), "and")
        self._endpoint, self._store = self._bucket.endpoint, self._bucket.store
        self.address = f"{self._endpoint}/{source.bucket}/{source.path}"

    def list(self) -> dict[str, StoredObject]:
        """The objects below the prefix, by their names below it, without its object."""
        with self._errors("listed"):
            found = [entry for page in obstore.list(self._store, f"{self._prefix}/") for entry in page]
        entries = ((entry["path"].removeprefix(f"{self._prefix}/"), entry) for entry in found)
        return {
            name: StoredObject(name, entry["size"], entry["e_tag"] or "")
            for name, entry in entries
            if name not in ("", ".")
        }

    def stat(self, name: str = "") -> StoredObject:
        """The object of this name, or, without one, the one at the address itself."""
        with self._errors("read"):
            entry = obstore.head(self._store, self._key(name))
        return StoredObject(name, entry["size"], entry["e_tag"] or "")

    def download(self, found: StoredObject, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Download to `path`, which is then complete or not there, from where an earlier attempt was cut off.

        `on_bytes` is called with the bytes of this object that have arrived. Raises OSError for a full disk.

        The content is compared with the ETag if that is the MD5 of an object that was uploaded in one part. Of others,
        and in Azure, only the size is: the client gives no access to other checksums of the stores.
        """
        if path.is_file() and path.stat().st_size == found.size:
            return
        # The ETag is in the name, so that parts of two versions are never joined.
        partial = partial_path(path.with_name(f"{path.name}.{sha256(found.etag.encode()).hexdigest()[:16]}"))
        with partial.open("ab") as file:
            if file.tell() < found.size:
                for block in self._blocks(found, file.tell()):
                    file.write(block)
                    on_bytes(file.tell())
            file.flush()
            os.fsync(file.fileno())
            received = file.tell()
        wrong = None
        if received != found.size:
            wrong = f"{received} bytes instead of {found.size}"
        elif not self._is_as_stored(found, partial):
            wrong = "another MD5 than its ETag"
        if wrong is not None:
            partial.unlink()
            raise unreachable(f"{self._object_name(found.name)} arrived with {wrong}: it is downloaded again")
        partial.replace(path)

    def digest(self, name: str) -> str:
        """SHA-256, in hexadecimal, of the object's content as the store sends it now."""
        return self._digest(self.stat(name), "sha256")

    def read(self, name: str, *, most: int) -> bytes | None:
        """The content of an object; None without it, or if it has more than `most` bytes."""
        with self._errors("read"):
            try:
                found = obstore.get(self._store, self._key(name))
            except FileNotFoundError:
                return None
            return bytes(found.bytes()) if found.meta["size"] <= most else None

    def write(self, name: str, content: Path | bytes) -> None:
        """Upload or replace an object. It becomes visible complete or not at all."""
        with self._errors("written"):
            obstore.put(self._store, self._key(name), content, chunk_size=_PART_BYTES, max_concurrency=2)

    def create(self, name: str, content: bytes) -> bool:
        """Upload a small object unless its name exists. Returns whether it was new."""
        with self._errors("written"):
            try:
                obstore.put(self._store, self._key(name), content, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""
        with self._errors("written"), suppress(FileNotFoundError):
            # S3 answers as if there had been one, Google and Azure do not.
            obstore.delete(self._store, self._key(name))

    def _is_as_stored(self, found: StoredObject, path: Path) -> bool:
        """Whether the file is the object, as far as its ETag shows.

        A store that encrypts with separate keys (SSE-KMS) has ETags that look like an MD5 but are not. So if they
        differ, the object is read a second time: content that arrives the same twice is what the store has.
        """
        expected = _PLAIN_ETAG.fullmatch(found.etag)
        if expected is None:
            return True
        with path.open("rb") as file:
            arrived = file_digest(file, lambda: new("md5", usedforsecurity=False)).hexdigest()
        return arrived == expected[1].lower() or arrived == self._digest(found, "md5")

    def _digest(self, found: StoredObject, algorithm: str) -> str:
        # Against accidents only: a machine that forbids MD5 for security allows this.
        digest = new(algorithm, usedforsecurity=False)
        for block in self._blocks(found, 0):
            digest.update(block)
        return digest.hexdigest()

    def _blocks(self, found: StoredObject, offset: int) -> Iterator[bytes]:
        options: GetOptions = {"range": {"offset": offset}} if offset else {}
        if found.etag:
            options["if_match"] = found.etag
        with self._errors("read"):
            try:
                for block in obstore.get(self._store, self._key(found.name), options=options).stream(_BLOCK_BYTES):
                    yield bytes(block)
            except PreconditionError as error:
                raise unreachable(
                    f"{self._object_name(found.name)} was replaced while it was read: it is downloaded again"
                ) from error

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if name else self._prefix

    def _object_name(self, name: str) -> str:
        return f"{self.uri}/{name}" if name else self.uri

    @contextmanager
    def _errors(self, wanted: str) -> Iterator[None]:
        """Translate the client's errors."""
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            raise self._failure(str(error), wanted) from None

    def _failure(self, text: str, wanted: str) -> StepFailure:
        found, code = _STATUS.search(text), _ERROR_CODE.search(text)
        status = int(found[1]) if found else None
        answer = f"HTTP {status}" + (f" ({code[1]})" if code else "")
        if status is None and self._bucket.route.was_left(text):
            return bad_configuration(
                f"{self._endpoint} redirects {self.uri} to another host, where credentials are never sent: ask the "
                f"administrator to set {self._settings} of the profile"
            )
        if _MOVED in text or (status is not None and status < 400):
            return bad_configuration(
                f"the bucket of {self.uri} is not at {self._endpoint}: ask the administrator to set "
                f"{self._settings} of the profile"
            )
        if status is None:
            trouble = self._bucket.route.trouble(text)
            return unreachable(f"{self._endpoint} cannot be reached, or broke off, for {self.uri}{trouble}")
        if status == 501:
            return bad_configuration(
                f"{self._endpoint} does not support a request for {self.uri} ({answer}): it must support "
                "conditional writes (If-None-Match); use a newer version of the server, or another store"
            )
        if is_retryable(status, conflicts=True):
            return unreachable(f"{self._endpoint} answered {answer} for {self.uri}")
        if self._bucket.access.by_identity:
            given, advice = "the pod's cloud identity", "ask the administrator for the right, or set"
        else:
            given, advice = str(self._secret), "set"
        return self._reject(
            f"{self.uri} does not exist, or may not be {wanted} with {given} ({answer} from {self._endpoint}): check "
            f"bucket and path, and {advice} {self._secret.field} to a Secret whose credentials may"
        )
