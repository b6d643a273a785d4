"""A folder of an adapter in a store of each kind, for what all stores have in common.

Each server is behind a proxy with faults. The job has the store's credentials in a Secret, the user in its environment.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import obstore
import pytest

from qlora_api.sources import RegistrySource, parse_source
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration, model_unavailable
from qlora_trainer.stores import bucket, hub, registry_auth
from qlora_trainer.stores.contents import Contents, Manifest, PublishedFile, describe_files
from qlora_trainer.stores.destinations.addresses import open_destination, open_folder
from qlora_trainer.stores.destinations.destination import Destination, StoreFolder, publish_folder
from qlora_trainer.stores.model_pack import pack, unpack
from qlora_trainer.stores.registry import Blob, Registry, digest_of
from tests.support import servers
from tests.support.fake_clouds import ACCOUNT, FakeCloud, serve_cloud
from tests.support.fake_hub import FakeHub, serve
from tests.support.runs.published import MANIFEST
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy

FIELD = "spec.output.secretRef"
HUB_TOKEN = "hf_CanaryTokenThatWrites"
CLAIM, PROBE = ".manifest.partial.json", ".write-check"
Profile = dict[str, Any]


@dataclass
class Store(ABC):
    """A store's server and one folder in it."""

    proxy: FaultProxy
    root: Path
    """A folder of the test's, for Secrets."""
    contents: Contents
    """The adapter that is published."""
    address: str
    """The folder's address, as the spec has it, with {name}."""
    place: Mapping[str, str]
    """The environment that names the server, which the profile decides."""
    profile: Profile
    """The profile of the user's job, which names the server."""
    credentials: Mapping[str, str]
    """The content of the Secret."""
    keys: str
    """Keys of the Secret, as messages name them."""
    login: str
    """What a user is told to do without credentials."""
    name: str = "tiny"

    @property
    def uri(self) -> str:
        """The folder's address."""
        return self.address.format(name=self.name)

    @abstractmethod
    def stored(self) -> dict[str, bytes]:
        """Every file of the folder, as the server has it."""

    @abstractmethod
    def put(self, name: str, content: bytes) -> None:
        """Write a file there, as another client does."""

    @abstractmethod
    def uploaded(self, request: Request) -> str | None:
        """The file or part of the publication that the request uploads, or None."""

    @abstractmethod
    def reads(self, request: Request, name: str) -> bool:
        """Whether the request reads that file's content."""

    def forbid_writing(self) -> None:
        """From now on the credentials are for reading only."""
        self.proxy.rule = lambda request: Fault(403) if writes(request) else None

    def renamed(self, name: str) -> "Store":
        """The same server with an empty folder, and no request so far."""
        self.proxy.seen.clear()
        return replace(self, name=name)

    def secret(self, credentials: Mapping[str, str] | None = None) -> Secret:
        """A mounted Secret with these values, by default those that are right."""
        folder = self.root / "secret"
        folder.mkdir(exist_ok=True)
        for key, value in (self.credentials if credentials is None else credentials).items():
            (folder / key).write_text(f"{value}\n")
        return Secret(folder, FIELD, "store")

    def log_in(self, patch: pytest.MonkeyPatch) -> None:
        """Give this machine's user the credentials."""
        for key, value in self.credentials.items():
            patch.setenv(key, value)

    def open(self, secret: Secret | None = None) -> StoreFolder:
        """Open the folder to read it, as the prepare step does."""
        registries = (f"http://{self.proxy.address}",)
        source, secret = parse_source(self.uri), secret or self.secret()
        return open_folder(source, secret, registries=registries, reject=model_unavailable, writes=False)

    def destination(self, secret: Secret | None = None) -> Destination:
        """Open the folder as the publish step does."""
        registries = (f"http://{self.proxy.address}",)
        secret, mounts = secret or self.secret(), Mounts(claims={"claim": self.root / "claim"})
        return open_destination(self.uri, mounts=mounts, secret=secret, registries=registries, owner="pod")

    def publish(self, manifest: Manifest = MANIFEST, secret: Secret | None = None) -> str:
        """Publish the adapter, and return its exact address."""
        described = manifest.model_copy(update={"files": describe_files(self.contents)})
        return publish_folder(self.destination(secret), self.contents, described)

    def uploads(self) -> list[str]:
        """Uploads so far, in order; what takes several requests once."""
        return [name for name, _ in groupby(filter(None, map(self.uploaded, self.proxy.seen)))]


def of(*schemes: str) -> pytest.MarkDecorator:
    """For the stores of these schemes: one test each."""
    return pytest.mark.parametrize("store", schemes, indirect=True)


def let_retry(patch: pytest.MonkeyPatch, times: int) -> None:
    """Have each client send a request again so often, and without a wait."""
    soon = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2}
    patch.setattr(bucket, "RETRY", {**bucket.RETRY, "max_retries": times, "backoff": soon})
    patch.setattr(registry_auth, "_RETRY", registry_auth._RETRY.new(total=times, backoff_factor=0))
    patch.setattr(hub, "_WAITS", (0.0,) * times)


def writes(request: Request) -> bool:
    """Whether the request is to change something."""
    return request.method in ("PUT", "POST")


def bytes_of(contents: Contents) -> dict[str, bytes]:
    """The files' contents."""
    return {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in contents.items()}


class BucketStore(Store):
    """A folder of objects below a prefix of a bucket."""

    @property
    def path(self) -> str:
        """The folder in the bucket."""
        return f"adapters/{self.name}"

    def uploaded(self, request: Request) -> str | None:
        found = re.search(f"/{self.path}/([^/?]+)", unquote(request.path))
        return found[1] if found and writes(request) and found[1] not in (CLAIM, PROBE) else None

    def reads(self, request: Request, name: str) -> bool:
        path = unquote(request.path).partition("?")[0]
        return request.method == "GET" and path.endswith(f"/{self.path}/{name}")


class S3(BucketStore):
    """A bucket of versitygw."""

    def stored(self) -> dict[str, bytes]:
        bucket = servers.s3_bucket(self.proxy.upstream)
        names = [entry["path"] for page in obstore.list(bucket, f"{self.path}/") for entry in page]
        return {name.removeprefix(f"{self.path}/"): bytes(obstore.get(bucket, name).bytes()) for name in names}

    def put(self, name: str, content: bytes) -> None:
        obstore.put(servers.s3_bucket(self.proxy.upstream), f"{self.path}/{name}", content)


@dataclass
class CloudStore(BucketStore):
    """A bucket of a played cloud of Google or Azure."""

    cloud: FakeCloud = field(default_factory=FakeCloud)

    def stored(self) -> dict[str, bytes]:
        inside = f"{self.path}/"
        found = self.cloud.objects.items()
        return {name.removeprefix(inside): content for name, content in found if name.startswith(inside)}

    def put(self, name: str, content: bytes) -> None:
        self.cloud.objects[f"{self.path}/{name}"] = content


class Oci(Store):
    """A tag of a repository of docker-registry."""

    def log_in(self, patch: pytest.MonkeyPatch) -> None:
        """See Store."""
        (self.root / "docker").mkdir()
        (self.root / "docker" / "config.json").write_text(self.credentials[".dockerconfigjson"])
        patch.setenv("DOCKER_CONFIG", str(self.root / "docker"))

    @property
    def registry(self) -> Registry:
        """The repository itself, without the proxy."""
        folder = self.root / "registry-itself"
        folder.mkdir(exist_ok=True)
        servers.give_login(folder, self.proxy.upstream)
        source, address = RegistrySource(self.proxy.upstream, f"team/{self.name}", "v1", None), self.proxy.upstream
        return Registry(source, Secret(folder, FIELD, "own"), allowed=(f"http://{address}",), reject=bad_configuration)

    def stored(self) -> dict[str, bytes]:
        artifact = self.registry.manifest("v1")
        blobs = {} if artifact is None else unpack(artifact.manifest)
        return {name: self.registry.read(blob) for name, blob in blobs.items()}

    def put(self, name: str, content: bytes) -> None:
        described = {name: PublishedFile(sha256=sha256(content).hexdigest(), size=len(content))}
        config, artifact = pack("other", described)
        for blob in (content, config):
            self.registry.upload(Blob(digest_of(blob), len(blob)), blob)
        self.registry.tag(artifact, "v1")

    def uploaded(self, request: Request) -> str | None:
        found = re.search("(?:[?&]digest=|/manifests/)(.*)", request.path)
        return found[1] if found and request.method == "PUT" else None

    def reads(self, request: Request, name: str) -> bool:
        digest = describe_files({name: self.contents[name]})[name].sha256
        return request.method == "GET" and request.path.endswith(digest)


@dataclass
class HubRepository(Store):
    """A model repository of a played hub."""

    hub: FakeHub = field(default_factory=FakeHub)

    def log_in(self, patch: pytest.MonkeyPatch) -> None:
        """See Store."""
        patch.setenv("HF_TOKEN", HUB_TOKEN)

    @property
    def key(self) -> str:
        """The repository's name at the hub."""
        return f"models/acme/{self.name}"

    def stored(self) -> dict[str, bytes]:
        folder = self.hub.repositories.get(self.key)
        files = () if folder is None else folder.iterdir()
        return {path.name: path.read_bytes() for path in files if path.name != ".gitattributes"}

    def put(self, name: str, content: bytes) -> None:
        assert self.hub.folder is not None
        folder = self.hub.repositories.setdefault(self.key, self.hub.folder / self.key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    def uploaded(self, request: Request) -> str | None:
        found = re.search("/large/|/commit/", request.path)
        return found[0] if found and writes(request) else None

    def reads(self, request: Request, name: str) -> bool:
        return request.method == "GET" and "/resolve/" in request.path and request.path.endswith(f"/{name}")

    def forbid_writing(self) -> None:
        self.hub.role = "read"

    def renamed(self, name: str) -> "HubRepository":
        """As above; the hub has no large file of the other repository."""
        self.hub.large.clear()
        self.proxy.seen.clear()
        return replace(self, name=name)


class Volume(Store):
    """A folder of a claim, which has no server and no credentials."""

    @property
    def folder(self) -> Path:
        """The folder as it is mounted."""
        return self.root / "claim" / "adapters" / self.name

    def stored(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def put(self, name: str, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)

    def uploads(self) -> list[str]:
        """As above: a file that is written again is another."""
        return [f"{path.name} {path.stat().st_ino} {path.stat().st_mtime_ns}" for path in self.folder.iterdir()]

    def uploaded(self, request: Request) -> str | None:
        raise NotImplementedError

    def reads(self, request: Request, name: str) -> bool:
        raise NotImplementedError


@contextmanager
def serve_store(scheme: str, upstream: str, root: Path, contents: Contents) -> Iterator[Store]:
    """An empty folder of a store. `upstream`: HOST:PORT of a real server of that kind, if there is one."""
    profile: Profile
    cloud, played = FakeCloud(), FakeHub(token=HUB_TOKEN, folder=root / "hub")
    with ExitStack() as opened:
        if scheme in ("gs", "az"):
            upstream = opened.enter_context(serve_cloud(cloud, {"gs": "google", "az": "azure"}[scheme])).address
        elif scheme == "hf":
            upstream = opened.enter_context(serve(played)).endpoint.removeprefix("http://")
        proxy = opened.enter_context(serve_proxy(FaultProxy(upstream)))
        url, first = f"http://{proxy.address}", (proxy, root, contents)
        bucket_address = f"{scheme}://{servers.BUCKET}/adapters/{{name}}"
        if scheme == "pvc":
            (root / "claim").mkdir()
            yield Volume(*first, "pvc://claim/adapters/{name}", {}, {}, {}, "", "")
        elif scheme == "s3":
            keys = {"AWS_ACCESS_KEY_ID": servers.ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": servers.SECRET_KEY}
            place, profile = {"AWS_ENDPOINT_URL": url}, {"objectStore": {"endpoint": url}}
            yield S3(*first, bucket_address, place, profile, keys, ", ".join(keys), "set AWS_ACCESS_KEY_ID")
        elif scheme == "gs":
            key, login = "GOOGLE_SERVICE_ACCOUNT_KEY", "set GOOGLE_APPLICATION_CREDENTIALS"
            place, profile = {"GOOGLE_BASE_URL": url}, {"googleStorage": {"endpoint": url}}
            keys = {key: cloud.service_account_key()}
            yield CloudStore(*first, bucket_address, place, profile, keys, key, login, cloud=cloud)
        elif scheme == "az":
            place = {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ENDPOINT": url}
            profile, key = {"azureStorage": {"account": ACCOUNT, "endpoint": url}}, "AZURE_STORAGE_ACCOUNT_KEY"
            either, keys = f"{key} or AZURE_STORAGE_SAS_TOKEN", {key: cloud.account_key}
            yield CloudStore(*first, bucket_address, place, profile, keys, either, f"set {either}", cloud=cloud)
        elif scheme == "oci":
            key, login = ".dockerconfigjson", f"run `docker login {proxy.address}`"
            keys = {key: json.dumps({"auths": {proxy.address: {"auth": servers.LOGIN}}})}
            yield Oci(*first, f"oci://{proxy.address}/team/{{name}}:v1", {}, {"registries": [url]}, keys, key, login)
        else:
            place, profile, keys = {"HF_ENDPOINT": url}, {"hubEndpoint": url}, {"token": HUB_TOKEN}
            login = "set HF_TOKEN to a token"
            yield HubRepository(*first, "hf://acme/{name}", place, profile, keys, "token", login, hub=played)
