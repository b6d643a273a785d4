"""Reads published folders from hubs, buckets and registries, with the credentials of the user of this machine.

A cluster may name any server in its profiles. So credentials that are not bound to a server, such as those of
environment variables, are sent to one only if the user's environment names it.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

from huggingface_hub import get_token

from qlora_api.contract import ExitCode
from qlora_api.sources import SCHEMES, RegistrySource, Scheme, Source
from qlora_client.files.published import Folder, OnBytes, PublishedFile
from qlora_client.kube.cluster import Object
from qlora_client.kube.errors import ClusterError, MissingError
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.stores.destinations.addresses import open_folder
from qlora_trainer.stores.destinations.destination import StoreFolder

_ANSWER = re.compile(r"\(HTTP [^)]*\)?[^)]*\)")


@contextmanager
def open_store(source: Source, profile: Object) -> Iterator[Folder]:
    """The folder at the address. `profile`: that of the job, which names the servers. Raises ClusterError.

    A later denial of the server is a ClusterError too.
    """
    scheme = SCHEMES.get(source.scheme)
    if scheme is None:
        raise ClusterError("a ConfigMap holds no published folder")
    registries, login = tuple(profile.get("registries") or ()), scheme.login
    if isinstance(source, RegistrySource):
        login = login.format(server=source.registry)
        # The profile may have changed since; its list also names the token servers that get the login.
        if source.registry not in {entry.removeprefix("http://") for entry in registries}:
            registries = (*registries, source.registry)
    secret = Secret(Path(), ", ".join(scheme.own_credentials) or "your login", None)
    try:
        with _server_of(scheme, profile):
            reject = partial(_denied, str(source), login)
            yield _Stored(open_folder(source, secret, registries=registries, reject=reject, writes=False), login)
    except StepFailure as failure:
        raise ClusterError(failure.message) from None


@contextmanager
def _server_of(scheme: Scheme, profile: Object) -> Iterator[None]:
    """Set the profile's server in the environment, unless the user has set another."""
    missing, unnamed = {}, []
    for setting in scheme.settings:
        *parts, name = setting.path
        value = reduce(lambda found, part: found.get(part) or {}, parts, profile).get(name)
        if value and not os.environ.get(setting.variable):
            missing[setting.variable] = str(value)
            if setting.names_server and value != setting.default:
                unnamed.append(f"{setting.variable}={value}")
    if unnamed and (any(map(os.environ.get, scheme.own_credentials)) or (scheme.name == "hf" and get_token())):
        raise ClusterError(
            f"the job's profile says where {scheme.name}:// is, and your credentials may be for another server: set "
            f"{' and '.join(unnamed)} to use them there"
        )
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _denied(address: str, login: str, message: str) -> StepFailure:
    """In place of the message for a step, which names Secrets and profiles."""
    answer = _ANSWER.search(message)
    found = f" {answer[0]}" if answer else ""
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        f"{address} does not exist, or may not be read with your credentials{found}: {login}",
    )


@dataclass(frozen=True)
class _Stored:
    folder: StoreFolder
    login: str

    def read(self, name: str, most: int) -> bytes:
        content = self.folder.read(name, most=most)
        if content is None:
            raise MissingError(
                f"{self.folder.uri}/{name} does not exist, has more than {most} bytes, or may not be read with your "
                f"credentials: {self.login}"
            )
        return content

    def fetch(self, files: Mapping[str, PublishedFile], into: Path, on_bytes: OnBytes) -> None:
        stored, done = self.folder.find(files), 0
        for name, file in files.items():
            if name not in stored:
                raise MissingError(f"{self.folder.uri}/{name} does not exist, though the manifest lists it")
            stored[name].download(into / name, lambda count, before=done: on_bytes(before + count))  # type: ignore[misc]
            done += file.size
