"""Reads published folders from hubs, buckets and registries, with the credentials of the user of this machine.

A cluster may name any server in its profiles. So credentials that are not bound to a server, such as those of
environment variables, are sent to one only if the user's environment names it.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import get_token

from qlora_api.contract import ExitCode
from qlora_api.sources import HubSource, ObjectStoreSource, RegistrySource, Source
from qlora_client.files.published import Folder, OnBytes, PublishedFile
from qlora_client.kube.errors import ClusterError, MissingError
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import remove
from qlora_trainer.stores.hub import Hub, Listing
from qlora_trainer.stores.model_pack import unpack
from qlora_trainer.stores.objects import ObjectFolder
from qlora_trainer.stores.registry import Blob, Registry

_ANSWER = re.compile(r"\(HTTP [^)]*\)?[^)]*\)")
_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class _ObjectStore:
    """The environment variables of an object store's client, for its address and credentials."""

    places: Mapping[str, tuple[str, str]]
    """By variable: the part of the profile and the field in it that has its value."""
    bound: frozenset[str]
    """Of these, the variables that decide the server that gets the credentials."""
    credentials: tuple[str, ...]
    """Variables of which any has credentials."""
    remedy: str


_OBJECT_STORES = {
    "s3": _ObjectStore(
        {"AWS_ENDPOINT_URL": ("objectStore", "endpoint"), "AWS_REGION": ("objectStore", "region")},
        frozenset({"AWS_ENDPOINT_URL"}),
        ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"),
        "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if there is one, AWS_SESSION_TOKEN",
    ),
    "gs": _ObjectStore(
        {"GOOGLE_BASE_URL": ("googleStorage", "endpoint")},
        frozenset({"GOOGLE_BASE_URL"}),
        (
            "GOOGLE_APPLICATION_CREDENTIALS",
            "GOOGLE_SERVICE_ACCOUNT",
            "GOOGLE_SERVICE_ACCOUNT_KEY",
            "GOOGLE_SERVICE_ACCOUNT_PATH",
        ),
        "set GOOGLE_APPLICATION_CREDENTIALS to the file of your credentials",
    ),
    "az": _ObjectStore(
        {
            "AZURE_STORAGE_ACCOUNT_NAME": ("azureStorage", "account"),
            "AZURE_STORAGE_ENDPOINT": ("azureStorage", "endpoint"),
        },
        frozenset({"AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT"}),
        ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
        "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    ),
}


@contextmanager
def open_store(source: Source, profile: Mapping[str, Any]) -> Iterator[Folder]:
    """The folder at the address. `profile`: that of the job, which names the servers. Raises ClusterError.

    A later denial of the server is a ClusterError too.
    """
    try:
        with _opened(source, profile) as folder:
            yield folder
    except StepFailure as failure:
        raise ClusterError(failure.message) from None


@contextmanager
def _opened(source: Source, profile: Mapping[str, Any]) -> Iterator[Folder]:
    if isinstance(source, HubSource):
        yield _open_hub(source, profile.get("hubEndpoint"))
    elif isinstance(source, ObjectStoreSource):
        store = _OBJECT_STORES[source.scheme]
        with _server_of(source, store, profile):
            yield _open_bucket(source, store)
    elif isinstance(source, RegistrySource):
        yield _open_registry(source, tuple(profile.get("registries") or ()))
    else:
        raise ClusterError("a ConfigMap holds no published folder")


def _open_hub(source: HubSource, endpoint: str | None) -> Folder:
    token, own = get_token(), os.environ.get("HF_ENDPOINT")
    if token and not own and endpoint not in (None, _HUB):
        raise ClusterError(
            f"hf:// is {endpoint} for this job, and your token may be for another hub: set HF_ENDPOINT={endpoint} to "
            "send it there"
        )
    hub = Hub(token, endpoint=own or endpoint or _HUB, field="HF_TOKEN")
    return _Repository(hub, hub.list("model", source.repository, source.commit))


@contextmanager
def _server_of(source: ObjectStoreSource, store: _ObjectStore, profile: Mapping[str, Any]) -> Iterator[None]:
    """Have the environment name the profile's server, as in a job's pod, unless the user has set another."""
    named = {name: (profile.get(part) or {}).get(field) for name, (part, field) in store.places.items()}
    missing = {name: str(value) for name, value in named.items() if value and not os.environ.get(name)}
    unnamed = [f"{name}={missing[name]}" for name in store.places if name in store.bound and name in missing]
    if unnamed and any(os.environ.get(name) for name in store.credentials):
        raise ClusterError(
            f"the job's profile says where {source.scheme}:// is, and your credentials may be for another store: set "
            f"{' and '.join(unnamed)} to use them there"
        )
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _open_bucket(source: ObjectStoreSource, store: _ObjectStore) -> Folder:
    secret = Secret(Path(), "your environment", None)
    return _Bucket(ObjectFolder(source, secret, reject=partial(_denied, str(source), store.remedy)))


def _open_registry(source: RegistrySource, allowed: tuple[str, ...]) -> Folder:
    login = f"docker login {source.registry}"
    # The profile may have changed since; its list also names the token servers that get the login.
    listed = {entry.removeprefix("http://") for entry in allowed}
    servers = allowed if source.registry in listed else (*allowed, source.registry)
    registry = Registry(
        source, Secret(Path(), login, None), allowed=servers, reject=partial(_denied, str(source), f"run `{login}`")
    )
    found = registry.manifest(source.reference)
    if found is None:
        raise MissingError(f"{source} does not exist, or may not be read without a login: run `{login}`")
    try:
        return _Artifact(registry, unpack(found.manifest))
    except ValueError as error:
        raise ClusterError(f"{source} is no artifact of files: {error}") from None


def _denied(address: str, remedy: str, message: str) -> StepFailure:
    """In place of the message for a step, which names Secrets and profiles."""
    answer = _ANSWER.search(message)
    found = f" {answer[0]}" if answer else ""
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        f"{address} does not exist, or may not be read with your credentials{found}: {remedy}",
    )


@dataclass(frozen=True)
class _Repository:
    hub: Hub
    listing: Listing

    def read(self, name: str, most: int) -> bytes:
        _require_small(self.listing.files[name].size if name in self.listing.files else None, name, most)
        with TemporaryDirectory() as folder:
            return self.hub.fetch(self.listing, self.listing.files[name], Path(folder)).read_bytes()

    def fetch(self, files: Mapping[str, PublishedFile], into: Path, on_bytes: OnBytes) -> None:
        for name, count in _one_by_one(files, self.listing.files, on_bytes):
            self.hub.fetch(self.listing, self.listing.files[name], into, count)
        # The client's files for resuming a download.
        remove(into / ".cache")


@dataclass(frozen=True)
class _Bucket:
    folder: ObjectFolder

    def read(self, name: str, most: int) -> bytes:
        content = self.folder.read(name, most=most)
        if content is None:
            raise MissingError(f"{self.folder.uri}/{name} does not exist, or has more than {most} bytes")
        return content

    def fetch(self, files: Mapping[str, PublishedFile], into: Path, on_bytes: OnBytes) -> None:
        for name, count in _one_by_one(files, files, on_bytes):
            self.folder.download(self.folder.stat(name), into / name, count)


@dataclass(frozen=True)
class _Artifact:
    registry: Registry
    blobs: Mapping[str, Blob]

    def read(self, name: str, most: int) -> bytes:
        _require_small(self.blobs[name].size if name in self.blobs else None, name, most)
        return self.registry.read(self.blobs[name])

    def fetch(self, files: Mapping[str, PublishedFile], into: Path, on_bytes: OnBytes) -> None:
        for name, count in _one_by_one(files, self.blobs, on_bytes):
            self.registry.download(self.blobs[name], into / name, count)


def _require_small(size: int | None, name: str, most: int) -> None:
    if size is None:
        raise MissingError(f"{name} does not exist there: something else has been published, or it was deleted")
    if size > most:
        raise ClusterError(f"{name} has {size} bytes there, and at most {most} are read")


def _one_by_one(
    files: Mapping[str, PublishedFile], present: Mapping[str, object], on_bytes: OnBytes
) -> Iterator[tuple[str, Callable[[int], None]]]:
    """The names, each with a counter of its bytes that starts after those of the files before it."""
    done = 0
    for name, file in files.items():
        if name not in present:
            raise MissingError(f"{name} does not exist there, though the manifest lists it")
        yield name, lambda count, before=done: on_bytes(before + count)  # type: ignore[misc]
        done += file.size
