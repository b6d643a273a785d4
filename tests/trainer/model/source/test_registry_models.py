"""Models in an OCI registry, over a real one: downloads, rejections, and retries."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import requests

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.sources import RegistrySource, parse_source
from qlora_cli.local import run as local
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.stores.contents import describe_files
from qlora_trainer.stores.destinations.registry import RegistryDestination
from qlora_trainer.stores.registry import MANIFEST_TYPE
from tests.support.commands.command import invoked
from tests.support.models.four_bit import require_made_of
from tests.support.models.tiny import Recorded
from tests.support.runs.forked_step import start_forked
from tests.support.runs.published import MANIFEST
from tests.support.servers import LOGIN, PASSWORD, USER, give_login
from tests.support.services.fault_proxy import Fault, FaultProxy, Request
from tests.trainer.conftest import MakeContext

Wanted = Callable[[Request], bool]


@pytest.fixture
def model(registry_proxy: FaultProxy, tiny_llama: Path, tmp_path: Path) -> str:
    """Address of a model in the registry, by tag."""
    source = parse_source(f"oci://{registry_proxy.address}/models/{uuid4().hex}:v1")
    assert isinstance(source, RegistrySource)
    secret = Secret(tmp_path / "credentials" / "model", "spec.output.secretRef", "push")
    files = {path.name: path for path in tiny_llama.iterdir()}
    destination = RegistryDestination(source, secret, allowed=(f"http://{registry_proxy.address}",))
    destination.write(files, MANIFEST.model_copy(update={"files": describe_files(files)}))
    registry_proxy.seen.clear()
    return str(source)


def with_model(make_context: MakeContext, registry_proxy: FaultProxy, source: str) -> StepContext:
    context = make_context({"model": {"source": source, "secretRef": {"name": "pull"}}})
    return replace(context, registries=(f"http://{registry_proxy.address}",))


@pytest.fixture
def context(make_context: MakeContext, registry_proxy: FaultProxy, model: str) -> StepContext:
    """A job that trains the model."""
    return with_model(make_context, registry_proxy, model)


def unusable(context: StepContext, code: ExitCode) -> str:
    """Return prepare's message for `code`. No credential is in it or in a file."""
    with pytest.raises(StepFailure) as failure:
        prepare(context, Recorded())
    assert failure.value.exit_code is code, failure.value.message
    left = [path.read_bytes() for path in context.workspace.root.rglob("*") if path.is_file()]
    for canary in (PASSWORD, LOGIN):
        assert not any(canary.encode() in content for content in (*left, failure.value.message.encode()))
    return failure.value.message


def test_a_model_is_downloaded_and_its_revision_is_the_digest(
    context: StepContext, make_context: MakeContext, registry_proxy: FaultProxy, model: str, tiny_llama: Path
) -> None:
    record = prepare(context, Recorded())
    folder = context.workspace.root / record.model_path
    for name in ("config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tiny_llama / name).read_bytes()
    require_made_of(context, record, (tiny_llama / "model.safetensors").read_bytes())
    assert not (folder / "manifest.json").exists()
    shutil.rmtree(context.workspace.root)
    pinned = with_model(make_context, registry_proxy, f"{model.removesuffix(':v1')}@{record.model_revision}")
    assert prepare(pinned, Recorded()).model_revision == record.model_revision


@pytest.fixture
def wanted(tiny_llama: Path) -> Wanted:
    """Whether a request is for the weights."""
    digest = describe_files({"w": tiny_llama / "model.safetensors"})["w"].sha256
    return lambda request: request.method == "GET" and request.path.endswith(f"/blobs/sha256:{digest}")


def in_cache(context: StepContext, root: Path, name: str) -> StepContext:
    """The same job under another name, with a cache for models."""
    (root / "cache").mkdir(exist_ok=True)
    return replace(
        context,
        workspace=WorkspaceLayout(root / "workspaces" / name),
        mounts=replace(context.mounts, model_cache=root / "cache"),
        pod_uid=name,
    )


def test_jobs_that_share_a_cache_load_weights_once_and_use_their_own_logins(
    context: StepContext, registry_proxy: FaultProxy, tmp_path: Path, wanted: Wanted
) -> None:
    registry_proxy.rule = lambda request: Fault(cut=100_000) if wanted(request) else None
    unusable(in_cache(context, tmp_path, "first"), ExitCode.UNREACHABLE)
    registry_proxy.rule = lambda _request: None
    records_of = [prepare(in_cache(context, tmp_path, name), Recorded()) for name in ("first", "second")]
    assert [record.base and record.base.origin for record in records_of] == ["downloaded", "cache"]
    asked = [request.headers.get("Range") for request in registry_proxy.seen if wanted(request)]
    assert asked == [None, "bytes=65536-"]
    assert records_of[0].base_path == records_of[1].base_path
    give_login(tmp_path / "credentials" / "model", registry_proxy.address, login="d3Jvbmc6bG9naW4=")
    unusable(in_cache(context, tmp_path, "third"), ExitCode.MODEL_UNAVAILABLE)


def test_a_layer_that_the_registry_no_longer_has_is_not_taken_from_the_cache(
    context: StepContext, registry_proxy: FaultProxy, tmp_path: Path, wanted: Wanted
) -> None:
    prepare(in_cache(context, tmp_path, "first"), Recorded())
    registry_proxy.rule = lambda request: Fault(404) if wanted(replace(request, method="GET")) else None
    message = unusable(in_cache(context, tmp_path, "second"), ExitCode.MODEL_UNAVAILABLE)
    assert "has no blob for model.safetensors" in message


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (Fault(403), ExitCode.MODEL_UNAVAILABLE, "may not be read with the credentials of spec.model.secretRef"),
        (Fault(404), ExitCode.MODEL_UNAVAILABLE, "does not exist: check repository and tag"),
        (Fault(503), ExitCode.UNREACHABLE, "answered HTTP 503"),
        (Fault(200, body=b"busy"), ExitCode.MODEL_UNAVAILABLE, "is not an artifact with layers"),
        (Fault(200, body=b'{"layers": [1]}'), ExitCode.MODEL_UNAVAILABLE, "is not an artifact with layers"),
        (Fault(200, body=b'{"layers": []}'), ExitCode.MODEL_UNAVAILABLE, "has neither model.safetensors nor"),
    ],
)
def test_an_artifact_that_is_not_a_model_is_rejected(
    context: StepContext, registry_proxy: FaultProxy, answer: Fault, code: ExitCode, words: str
) -> None:
    registry_proxy.rule = lambda _request: answer
    assert words in unusable(context, code)


def layer(part: str, name: str) -> dict[str, Any]:
    """Return modctl's layer. `part`: the format's kind and packing, as weight.v1.tar."""
    return {
        "mediaType": f"application/vnd.cncf.model.{part}",
        "digest": f"sha256:{'0' * 64}",
        "size": 1024,
        "annotations": {"org.cncf.model.filepath": name},
    }


def test_an_archive_that_holds_a_model_is_rejected_with_a_remedy(
    context: StepContext, registry_proxy: FaultProxy, model: str
) -> None:
    layers = [
        layer("weight.config.v1.raw", "config.json"),
        layer("weight.config.v1.tar", "tokenizer.json"),
        layer("weight.v1.tar", "model.safetensors"),
        layer("doc.v1.tar", "README.md"),
        {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"},
    ]
    registry_proxy.rule = lambda _request: Fault(200, body=json.dumps({"layers": layers}).encode())
    message = unusable(context, ExitCode.MODEL_UNAVAILABLE)
    named = "application/vnd.oci.image.layer.v1.tar+gzip, model.safetensors, tokenizer.json"
    assert message.startswith(f"{model} has {named} in archives (.tar, the default of modctl)")
    assert "push it with one layer for each file, as `modctl build --raw` does" in message


def test_documentation_in_an_archive_does_no_harm(context: StepContext, registry_proxy: FaultProxy, model: str) -> None:
    place = model.removeprefix("oci://").partition("/")[2].replace(":", "/manifests/")
    address, accept = f"http://{registry_proxy.address}/v2/{place}", {"Accept": MANIFEST_TYPE}
    found = requests.get(address, auth=(USER, PASSWORD), headers=accept, timeout=60).json()
    docs = {**layer("doc.v1.tar", "docs"), "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"}
    found["layers"] += [layer("doc.v1.tar", "README.md"), docs]
    body = json.dumps(found).encode()
    registry_proxy.rule = lambda request: Fault(200, body=body) if "/manifests/" in request.path else None
    record = prepare(context, Recorded())
    assert record.model_revision == f"sha256:{sha256(body).hexdigest()}"


def test_a_manifest_of_another_digest_is_rejected(
    make_context: MakeContext, registry_proxy: FaultProxy, model: str
) -> None:
    registry_proxy.rule = lambda _request: Fault(200, body=b'{"layers": []}')
    pinned = f"{model.removesuffix(':v1')}@sha256:{'0' * 64}"
    unusable(with_model(make_context, registry_proxy, pinned), ExitCode.UNSAFE_ARTIFACT)


def test_a_registry_that_the_administrator_does_not_allow_gets_no_request(
    context: StepContext, make_context: MakeContext, registry_proxy: FaultProxy
) -> None:
    context = replace(context, registries=("ghcr.io",))
    message = unusable(context, ExitCode.BAD_CONFIGURATION)
    assert "is not among those that the profile allows (ghcr.io)" in message
    destination = {"output": {"destination": "oci://registry.example.org/team/tuned:v1"}}
    assert "oci://registry.example.org/team/tuned:v1" in unusable(make_context(destination), ExitCode.BAD_CONFIGURATION)
    assert registry_proxy.seen == []


def test_a_laptop_allows_the_registries_that_its_job_names(
    registry_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=start_forked, PIPE=subprocess.PIPE))
    monkeypatch.setenv("HOME", str(tmp_path))
    job = tmp_path / "job.yaml"
    spec = {
        "model": {"source": f"oci://{registry_proxy.address}/models/tiny:v1"},
        "dataset": {"source": "pvc://data/train.jsonl"},
    }
    document = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "metadata": {"name": "tiny"}, "spec": spec}
    job.write_text(json.dumps(document))
    options = ("--workspace", str(tmp_path / "workspace"), "--volume", f"data={tmp_path / 'data'}", "--device", "cpu")
    done = invoked("run", str(job), *options)
    assert done.returncode == ExitCode.MODEL_UNAVAILABLE
    assert "may not be read with no credentials (spec.model.secretRef) (HTTP 401)" in " ".join(done.stdout.split())
    assert registry_proxy.seen
