"""Adapters published to a real OCI registry: whole, read back, once, and not overwriting."""

import base64
import json
from pathlib import Path
from uuid import uuid4

import pytest
import requests
from oras.client import OrasClient

from qlora_api.contract import ExitCode
from qlora_api.sources import RegistrySource, parse_source
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.stores.contents import Contents, Manifest, describe_files
from qlora_trainer.stores.destinations.destination import publish_folder
from qlora_trainer.stores.destinations.registry import RegistryDestination
from tests.support.runs.published import MANIFEST, Publish, rejected
from tests.support.servers import LOGIN, PASSWORD, USER, give_login
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy

TOKEN = "canary-registry-token"


@pytest.fixture
def publish(tmp_path: Path, registry_proxy: FaultProxy, contents: Contents) -> Publish:
    """Publishes the adapter to a tag of a repository of the test's own."""
    source = parse_source(f"oci://{registry_proxy.address}/team/{uuid4().hex}:v1")
    assert isinstance(source, RegistrySource)
    secret = Secret(tmp_path / "credentials" / "output", "spec.output.secretRef", "push")

    def run(manifest: Manifest = MANIFEST) -> str:
        destination = RegistryDestination(source, secret, allowed=(f"http://{registry_proxy.address}",))
        return publish_folder(destination, contents, manifest.model_copy(update={"files": describe_files(contents)}))

    return run


def pulled(uri: str, real_registry: str, folder: Path) -> dict[str, bytes]:
    """Files that `oras pull` leaves of the artifact, from the registry itself."""
    give_login(folder, real_registry)
    reference = f"{real_registry}/{uri.removeprefix('oci://').partition('/')[2]}"
    client = OrasClient(insecure=True, auth_backend="basic")
    client.pull(reference, config_path=str(folder / ".dockerconfigjson"), outdir=str(folder / "pulled"))
    return {path.name: path.read_bytes() for path in (folder / "pulled").iterdir()}


def test_oras_pull_gives_the_folder(
    publish: Publish, registry_proxy: FaultProxy, contents: Contents, real_registry: str, tmp_path: Path
) -> None:
    uri = publish()
    found = pulled(uri, real_registry, tmp_path)
    assert b'"jobUid": "one"' in found.pop("manifest.json")
    assert found == {
        name: content if isinstance(content, bytes) else content.read_bytes() for name, content in contents.items()
    }
    assert registry_proxy.lines("PUT")[-1].rpartition("/")[2] == "v1"
    (artifact,) = {uri.rpartition("@")[2]}
    assert artifact.startswith("sha256:")
    assert not any(canary in request.path for request in registry_proxy.seen for canary in (PASSWORD, LOGIN))


def test_the_artifact_is_a_model_pack(publish: Publish, real_registry: str) -> None:
    reference = publish().removeprefix("oci://").partition("/")[2]
    repository, _, digest = reference.replace(":v1", "").partition("@")
    answer = requests.get(
        f"http://{real_registry}/v2/{repository}/manifests/{digest}",
        auth=(USER, PASSWORD),
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
        timeout=10,
    )
    manifest = answer.json()
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    types = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]}
    assert types == {
        "README.md": "application/vnd.cncf.model.doc.v1.raw",
        "manifest.json": "application/vnd.cncf.model.doc.v1.raw",
        "adapter_config.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "adapter_model.safetensors": "application/vnd.cncf.model.weight.v1.raw",
    }


def test_publishing_again_uploads_nothing(publish: Publish, registry_proxy: FaultProxy) -> None:
    first = publish()
    registry_proxy.seen.clear()
    assert publish() == first
    assert registry_proxy.lines("POST") == registry_proxy.lines("PUT") == []


def add_layer(real_registry: str, tag: str) -> None:
    """Move the tag to the same files and one more, as a user with push rights can."""
    url = f"http://{real_registry}{tag}"
    kind, login = "application/vnd.oci.image.manifest.v1+json", (USER, PASSWORD)
    manifest = requests.get(url, auth=login, headers={"Accept": kind}, timeout=10).json()
    layer = manifest["layers"][0]
    names = {"org.cncf.model.filepath": "modeling.py"}
    manifest["layers"].append({**layer, "annotations": names})
    requests.put(url, auth=login, headers={"Content-Type": kind}, json=manifest, timeout=10).raise_for_status()


def test_an_artifact_with_an_extra_layer_is_rejected(
    publish: Publish, registry_proxy: FaultProxy, real_registry: str
) -> None:
    first = publish()
    add_layer(real_registry, registry_proxy.lines("PUT")[-1])
    registry_proxy.seen.clear()
    assert publish() == first
    assert registry_proxy.lines("PUT")[-1].endswith("/manifests/v1")


def test_a_tag_that_is_moved_while_it_is_read_back_does_not_change_the_address(
    publish: Publish, registry_proxy: FaultProxy, real_registry: str
) -> None:
    moved: list[str] = []

    def rule(request: Request) -> Fault | None:
        tags = [path for path in registry_proxy.lines("PUT") if path.endswith("/manifests/v1")]
        if request.method == "GET" and "/blobs/" in request.path and tags and not moved:
            moved.extend(tags)
            add_layer(real_registry, tags[0])
        return None

    registry_proxy.rule = rule
    uri = publish()
    registry_proxy.rule = lambda _request: None
    assert moved
    assert publish() == uri


@pytest.mark.parametrize("place", range(6))
def test_an_interrupted_upload_is_finished_and_layers_are_not_sent_again(
    publish: Publish, registry_proxy: FaultProxy, contents: Contents, place: int
) -> None:
    """The registry fails from the `place`-th upload on, of six in order."""

    def rule(request: Request) -> Fault | None:
        return Fault(503) if request.method == "PUT" and len(registry_proxy.lines("PUT")) > place else None

    registry_proxy.rule = rule
    rejected(publish, ExitCode.UNREACHABLE)
    registry_proxy.rule = lambda _request: None
    registry_proxy.seen.clear()
    publish()
    assert len(registry_proxy.lines("PUT")) == 6 - place


def test_a_blob_that_arrives_changed_is_rejected_by_the_registry(
    publish: Publish, registry_proxy: FaultProxy, contents: Contents
) -> None:
    registry_proxy.rule = lambda request: Fault(corrupt_request=request.method == "PUT" and "/blobs/" in request.path)
    assert "did not arrive intact" in rejected(publish, ExitCode.UNREACHABLE)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md"])
def test_files_that_do_not_read_back_are_not_reported_as_published(
    publish: Publish, registry_proxy: FaultProxy, contents: Contents, name: str
) -> None:
    """The registry has accepted it, and reports that it has it."""
    digest = describe_files(contents)[name].sha256
    registry_proxy.rule = lambda request: Fault(corrupt=request.method == "GET" and request.path.endswith(digest))
    assert f"{name} does not read back as it was written" in rejected(publish, ExitCode.UNREACHABLE)


def test_the_adapter_of_another_job_is_never_replaced(publish: Publish) -> None:
    first = publish()
    message = rejected(publish, ExitCode.BAD_CONFIGURATION, MANIFEST.model_copy(update={"job_uid": "two"}))
    assert "holds another adapter, of job 'tiny' (UID one" in message
    assert publish() == first


def test_the_adapter_of_a_job_that_was_faster_is_never_replaced(publish: Publish, registry_proxy: FaultProxy) -> None:
    """Both jobs found the tag free; the other one ends while this one uploads."""
    published: list[str] = []

    def rule(request: Request) -> Fault | None:
        if request.method == "POST" and not published:
            registry_proxy.rule = lambda _request: None
            published.append(publish())
        return None

    registry_proxy.rule = rule
    slow = MANIFEST.model_copy(update={"job_uid": "slow"})
    message = rejected(publish, ExitCode.BAD_CONFIGURATION, slow)
    assert message.startswith("the destination oci://")
    assert "holds another adapter, of job 'tiny' (UID one" in message
    assert publish() == published[0]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (403, ExitCode.BAD_CONFIGURATION),
        (405, ExitCode.BAD_CONFIGURATION),
        (429, ExitCode.UNREACHABLE),
        (500, ExitCode.UNREACHABLE),
        (503, ExitCode.UNREACHABLE),
    ],
)
def test_a_rejection_is_permanent_and_a_server_error_is_not(
    publish: Publish, registry_proxy: FaultProxy, status: int, code: ExitCode
) -> None:
    registry_proxy.rule = lambda request: Fault(status) if request.method == "POST" else None
    message = rejected(publish, code)
    if code is ExitCode.BAD_CONFIGURATION:
        assert f"may not be written with the credentials of spec.output.secretRef (HTTP {status})" in message


def test_a_wrong_password_is_rejected_by_the_real_registry(
    publish: Publish, registry_proxy: FaultProxy, tmp_path: Path
) -> None:
    wrong = base64.b64encode(b"team:wrong").decode()
    give_login(tmp_path / "credentials" / "output", registry_proxy.address, wrong)
    # The login is read when the destination is opened.
    assert "(HTTP 401)" in rejected(publish, ExitCode.BAD_CONFIGURATION)


def test_credentials_without_write_access_are_rejected_and_no_upload_is_left(
    tmp_path: Path, registry_proxy: FaultProxy
) -> None:
    source = RegistrySource(registry_proxy.address, f"team/{uuid4().hex}", "v1", None)
    secret = Secret(tmp_path / "credentials" / "output", "spec.output.secretRef", "push")
    destination = RegistryDestination(source, secret, allowed=(f"http://{registry_proxy.address}",))
    destination.require_writable()
    begun, [canceled] = registry_proxy.lines("POST"), registry_proxy.lines("DELETE")
    assert canceled.startswith(begun[-1])
    registry_proxy.rule = lambda request: Fault(403) if request.method == "POST" else None
    with pytest.raises(StepFailure, match="may not be written") as failure:
        destination.require_writable()
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_a_secret_without_this_registry_is_reported(publish: Publish, tmp_path: Path) -> None:
    give_login(tmp_path / "credentials" / "output", "ghcr.io", LOGIN)
    assert "has no entry for 127.0.0.1:" in rejected(publish, ExitCode.BAD_CONFIGURATION)


def test_credentials_go_to_no_other_host(publish: Publish, registry_proxy: FaultProxy) -> None:
    """A token server, an upload's location and a redirect that lead elsewhere."""
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(404))) as elsewhere:
        there = f"http://{elsewhere.address}/place"
        challenge = {"WWW-Authenticate": f'Bearer realm="{there}",service="team",scope="push"'}
        registry_proxy.rule = lambda _request: Fault(401, challenge)
        assert f"redirects to http://{elsewhere.address}, where the credentials" in rejected(
            publish, ExitCode.BAD_CONFIGURATION
        )
        registry_proxy.rule = lambda request: Fault(202, {"Location": there}) if request.method == "POST" else None
        assert f"redirects to http://{elsewhere.address}, where the credentials" in rejected(
            publish, ExitCode.BAD_CONFIGURATION
        )
        assert elsewhere.seen == []
        registry_proxy.rule = lambda request: (
            Fault(307, {"Location": there}) if "Authorization" in request.headers and request.method != "POST" else None
        )
        with pytest.raises(StepFailure):
            publish()
        assert elsewhere.seen
        assert not any("Authorization" in request.headers for request in elsewhere.seen)


@pytest.mark.parametrize(("status", "code"), [(401, 10), (403, 10), (429, 200), (503, 200)])
def test_a_failing_token_server_is_retried(
    publish: Publish, registry_proxy: FaultProxy, status: int, code: int
) -> None:
    realm = f'Bearer realm="http://{registry_proxy.address}/token",service="team",scope="push"'
    registry_proxy.rule = lambda request: (
        Fault(status) if request.path.startswith("/token") else Fault(401, {"WWW-Authenticate": realm})
    )
    rejected(publish, ExitCode(code))


@pytest.mark.parametrize("answer", ["[]", "[" * 10**5, "busy", "{}", '{"token": {}}'], ids=range(5))
def test_a_token_server_that_answers_nonsense_is_named(
    publish: Publish, registry_proxy: FaultProxy, answer: str
) -> None:
    realm = f'Bearer realm="http://{registry_proxy.address}/token",service="team",scope="push"'
    registry_proxy.rule = lambda request: (
        Fault(200, body=answer.encode())
        if request.path.startswith("/token")
        else Fault(401, {"WWW-Authenticate": realm})
    )
    message = rejected(publish, ExitCode.UNREACHABLE)
    assert message.startswith(f"{registry_proxy.address} answered HTTP 200 for a token")
    assert "but not with a JSON object that has one" in message


def test_an_invalid_upload_address_is_an_error_of_the_registry(publish: Publish, registry_proxy: FaultProxy) -> None:
    registry_proxy.rule = lambda request: Fault(202, {"Location": "http://["}) if request.method == "POST" else None
    said = f"{registry_proxy.address} wants an upload to continue at 'http://[', which is not an address"
    assert said in rejected(publish, ExitCode.UNREACHABLE)


@pytest.mark.parametrize("realm", ["http://[", "https://h\\[x", "ftp://h/token", ""])
def test_a_token_server_without_an_address_gives_no_token(
    publish: Publish, registry_proxy: FaultProxy, realm: str
) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="{realm}",service="team",scope="push"'}
    registry_proxy.rule = lambda _request: Fault(401, challenge)
    assert "with the credentials of spec.output.secretRef (HTTP 401)" in rejected(publish, ExitCode.BAD_CONFIGURATION)


def test_a_redirect_to_an_invalid_address_is_an_error_of_the_registry(
    publish: Publish, registry_proxy: FaultProxy
) -> None:
    registry_proxy.rule = lambda _request: Fault(307, {"Location": "http://["})
    assert "(InvalidURL)" in rejected(publish, ExitCode.UNREACHABLE)


def test_a_token_is_got_for_the_credentials_where_the_registry_wants_one(
    publish: Publish, registry_proxy: FaultProxy
) -> None:
    """The token service of a registry, in front of the real one."""

    def rule(request: Request) -> Fault | None:
        given = request.headers.get("Authorization", "")
        if request.path.startswith("/token"):
            body = json.dumps({"token": TOKEN}).encode()
            return Fault(200, body=body) if given == f"Basic {LOGIN}" else Fault(401)
        if given == f"Bearer {TOKEN}":
            return Fault(replace={"Authorization": f"Basic {LOGIN}"})
        realm = f'Bearer realm="http://{registry_proxy.address}/token",service="team",scope="repository:x:pull,push"'
        return Fault(401, {"WWW-Authenticate": realm})

    registry_proxy.rule = rule
    assert "@sha256:" in publish()
    assert not any(TOKEN in request.path for request in registry_proxy.seen)


def test_a_huge_manifest_is_not_read_to_its_end(publish: Publish, registry_proxy: FaultProxy) -> None:
    # The bytes after the first megabytes never arrive, and the step does not wait for them.
    registry_proxy.rule = lambda _request: Fault(200, body=b" " * 2**23, cut=2**23 - 1, stall=True)
    assert "has more than 4194304 bytes" in rejected(publish, ExitCode.UNSAFE_ARTIFACT)


def test_a_huge_foreign_file_is_not_read_into_memory(publish: Publish, registry_proxy: FaultProxy) -> None:
    layer = {"digest": f"sha256:{'0' * 64}", "size": 2**40, "annotations": {"org.cncf.model.filepath": "manifest.json"}}
    registry_proxy.rule = lambda _request: Fault(200, body=json.dumps({"layers": [layer]}).encode())
    assert "has files that no QLoRAJob published" in rejected(publish, ExitCode.BAD_CONFIGURATION)
    assert not any("/blobs/" in path for path in registry_proxy.lines("GET"))
