"""Adapters in a real OCI registry: what other clients get, tags that move, and token servers."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from oras.client import OrasClient

from qlora_api.contract import ExitCode
from tests.support.failures import failing
from tests.support.runs.published import rejected
from tests.support.servers import LOGIN, PASSWORD, USER, give_login
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.support.services.stores import FIELD, Store, bytes_of, of

TOKEN = "canary-registry-token"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIGURATION, UNREACHABLE = ExitCode.BAD_CONFIGURATION, ExitCode.UNREACHABLE
pytestmark = of("oci")


def test_oras_pull_gives_the_folder_of_a_model_pack(store: Store, real_registry: str, tmp_path: Path) -> None:
    repository, _, digest = store.publish().removeprefix(f"oci://{store.proxy.address}/").partition(":v1@")
    assert store.proxy.lines("PUT")[-1].endswith("/manifests/v1")
    give_login(tmp_path, real_registry)
    client, login = OrasClient(insecure=True, auth_backend="basic"), str(tmp_path / ".dockerconfigjson")
    client.pull(f"{real_registry}/{repository}@{digest}", config_path=login, outdir=str(tmp_path / "pulled"))
    found = {path.name: path.read_bytes() for path in (tmp_path / "pulled").iterdir()}
    assert b'"jobUid": "one"' in found.pop("manifest.json")
    assert found == bytes_of(store.contents)
    manifest = manifest_at(f"http://{real_registry}/v2/{repository}/manifests/{digest}")
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    types = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]}
    assert types == {
        "README.md": "application/vnd.cncf.model.doc.v1.raw",
        "manifest.json": "application/vnd.cncf.model.doc.v1.raw",
        "adapter_config.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "adapter_model.safetensors": "application/vnd.cncf.model.weight.v1.raw",
    }


def manifest_at(url: str) -> dict[str, Any]:
    answer = requests.get(url, auth=(USER, PASSWORD), headers={"Accept": MANIFEST_TYPE}, timeout=60)
    return dict(answer.json())


def add_layer(real_registry: str, tag: str) -> None:
    """Move the tag to the same files and one more, as a user with push rights can."""
    url = f"http://{real_registry}{tag}"
    manifest = manifest_at(url)
    manifest["layers"].append({**manifest["layers"][0], "annotations": {"org.cncf.model.filepath": "modeling.py"}})
    kind = {"Content-Type": MANIFEST_TYPE}
    requests.put(url, auth=(USER, PASSWORD), headers=kind, json=manifest, timeout=60).raise_for_status()


def test_an_artifact_with_an_extra_layer_is_rejected(store: Store, real_registry: str) -> None:
    first = store.publish()
    add_layer(real_registry, store.proxy.lines("PUT")[-1])
    store.proxy.seen.clear()
    assert store.publish() == first
    assert store.proxy.lines("PUT")[-1].endswith("/manifests/v1")


def test_a_tag_that_is_moved_while_it_is_read_back_does_not_change_the_address(
    store: Store, real_registry: str
) -> None:
    moved: list[str] = []

    def move(request: Request) -> None:
        tags = [path for path in store.proxy.lines("PUT") if path.endswith("/manifests/v1")]
        if request.method == "GET" and "/blobs/" in request.path and tags and not moved:
            moved.extend(tags)
            add_layer(real_registry, tags[0])

    store.proxy.rule = move
    uri = store.publish()
    store.proxy.rule = lambda _request: None
    assert moved
    assert store.publish() == uri


def test_a_blob_that_arrives_changed_is_rejected_by_the_registry(store: Store) -> None:
    store.proxy.rule = lambda request: Fault(corrupt_request=request.method == "PUT" and "/blobs/" in request.path)
    assert "did not arrive intact" in rejected(store.publish, UNREACHABLE)


def test_a_check_of_credentials_leaves_no_upload(store: Store) -> None:
    store.destination().require_writable()
    begun, [canceled] = store.proxy.lines("POST"), store.proxy.lines("DELETE")
    assert canceled.startswith(begun[-1])


@pytest.mark.parametrize(("host", "words"), [("", f"{FIELD} (HTTP 401)"), ("ghcr.io", "has no entry for 127.0.0.1:")])
def test_a_secret_with_another_login_is_rejected(store: Store, host: str, words: str) -> None:
    wrong = base64.b64encode(b"team:wrong").decode()
    login = json.dumps({"auths": {host or store.proxy.address: {"auth": wrong}}})
    with failing(CONFIGURATION, words):
        store.publish(secret=store.secret({".dockerconfigjson": login}))


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """A server that must get no request; its address."""
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(404))) as server:
        yield f"http://{server.address}"
        assert server.seen == []


@pytest.mark.parametrize(
    ("location", "code", "words"),
    [
        (None, CONFIGURATION, f"{FIELD} (HTTP 405)"),
        ("ELSEWHERE/place", CONFIGURATION, "redirects to ELSEWHERE, where the credentials"),
        ("http://[", UNREACHABLE, "wants an upload to continue at 'http://[', which is not an address"),
    ],
    ids=["no uploads", "another server", "nowhere"],
)
def test_an_upload_that_cannot_continue_is_an_error_of_the_registry(
    store: Store, elsewhere: str, location: str | None, code: ExitCode, words: str
) -> None:
    begun = Fault(405) if location is None else Fault(202, {"Location": location.replace("ELSEWHERE", elsewhere)})
    store.proxy.rule = lambda request: begun if request.method == "POST" else None
    assert words.replace("ELSEWHERE", elsewhere) in rejected(store.publish, code)


def test_a_redirect_to_an_invalid_address_is_an_error_of_the_registry(store: Store) -> None:
    store.proxy.rule = lambda _request: Fault(307, {"Location": "http://["})
    assert "(InvalidURL)" in rejected(store.publish, UNREACHABLE)


def challenge(realm: str) -> Fault:
    """The registry wants a token of that server."""
    return Fault(401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="team",scope="push"'})


@pytest.mark.parametrize("realm", ["http://[", "https://h\\[x", "ftp://h/token", "", "ELSEWHERE/place"])
def test_a_token_server_that_is_none_gets_no_credentials(store: Store, elsewhere: str, realm: str) -> None:
    store.proxy.rule = lambda _request: challenge(realm.replace("ELSEWHERE", elsewhere))
    words = f"redirects to {elsewhere}, where the credentials" if "ELSEWHERE" in realm else f"{FIELD} (HTTP 401)"
    assert words in rejected(store.publish, CONFIGURATION)


NONSENSE = (b"[]", b"[" * 10**5, b"busy", b"{}", b'{"token": {}}')


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        *((Fault(status), CONFIGURATION, f"{FIELD} (HTTP 401)") for status in (401, 403)),
        *((Fault(status), UNREACHABLE, f"answered HTTP {status} for a token") for status in (429, 503)),
        *((Fault(200, body=body), UNREACHABLE, "but not with a JSON object that has one") for body in NONSENSE),
    ],
    ids=range(9),
)
def test_a_failing_token_server_is_retried_and_one_that_denies_is_not(
    store: Store, answer: Fault, code: ExitCode, words: str
) -> None:
    own = challenge(f"http://{store.proxy.address}/token")
    store.proxy.rule = lambda request: answer if request.path.startswith("/token") else own
    assert words in rejected(store.publish, code)


def test_a_token_is_got_for_the_credentials_where_the_registry_wants_one(store: Store) -> None:
    """The token service of a registry, in front of the real one."""

    def rule(request: Request) -> Fault:
        given = request.headers.get("Authorization", "")
        if request.path.startswith("/token"):
            body = json.dumps({"token": TOKEN}).encode()
            return Fault(200, body=body) if given == f"Basic {LOGIN}" else Fault(401)
        if given == f"Bearer {TOKEN}":
            return Fault(replace={"Authorization": f"Basic {LOGIN}"})
        return challenge(f"http://{store.proxy.address}/token")

    store.proxy.rule = rule
    assert "@sha256:" in store.publish()
    assert not any(TOKEN in request.path for request in store.proxy.seen)


def test_a_huge_manifest_is_not_read_to_its_end(store: Store) -> None:
    # The bytes after the first megabytes never arrive, and the step does not wait for them.
    store.proxy.rule = lambda _request: Fault(200, body=b" " * 2**23, cut=2**23 - 1, stall=True)
    assert "has more than 4194304 bytes" in rejected(store.publish, ExitCode.UNSAFE_ARTIFACT)


def test_a_huge_foreign_file_is_not_read_into_memory(store: Store) -> None:
    layer = {"digest": f"sha256:{'0' * 64}", "size": 2**40, "annotations": {"org.cncf.model.filepath": "manifest.json"}}
    store.proxy.rule = lambda _request: Fault(200, body=json.dumps({"layers": [layer]}).encode())
    assert "has files that no QLoRAJob published" in rejected(store.publish, CONFIGURATION)
    assert not any("/blobs/" in path for path in store.proxy.lines("GET"))
