"""Models and adapters in an OCI registry, over a real one, in good weather and in bad."""

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import requests
from oras.client import OrasClient
from urllib3.util import Retry

from qlora_api.contract import ExitCode
from qlora_api.sources import RegistrySource, parse_source
from qlora_trainer import registry as registry_module
from qlora_trainer.credentials import Secret
from qlora_trainer.destination import publish_folder
from qlora_trainer.failures import StepFailure, bad_configuration
from qlora_trainer.manifest import Contents, Manifest, describe_files
from qlora_trainer.prepare import prepare
from qlora_trainer.registry import Registry
from qlora_trainer.registry_destination import RegistryDestination
from qlora_trainer.step import StepContext
from tests.trainer.command import qlora
from tests.trainer.conftest import MakeContext
from tests.trainer.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.trainer.publication import MANIFEST
from tests.trainer.servers import registry
from tests.trainer.tiny import Recorded, chat_row, write_rows

USER, PASSWORD, TOKEN = "team", "canary-registry-password", "canary-registry-token"
# bcrypt of PASSWORD with four rounds.
HTPASSWD = f"{USER}:$2b$04$fy77HFtGcLmU10SKe/D0l.F0ydvnzYtKnN8RGcSPzOg3iPlXt/t6i\n"
LOGIN = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
Publish = Callable[..., str]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that wants a password."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "htpasswd").write_text(HTPASSWD)
    with registry(folder, passwords=folder / "htpasswd") as address:
        yield address


@pytest.fixture
def proxy(real: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The registry that the profile allows, behind a proxy. The Secrets of model and output open it."""
    monkeypatch.setattr(registry_module, "_RETRY", Retry(total=0))
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")])
    with serve_proxy(FaultProxy(real)) as served:
        for part in ("model", "output"):
            (tmp_path / "credentials" / part).mkdir(parents=True)
            give_login(tmp_path / "credentials" / part, served.address, LOGIN)
        yield served


def give_login(folder: Path, host: str, login: str) -> None:
    (folder / ".dockerconfigjson").write_text(json.dumps({"auths": {host: {"auth": login}}}))


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"weights" * 10**6)
    return {"README.md": b"# Tiny\n", "adapter_config.json": b"{}", weights.name: weights}


@pytest.fixture
def publish(tmp_path: Path, proxy: FaultProxy, contents: Contents) -> Publish:
    """Publishes the adapter to a tag of a repository of the test's own."""
    source = parse_source(f"oci://{proxy.address}/team/{uuid4().hex}:v1")
    assert isinstance(source, RegistrySource)
    secret = Secret(tmp_path / "credentials" / "output", "spec.output.secretRef", "push")

    def run(manifest: Manifest = MANIFEST) -> str:
        destination = RegistryDestination(source, secret, allowed=(f"http://{proxy.address}",))
        return publish_folder(destination, contents, manifest.model_copy(update={"files": describe_files(contents)}))

    return run


def refused(publish: Publish, code: ExitCode, manifest: Manifest = MANIFEST) -> str:
    with pytest.raises(StepFailure) as failure:
        publish(manifest)
    assert failure.value.exit_code is code, failure.value.message
    assert not any(canary in failure.value.message for canary in (PASSWORD, LOGIN, TOKEN))
    return failure.value.message


def pulled(uri: str, real: str, folder: Path) -> dict[str, bytes]:
    """What `oras pull` leaves of the artefact, from the registry itself."""
    give_login(folder, real, LOGIN)
    reference = f"{real}/{uri.removeprefix('oci://').partition('/')[2]}"
    client = OrasClient(insecure=True, auth_backend="basic")
    client.pull(reference, config_path=str(folder / ".dockerconfigjson"), outdir=str(folder / "pulled"))
    return {path.name: path.read_bytes() for path in (folder / "pulled").iterdir()}


def uploads(proxy: FaultProxy) -> int:
    """Blobs that were begun to be sent."""
    return len(proxy.lines("POST"))


def test_oras_pull_gives_the_folder(
    publish: Publish, proxy: FaultProxy, contents: Contents, real: str, tmp_path: Path
) -> None:
    uri = publish()
    found = pulled(uri, real, tmp_path)
    assert b'"jobUid": "one"' in found.pop("manifest.json")
    assert found == {
        name: content if isinstance(content, bytes) else content.read_bytes() for name, content in contents.items()
    }
    assert proxy.lines("PUT")[-1].rpartition("/")[2] == "v1"
    (artefact,) = {uri.rpartition("@")[2]}
    assert artefact.startswith("sha256:")
    assert not any(canary in request.path for request in proxy.seen for canary in (PASSWORD, LOGIN))


def test_the_artefact_is_a_model_pack(publish: Publish, real: str) -> None:
    reference = publish().removeprefix("oci://").partition("/")[2]
    repository, _, digest = reference.replace(":v1", "").partition("@")
    answer = requests.get(
        f"http://{real}/v2/{repository}/manifests/{digest}",
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


def test_publishing_again_uploads_nothing(publish: Publish, proxy: FaultProxy) -> None:
    first = publish()
    proxy.seen.clear()
    assert publish() == first
    assert proxy.lines("POST") == proxy.lines("PUT") == []


@pytest.mark.parametrize("place", range(6))
def test_an_interrupted_upload_is_finished_and_layers_are_not_sent_again(
    publish: Publish, proxy: FaultProxy, contents: Contents, place: int
) -> None:
    """The registry fails from the `place`-th upload on: three files, the manifest, the configuration, the tag."""

    def rule(request: Request) -> Fault | None:
        return Fault(503) if request.method == "PUT" and len(proxy.lines("PUT")) > place else None

    proxy.rule = rule
    refused(publish, ExitCode.UNREACHABLE)
    proxy.rule = lambda _request: None
    proxy.seen.clear()
    publish()
    assert len(proxy.lines("PUT")) == 6 - place


def test_a_blob_that_arrives_changed_is_refused_by_the_registry(
    publish: Publish, proxy: FaultProxy, contents: Contents
) -> None:
    proxy.rule = lambda request: Fault(corrupt_request=request.method == "PUT" and "/blobs/" in request.path)
    assert "did not arrive as it was sent" in refused(publish, ExitCode.UNREACHABLE)


def test_the_adapter_of_another_job_is_never_replaced(publish: Publish) -> None:
    first = publish()
    message = refused(publish, ExitCode.BAD_CONFIGURATION, MANIFEST.model_copy(update={"job_uid": "two"}))
    assert "holds another adapter, of job 'tiny' (UID one" in message
    assert publish() == first


def test_the_adapter_of_a_job_that_was_faster_is_never_replaced(publish: Publish, proxy: FaultProxy) -> None:
    """Both jobs found the tag free; the other one ends while this one uploads."""
    published: list[str] = []

    def rule(request: Request) -> Fault | None:
        if request.method == "POST" and not published:
            proxy.rule = lambda _request: None
            published.append(publish())
        return None

    proxy.rule = rule
    slow = MANIFEST.model_copy(update={"job_uid": "slow"})
    assert "another job has just published to oci://" in refused(publish, ExitCode.BAD_CONFIGURATION, slow)
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
def test_a_refusal_is_permanent_and_trouble_is_not(
    publish: Publish, proxy: FaultProxy, status: int, code: ExitCode
) -> None:
    proxy.rule = lambda request: Fault(status) if request.method == "POST" else None
    message = refused(publish, code)
    if code is ExitCode.BAD_CONFIGURATION:
        assert f"may not be written with the credentials of spec.output.secretRef (HTTP {status})" in message


def test_a_wrong_password_is_refused_by_the_real_registry(publish: Publish, proxy: FaultProxy, tmp_path: Path) -> None:
    wrong = base64.b64encode(b"team:wrong").decode()
    give_login(tmp_path / "credentials" / "output", proxy.address, wrong)
    # The login is read when the destination is opened.
    assert "(HTTP 401)" in refused(publish, ExitCode.BAD_CONFIGURATION)


def test_a_secret_without_this_registry_says_so(publish: Publish, tmp_path: Path) -> None:
    give_login(tmp_path / "credentials" / "output", "ghcr.io", LOGIN)
    assert "has no entry for 127.0.0.1:" in refused(publish, ExitCode.BAD_CONFIGURATION)


def test_credentials_go_to_no_other_host(publish: Publish, proxy: FaultProxy) -> None:
    """A token server, an upload's place and a redirect that lead elsewhere."""
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(404))) as elsewhere:
        there = f"http://{elsewhere.address}/place"
        challenge = {"WWW-Authenticate": f'Bearer realm="{there}",service="team",scope="push"'}
        proxy.rule = lambda _request: Fault(401, challenge)
        assert f"sends us to http://{elsewhere.address}, where the credentials" in refused(
            publish, ExitCode.BAD_CONFIGURATION
        )
        proxy.rule = lambda request: Fault(202, {"Location": there}) if request.method == "POST" else None
        assert f"sends us to http://{elsewhere.address}, where the credentials" in refused(
            publish, ExitCode.BAD_CONFIGURATION
        )
        assert elsewhere.seen == []
        proxy.rule = lambda request: (
            Fault(307, {"Location": there}) if "Authorization" in request.headers and request.method != "POST" else None
        )
        with pytest.raises(StepFailure):
            publish()
        assert elsewhere.seen
        assert not any("Authorization" in request.headers for request in elsewhere.seen)


def test_credentials_do_not_leave_tls_for_the_same_host(tmp_path: Path) -> None:
    """Registries behind a proxy that ends TLS tell clients to go on without it."""
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(401))) as plain:
        source = parse_source(f"oci://{plain.address}/team/tiny:v1")
        assert isinstance(source, RegistrySource)
        give_login(tmp_path, plain.address, LOGIN)
        opened = Registry(
            source,
            Secret(tmp_path, "spec.output.secretRef", "push"),
            allowed=(plain.address,),
            refuse=bad_configuration,
        )
        with pytest.raises(StepFailure, match=f"sends us to http://{plain.address}, where the credentials"):
            opened._session.get(f"http://{plain.address}/v2/", headers={"Authorization": f"Basic {LOGIN}"})
        assert plain.seen == []


@pytest.mark.parametrize(("status", "code"), [(401, 10), (403, 10), (429, 200), (503, 200)])
def test_a_token_server_in_trouble_is_tried_again(publish: Publish, proxy: FaultProxy, status: int, code: int) -> None:
    realm = f'Bearer realm="http://{proxy.address}/token",service="team",scope="push"'
    proxy.rule = lambda request: (
        Fault(status) if request.path.startswith("/token") else Fault(401, {"WWW-Authenticate": realm})
    )
    refused(publish, ExitCode(code))


def test_a_token_is_got_for_the_credentials_where_the_registry_wants_one(publish: Publish, proxy: FaultProxy) -> None:
    """The token service of a registry, in front of the real one."""

    def rule(request: Request) -> Fault | None:
        given = request.headers.get("Authorization", "")
        if request.path.startswith("/token"):
            body = json.dumps({"token": TOKEN}).encode()
            return Fault(200, body=body) if given == f"Basic {LOGIN}" else Fault(401)
        if given == f"Bearer {TOKEN}":
            return Fault(replace={"Authorization": f"Basic {LOGIN}"})
        realm = f'Bearer realm="http://{proxy.address}/token",service="team",scope="repository:x:pull,push"'
        return Fault(401, {"WWW-Authenticate": realm})

    proxy.rule = rule
    assert "@sha256:" in publish()
    assert not any(TOKEN in request.path for request in proxy.seen)


@pytest.fixture
def model(proxy: FaultProxy, tiny_llama: Path, tmp_path: Path) -> str:
    """Address of a model in the registry, by tag."""
    source = parse_source(f"oci://{proxy.address}/models/{uuid4().hex}:v1")
    assert isinstance(source, RegistrySource)
    secret = Secret(tmp_path / "credentials" / "model", "spec.output.secretRef", "push")
    files = {path.name: path for path in tiny_llama.iterdir()}
    destination = RegistryDestination(source, secret, allowed=(f"http://{proxy.address}",))
    destination.write(files, MANIFEST.model_copy(update={"files": describe_files(files)}))
    proxy.seen.clear()
    return str(source)


def with_model(make_context: MakeContext, proxy: FaultProxy, source: str) -> StepContext:
    context = make_context({"model": {"source": source, "secretRef": {"name": "pull"}}})
    return replace(context, registries=(f"http://{proxy.address}",))


def unusable(context: StepContext, records: Recorded, code: ExitCode) -> str:
    """The message with which prepare ends with `code`, without a credential in it or left behind."""
    with pytest.raises(StepFailure) as failure:
        prepare(context, records)
    assert failure.value.exit_code is code, failure.value.message
    left = [path.read_bytes() for path in context.workspace.root.rglob("*") if path.is_file()]
    for canary in (PASSWORD, LOGIN):
        assert not any(canary.encode() in content for content in (*left, failure.value.message.encode()))
    return failure.value.message


def test_a_model_is_downloaded_and_its_revision_is_the_digest(
    make_context: MakeContext, records: Recorded, proxy: FaultProxy, model: str, tiny_llama: Path
) -> None:
    context = with_model(make_context, proxy, model)
    record = prepare(context, records)
    folder = context.workspace.root / record.model_path
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tiny_llama / name).read_bytes()
    assert not (folder / "manifest.json").exists()
    shutil.rmtree(context.workspace.root)
    pinned = with_model(make_context, proxy, f"{model.removesuffix(':v1')}@{record.model_revision}")
    assert prepare(pinned, records).model_revision == record.model_revision


def of_weights(proxy: FaultProxy, tiny_llama: Path) -> Callable[[Request], bool]:
    digest = describe_files({"w": tiny_llama / "model.safetensors"})["w"].sha256
    return lambda request: request.method == "GET" and request.path.endswith(f"/blobs/sha256:{digest}")


def test_a_download_goes_on_where_it_was_cut_off(
    make_context: MakeContext, records: Recorded, proxy: FaultProxy, model: str, tiny_llama: Path
) -> None:
    wanted = of_weights(proxy, tiny_llama)
    proxy.rule = lambda request: Fault(cut=100_000) if wanted(request) else None
    context = with_model(make_context, proxy, model)
    unusable(context, records, ExitCode.UNREACHABLE)
    (partial,) = context.workspace.models.rglob("*.part")
    kept = partial.stat().st_size
    proxy.rule = lambda _request: None
    proxy.seen.clear()
    record = prepare(context, records)
    asked = [request.headers.get("Range") for request in proxy.seen if wanted(request)]
    assert asked[-1] == f"bytes={kept}-"
    assert 0 < kept <= 100_000
    found = context.workspace.root / record.model_path / "model.safetensors"
    assert found.read_bytes() == (tiny_llama / "model.safetensors").read_bytes()


def test_a_transfer_that_stalls_is_given_up(
    make_context: MakeContext,
    records: Recorded,
    proxy: FaultProxy,
    model: str,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry_module, "_TIMEOUTS", (1, 0.2))
    wanted = of_weights(proxy, tiny_llama)
    proxy.rule = lambda request: Fault(cut=100_000, stall=True) if wanted(request) else None
    message = unusable(with_model(make_context, proxy, model), records, ExitCode.UNREACHABLE)
    assert "cannot be reached, or broke off" in message


def test_a_layer_that_arrives_changed_is_loaded_again(
    make_context: MakeContext, records: Recorded, proxy: FaultProxy, model: str, tiny_llama: Path
) -> None:
    wanted = of_weights(proxy, tiny_llama)
    proxy.rule = lambda request: Fault(corrupt=wanted(request))
    context = with_model(make_context, proxy, model)
    assert "model.safetensors has another SHA-256 than its digest" in unusable(context, records, ExitCode.UNREACHABLE)
    proxy.rule = lambda _request: None
    assert prepare(context, records).model_revision.startswith("sha256:")


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (Fault(403), ExitCode.MODEL_UNAVAILABLE, "may not be read with the credentials of spec.model.secretRef"),
        (Fault(404), ExitCode.MODEL_UNAVAILABLE, "does not exist: check repository and tag"),
        (Fault(503), ExitCode.UNREACHABLE, "answered HTTP 503"),
        (Fault(200, body=b"busy"), ExitCode.MODEL_UNAVAILABLE, "is no artefact with layers"),
        (Fault(200, body=b'{"layers": [1]}'), ExitCode.MODEL_UNAVAILABLE, "is no artefact with layers"),
        (Fault(200, body=b'{"layers": []}'), ExitCode.MODEL_UNAVAILABLE, "has neither model.safetensors nor"),
    ],
)
def test_an_artefact_that_is_no_model_is_refused(
    make_context: MakeContext,
    records: Recorded,
    proxy: FaultProxy,
    model: str,
    answer: Fault,
    code: ExitCode,
    words: str,
) -> None:
    proxy.rule = lambda _request: answer
    assert words in unusable(with_model(make_context, proxy, model), records, code)


def test_a_huge_manifest_is_not_read_to_its_end(publish: Publish, proxy: FaultProxy) -> None:
    # What is behind the first megabytes never arrives, and nobody waits for it.
    proxy.rule = lambda _request: Fault(200, body=b" " * 2**23, cut=2**23 - 1, stall=True)
    assert "has more than 4194304 bytes" in refused(publish, ExitCode.UNSAFE_ARTEFACT)


def test_a_huge_file_of_somebody_else_is_not_read_into_memory(publish: Publish, proxy: FaultProxy) -> None:
    layer = {"digest": f"sha256:{'0' * 64}", "size": 2**40, "annotations": {"org.cncf.model.filepath": "manifest.json"}}
    proxy.rule = lambda _request: Fault(200, body=json.dumps({"layers": [layer]}).encode())
    assert "holds something that no QLoRAJob has published" in refused(publish, ExitCode.BAD_CONFIGURATION)
    assert not any("/blobs/" in path for path in proxy.lines("GET"))


def test_a_manifest_of_another_digest_is_refused(
    make_context: MakeContext, records: Recorded, proxy: FaultProxy, model: str
) -> None:
    proxy.rule = lambda _request: Fault(200, body=b'{"layers": []}')
    pinned = f"{model.removesuffix(':v1')}@sha256:{'0' * 64}"
    unusable(with_model(make_context, proxy, pinned), records, ExitCode.UNSAFE_ARTEFACT)


def test_a_registry_that_the_administrator_does_not_allow_is_never_asked(
    make_context: MakeContext, records: Recorded, proxy: FaultProxy, model: str
) -> None:
    context = replace(with_model(make_context, proxy, model), registries=("ghcr.io",))
    message = unusable(context, records, ExitCode.BAD_CONFIGURATION)
    assert "is not among those that the profile allows (ghcr.io)" in message
    destination = {"output": {"destination": "oci://registry.example.org/team/tuned:v1"}}
    assert "oci://registry.example.org/team/tuned:v1" in unusable(
        make_context(destination), records, ExitCode.BAD_CONFIGURATION
    )
    assert proxy.seen == []


def test_a_laptop_allows_the_registries_that_its_job_names(proxy: FaultProxy, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    spec = {
        "model": {"source": f"oci://{proxy.address}/models/tiny:v1"},
        "dataset": {"source": "pvc://data/train.jsonl"},
    }
    document = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": {"name": "tiny"}, "spec": spec}
    job.write_text(json.dumps(document))
    options = ("--workspace", str(tmp_path / "workspace"), "--volume", f"data={tmp_path / 'data'}", "--device", "cpu")
    done = qlora("run", str(job), *options, HOME=str(tmp_path))
    assert done.returncode == ExitCode.MODEL_UNAVAILABLE
    assert "may not be read with no credentials (spec.model.secretRef) (HTTP 401)" in " ".join(done.stdout.split())
    assert proxy.seen
