"""Adapters that a user downloads from a bucket, a registry and a fake hub."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore
import pytest

from qlora_api.sources import RegistrySource, parse_source
from qlora_client.files.adapter import copy_published
from qlora_client.files.published import ADAPTER, DamagedError
from qlora_client.files.stores import open_store
from qlora_client.kube.cluster import Object
from qlora_client.kube.errors import ClusterError
from qlora_trainer.core.credentials import Secret
from qlora_trainer.stores.contents import Contents, describe_files
from qlora_trainer.stores.destinations.bucket import ObjectDestination
from qlora_trainer.stores.destinations.destination import publish_folder
from qlora_trainer.stores.destinations.hub import HubDestination
from qlora_trainer.stores.destinations.registry import RegistryDestination
from tests.support.fake_clouds import ACCOUNT, FakeCloud, serve_cloud
from tests.support.fake_clouds import BUCKET as CLOUD_BUCKET
from tests.support.fake_hub import FakeHub, serve
from tests.support.runs.published import MANIFEST
from tests.support.servers import ACCESS_KEY, BUCKET, LOGIN, SECRET_KEY, s3_bucket
from tests.support.services.fault_proxy import Fault, FaultProxy, serve_proxy

TOKEN = "hf_canary"


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("HF_", "AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "home" / "token"))


def download(uri: str, profile: Object, target: Path, contents: Contents) -> None:
    sha256 = describe_files(contents)[ADAPTER].sha256
    with open_store(parse_source(uri), profile) as folder:
        copy_published(folder, uri, sha256, target, lambda _done, _all: None)


def require_same(target: Path, contents: Contents) -> None:
    found = {path.name: path.read_bytes() for path in target.iterdir()}
    assert set(found) == {*contents, "manifest.json"}
    weights = contents[ADAPTER]
    assert isinstance(weights, Path)
    assert found[ADAPTER] == weights.read_bytes()
    assert set(json.loads(found["manifest.json"])["files"]) == set(contents)


Publish = Callable[[Any], str]


@pytest.fixture
def publish(contents: Contents) -> Publish:
    manifest = MANIFEST.model_copy(update={"files": describe_files(contents)})
    return lambda destination: publish_folder(destination, contents, manifest)


def secret(folder: Path, **values: str) -> Secret:
    folder.mkdir(parents=True)
    for name, value in values.items():
        (folder / name).write_text(value)
    return Secret(folder, "spec.output.secretRef", "writer")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = tmp_path / "hub"
    with serve(FakeHub(folder=folder, token=TOKEN)) as hub:
        yield hub


def test_a_hub(
    hub: FakeHub, publish: Publish, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    source: Any = parse_source("hf://acme/tiny-lora")
    uri = publish(HubDestination(source, secret(tmp_path / "secret", token=TOKEN)))
    profile = {"hubEndpoint": hub.endpoint}
    monkeypatch.delenv("HF_ENDPOINT")
    with pytest.raises(ClusterError, match=r"hf://acme/tiny-lora does not exist, or may not be read with no token"):
        download(uri, profile, tmp_path / "adapter", contents)
    hub.tokens.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(
        ClusterError, match=f"your credentials may be for another server: set HF_ENDPOINT={hub.endpoint}"
    ):
        download(uri, profile, tmp_path / "adapter", contents)
    assert hub.tokens == set(), "the token was sent to a server that the user has not named"
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    download(uri, profile, tmp_path / "adapter", contents)
    require_same(tmp_path / "adapter", contents)


def give_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


def test_a_bucket(
    s3: str, publish: Publish, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://{s3}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    source: Any = parse_source(f"s3://{BUCKET}/adapters/{uuid4().hex}")
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    uri = publish(ObjectDestination(source, secret(tmp_path / "secret", **keys)))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    profile = {"objectStore": {"endpoint": address}}
    with pytest.raises(
        ClusterError, match=r"may not be read with your credentials \(HTTP 403.*: set AWS_ACCESS_KEY_ID"
    ):
        download(uri, profile, tmp_path / "adapter", contents)
    give_keys(monkeypatch)
    with pytest.raises(
        ClusterError, match=f"may be for another server: set AWS_ENDPOINT_URL={address} to use them there"
    ):
        download(uri, profile, tmp_path / "adapter", contents)
    # With a right to read objects, and none to list them.
    unlisted = FaultProxy(s3, rule=lambda request: Fault(403) if "list-type" in request.path else None)
    with serve_proxy(unlisted):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{unlisted.address}")
        download(uri, profile, tmp_path / "adapter", contents)
    require_same(tmp_path / "adapter", contents)


def test_an_object_that_was_changed_after_it_was_published(
    s3: str, publish: Publish, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3}")
    give_keys(monkeypatch)
    source: Any = parse_source(f"s3://{BUCKET}/adapters/{uuid4().hex}")
    uri = publish(ObjectDestination(source, Secret(Path(), "", None)))
    obstore.put(s3_bucket(s3), f"{source.path}/adapter_config.json", b"[]")
    with pytest.raises(DamagedError, match=r"adapter_config.json is damaged"):
        download(uri, {}, tmp_path / "adapter", contents)
    assert not (tmp_path / "adapter").exists()


def test_a_bucket_of_google(
    publish: Publish, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_cloud(FakeCloud(), "google") as cloud:
        address, key = f"http://{cloud.address}", cloud.service_account_key()
        monkeypatch.setenv("GOOGLE_BASE_URL", address)
        source: Any = parse_source(f"gs://{CLOUD_BUCKET}/adapters/a")
        uri = publish(ObjectDestination(source, secret(tmp_path / "secret", GOOGLE_SERVICE_ACCOUNT_KEY=key)))
        monkeypatch.delenv("GOOGLE_BASE_URL")
        profile = {"googleStorage": {"endpoint": address}}
        with pytest.raises(ClusterError, match=r"may not be read .*HTTP 40.*: set GOOGLE_APPLICATION_CREDENTIALS"):
            download(uri, profile, tmp_path / "adapter", contents)
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", key)
        with pytest.raises(ClusterError, match=f"set GOOGLE_BASE_URL={address} to use them there"):
            download(uri, profile, tmp_path / "adapter", contents)
        monkeypatch.setenv("GOOGLE_BASE_URL", address)
        download(uri, profile, tmp_path / "adapter", contents)
    require_same(tmp_path / "adapter", contents)


def test_a_container_of_azure(
    publish: Publish, contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_cloud(FakeCloud(), "azure") as cloud:
        places = {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ENDPOINT": f"http://{cloud.address}"}
        for name, value in places.items():
            monkeypatch.setenv(name, value)
        source: Any = parse_source(f"az://{CLOUD_BUCKET}/adapters/a")
        key = secret(tmp_path / "secret", AZURE_STORAGE_ACCOUNT_KEY=cloud.account_key)
        uri = publish(ObjectDestination(source, key))
        for name in places:
            monkeypatch.delenv(name)
        profile = {"azureStorage": {"account": ACCOUNT, "endpoint": places["AZURE_STORAGE_ENDPOINT"]}}
        with pytest.raises(ClusterError, match=r"may not be read .*HTTP 40.*: set AZURE_STORAGE_ACCOUNT_KEY or"):
            download(uri, profile, tmp_path / "adapter", contents)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", cloud.account_key)
        with pytest.raises(ClusterError, match=f"set AZURE_STORAGE_ACCOUNT_NAME={ACCOUNT} and AZURE_STORAGE_ENDPOINT="):
            download(uri, profile, tmp_path / "adapter", contents)
        for name, value in places.items():
            monkeypatch.setenv(name, value)
        download(uri, profile, tmp_path / "adapter", contents)
    require_same(tmp_path / "adapter", contents)


def test_a_registry(registry_proxy: FaultProxy, publish: Publish, contents: Contents, tmp_path: Path) -> None:
    allowed = (f"http://{registry_proxy.address}",)
    source = parse_source(f"oci://{registry_proxy.address}/team/{uuid4().hex}:v1")
    assert isinstance(source, RegistrySource)
    login = Secret(tmp_path / "credentials" / "output", "spec.output.secretRef", "push")
    uri = publish(RegistryDestination(source, login, allowed=allowed))
    profile = {"registries": list(allowed)}
    remedy = rf"may not be read with your credentials \(HTTP 401\): run `docker login {registry_proxy.address}`"
    with pytest.raises(ClusterError, match=remedy):
        download(uri, profile, tmp_path / "adapter", contents)
    configuration = {"auths": {registry_proxy.address: {"auth": LOGIN}}}
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text(json.dumps(configuration))
    download(uri, profile, tmp_path / "adapter", contents)
    require_same(tmp_path / "adapter", contents)
