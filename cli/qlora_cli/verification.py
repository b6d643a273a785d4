"""Checks the files of an adapter against its lineage, and the lineage's signature."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from qlora_api.lineage import SIGNED_FILE, UNSIGNED_FILE, Lineage, Statement
from qlora_api.printable import one_line, printable
from qlora_api.sources import RegistrySource, parse_source
from qlora_cli.local.run import allowed_registries
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.publishing.signing import (
    BUNDLE_TYPE,
    PAYLOAD_TYPE,
    PublicKey,
    payload_of,
    read_public_key,
    verify_bundle,
)

_MAX_LINEAGE_BYTES = 2**22
# It lists the lineage among the files, so the lineage cannot list it.
_NOT_STATED = frozenset({SIGNED_FILE, UNSIGNED_FILE, PUBLISHED_MANIFEST})


class NotVerified(Exception):  # noqa: N818 - what was found, not an error of the program
    """The adapter differs from its lineage, or has none, as the message explains."""


@dataclass(frozen=True)
class Adapter:
    """Files of an adapter, and its statements: several, also by other users."""

    folder: Path
    signed: tuple[bytes, ...]
    """Bundles."""
    unsigned: tuple[bytes, ...]
    """Statements by themselves."""
    artifact_sha256: str | None = None
    """Of the artifact in a registry that holds the files."""
    looked_at: int | None = None
    """Number of attachments of the artifact that were read; None for all of them."""


@dataclass(frozen=True)
class Verified:
    """An adapter whose files are those that its lineage states."""

    lineage: Lineage
    files: Mapping[str, str]
    """SHA-256 of each, in hexadecimal, by name."""
    by_key: bool
    """Whether the given key has signed the lineage. Otherwise any user may have written it."""
    document: bytes
    """The bundle, or the unsigned statement, that the lineage is from."""


def verify(address: str, key: Path | None) -> Verified:
    """Check the adapter in a folder or at hf://, s3:// or oci://, which is downloaded for that.

    Raises NotVerified; ValueError for a key or an address that cannot be used; OSError; and StepFailure for a server.
    """
    public = None if key is None else read_public_key(key.read_bytes())
    with _opened(address) as adapter:
        return check(adapter, address, public)


def check(adapter: Adapter, address: str, key: PublicKey | None) -> Verified:
    """Compare the files with the statement, signed with the key if any. Raises NotVerified."""
    document, statement = _statement(adapter, address, key)
    digests = {subject.name: subject.digest.get("sha256", "") for subject in statement.subject}
    files = {name: digest for name, digest in digests.items() if "://" not in name}
    _compare(adapter.folder, files)
    return Verified(statement.predicate, files, by_key=key is not None, document=document)


def _statement(adapter: Adapter, address: str, key: PublicKey | None) -> tuple[bytes, Statement]:
    """Return a document and its statement, signed with the key if any. Raises NotVerified."""
    if key is None:
        candidates = [*_payloads(adapter.signed, payload_of), *_payloads(adapter.unsigned, lambda content: content)]
    else:
        candidates = [*_payloads(adapter.signed, lambda bundle: verify_bundle(bundle, key))]
    if not adapter.signed and (key is not None or not adapter.unsigned):
        wanted = SIGNED_FILE if key is not None else f"{SIGNED_FILE} or {UNSIGNED_FILE}"
        raise NotVerified(f"{address} has no {'signed ' if key else ''}lineage ({wanted}){_overlooked(adapter)}")
    statements, reasons = _parsed(candidates)
    if not statements:
        raise NotVerified(f"the lineage does not verify: {reasons[0]}{_overlooked(adapter)}")
    # A user who may push can attach a statement of the same key about another artifact.
    found = next((each for each in statements if _is_about(each[1], adapter)), None)
    if found is None:
        artifact = f"sha256:{adapter.artifact_sha256}"
        raise NotVerified(f"the lineage is about another artifact than {artifact}{_overlooked(adapter)}")
    return found


def _parsed(candidates: Iterable[tuple[bytes, bytes | str]]) -> tuple[list[tuple[bytes, Statement]], list[str]]:
    """Return the documents with a statement among them, and the reasons against the others."""
    statements: list[tuple[bytes, Statement]] = []
    reasons: list[str] = []
    for document, payload in candidates:
        if isinstance(payload, str):
            reasons.append(payload)
            continue
        try:
            statements.append((document, Statement.model_validate_json(payload)))
        except ValidationError:
            reasons.append("it is not a statement of this kind, or of a later release")
    return statements, reasons


def _is_about(statement: Statement, adapter: Adapter) -> bool:
    """Whether it names the artifact that holds the files, if one does."""
    artifacts = {subject.digest.get("sha256") for subject in statement.subject if "://" in subject.name}
    return adapter.artifact_sha256 is None or adapter.artifact_sha256 in artifacts


def _overlooked(adapter: Adapter) -> str:
    """A note for a registry with more attachments than were read."""
    if adapter.looked_at is None:
        return ""
    return (
        f"; only the first {adapter.looked_at} of what is attached to the artifact were looked at, and the registry "
        "lists more, among which it may be: delete what others have attached"
    )


def _payloads(documents: Iterable[bytes], read: Callable[[bytes], bytes]) -> Iterator[tuple[bytes, bytes | str]]:
    """Yield each with the result of `read`, or its error."""
    for document in documents:
        try:
            yield document, read(document)
        except ValueError as error:
            yield document, one_line(str(error))


def _compare(folder: Path, stated: Mapping[str, str]) -> None:
    """Raise NotVerified for a file that is missing, differs, or is not stated."""
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - _NOT_STATED
    if missing := sorted(stated.keys() - there):
        raise NotVerified(f"{printable(missing[0])} is missing")
    if further := sorted(there - stated.keys()):
        raise NotVerified(f"the lineage does not state {printable(further[0])}: it was added afterwards")
    for name in sorted(stated):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise NotVerified(f"{printable(name)} is not a file")
        if (found := file_sha256(path)) != stated[name]:
            raise NotVerified(f"{printable(name)} has SHA-256 {found}, and the lineage states {stated[name]}")


@contextmanager
def _opened(address: str) -> Iterator[Adapter]:
    """The adapter, while the body runs."""
    if "://" not in address:
        folder = Path(address)
        if not folder.is_dir():
            raise ValueError(f"{address} is not a folder: give one, or an address such as hf://ORG/NAME")
        yield with_lineage(folder)
        return
    with TemporaryDirectory(prefix="qlora-verify-") as temporary:
        yield download(address, Path(temporary))


def download(address: str, folder: Path, most: int | None = None) -> Adapter:
    """Download the adapter into the folder, with this machine's logins.

    `most`: bytes that it may have; None for what the disk has free. Raises OSError if it has more, ValueError for an
    address that cannot be read from here, and StepFailure for a server.
    """
    # With the libraries of the servers' clients, which a folder does not need.
    from huggingface_hub import get_token

    from qlora_trainer.model.source.downloads import RemoteSource, open_remote_model
    from qlora_trainer.stores.hub import Hub

    source, registries = parse_source(address), allowed_registries([address])
    secret = Secret(folder, "the login of this machine", None)
    if not isinstance(source, RemoteSource):
        raise ValueError(f"{address} cannot be read from here: copy the folder, and give its path")  # noqa: TRY004
    remote = open_remote_model(source, lambda: Hub(get_token(), field=secret.field), secret, registries)
    names = [name for name in remote.sizes if "/" not in name and not name.startswith(".")]
    needed = sum(remote.sizes[name] for name in names)
    free = disk_usage(folder).free
    if needed > (room := free if most is None else min(free, most)):
        raise OSError(f"{remote.location} has {needed:,} bytes, and there is room for {room:,}")
    for name in names:
        remote.fetch(name, folder, lambda _done: None)
    if isinstance(source, RegistrySource):
        return _with_referrers(folder, source, secret, registries, remote.version)
    return with_lineage(folder)


def _with_referrers(
    folder: Path, source: RegistrySource, secret: Secret, registries: tuple[str, ...], sha256: str
) -> Adapter:
    """The files of an artifact with the statements that are attached to it."""
    from qlora_trainer.stores.referrers import find_attached
    from qlora_trainer.stores.registry import Registry

    registry = Registry(source, secret, allowed=registries, reject=bad_configuration)
    signed, unsigned = (find_attached(registry, f"sha256:{sha256}", kind) for kind in (BUNDLE_TYPE, PAYLOAD_TYPE))
    partly = [found.looked_at for found in (signed, unsigned) if not found.is_all]
    return Adapter(folder, signed.documents, unsigned.documents, sha256, looked_at=max(partly, default=None))


def with_lineage(folder: Path) -> Adapter:
    """Return the files of a folder with its statements."""
    return Adapter(folder, _small(folder / SIGNED_FILE), _small(folder / UNSIGNED_FILE))


def _small(path: Path) -> tuple[bytes, ...]:
    """Read a file, but no link, no pipe and none that is too large."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_LINEAGE_BYTES:
        return ()
    return (path.read_bytes(),)
