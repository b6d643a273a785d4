"""Earlier adapters on servers: the fetched files and the credentials used."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from qlora_api.contract import ExitCode
from qlora_api.sources import ObjectStoreSource, RegistrySource, parse_source
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import file_sha256, partial_path
from qlora_trainer.model.adapter.initial import InitialAdapter, get_initial_adapter
from qlora_trainer.model.adapter.shapes import expected_tensors
from qlora_trainer.model.architecture.text_part import text_part
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.contents import Contents, describe_files
from qlora_trainer.stores.destinations.bucket import ObjectDestination
from qlora_trainer.stores.destinations.destination import Destination, publish_folder
from qlora_trainer.stores.destinations.registry import RegistryDestination
from qlora_trainer.stores.hub import Hub
from tests.support.fake_hub import COMMIT, OTHER_COMMIT, FakeHub, serve
from tests.support.resolved import resolved_lora
from tests.support.runs.published import MANIFEST
from tests.support.servers import ACCESS_KEY, BUCKET, SECRET_KEY, give_login, s3_server
from tests.support.services.fault_proxy import FaultProxy
from tests.trainer.conftest import MakeContext

LORA = resolved_lora(rank=4, alpha=8)
TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
CONFIG = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "base_model_name_or_path": "acme/tiny"}'


@pytest.fixture
def adapter(tmp_path: Path, tiny_llama: Path) -> Path:
    """A folder with an adapter of the tiny Llama, and the other files of publish."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    shapes = expected_tensors(text_part(AutoConfig.from_pretrained(tiny_llama)), TARGETS, LORA)
    tensors = {name: torch.rand(wanted.shape, dtype=wanted.dtype) for name, wanted in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(CONFIG)
    (folder / "README.md").write_text("# Tiny")
    (folder / "handler.py").write_text("raise SystemExit('this must never run')")
    return folder


def fetched(context: StepContext, token: str | None = None) -> InitialAdapter:
    model = context.mounts.claims["models"] / "model"
    access = StoreAccess(context.mounts, lambda: Hub(token), context.secret("lora"), context.registries)
    folder = context.workspace.initial_adapter
    found = get_initial_adapter(context.spec.lora, access, folder, model, TARGETS)
    assert found is not None
    assert {path.name for path in partial_path(folder).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    return found


def rejected(context: StepContext, code: ExitCode = ExitCode.BAD_CONFIGURATION) -> str:
    with pytest.raises(StepFailure) as failure:
        fetched(context)
    assert failure.value.exit_code is code, failure.value.message
    return failure.value.message


def begins_with(make_context: MakeContext, source: str, secret: str | None = None, **more: Any) -> StepContext:
    reference = {} if secret is None else {"secretRef": {"name": secret}}
    return make_context({"lora": {"targetModules": ["q_proj"], "from": {"source": source, **reference, **more}}})


def publish(destination: Destination, folder: Path) -> str:
    contents: Contents = {path.name: path for path in folder.iterdir() if path.suffix != ".py"}
    return publish_folder(destination, contents, MANIFEST.model_copy(update={"files": describe_files(contents)}))


@pytest.fixture
def hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the adapter in acme/first."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(FakeHub({"models/acme/first": adapter})) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


def test_an_adapter_of_the_hub_is_two_files_of_one_commit(
    make_context: MakeContext, hub: FakeHub, adapter: Path
) -> None:
    status = fetched(begins_with(make_context, "hf://acme/first")).status
    assert status.source == f"hf://acme/first@{COMMIT}"
    assert status.sha256 == file_sha256(adapter / "adapter_model.safetensors")
    assert sorted(set(hub.fetched)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert fetched(begins_with(make_context, status.source)).status == status, "the status can be named as it is"
    message = rejected(begins_with(make_context, f"hf://acme/first@{OTHER_COMMIT}"))
    assert message.startswith("spec.lora.from.source: ")


def test_the_hubs_token_is_that_of_the_adapters_own_secret_or_else_the_models(
    make_context: MakeContext, hub: FakeHub, tmp_path: Path
) -> None:
    hub.token = "own"
    message = rejected(begins_with(make_context, "hf://acme/first"))
    assert message.startswith("spec.lora.from.source: ")
    fetched(begins_with(make_context, "hf://acme/first"), token="own")
    context = begins_with(make_context, "hf://acme/first", secret="reader")
    assert "Secret 'reader' with token (spec.lora.from.secretRef)" in rejected(context, ExitCode.UNREACHABLE)
    (tmp_path / "credentials" / "lora").mkdir(parents=True)
    (tmp_path / "credentials" / "lora" / "token").write_text("own")
    fetched(context)
    (tmp_path / "credentials" / "lora" / "token").write_text("another")
    assert "spec.lora.from.secretRef" in rejected(context)
    assert "another" not in rejected(context)


def test_an_adapter_larger_than_the_jobs_is_not_downloaded(
    make_context: MakeContext, hub: FakeHub, adapter: Path
) -> None:
    with (adapter / "adapter_model.safetensors").open("ab") as file:
        file.truncate(2**24)
    message = rejected(begins_with(make_context, "hf://acme/first"), ExitCode.UNSAFE_ARTIFACT)
    assert "has 16777216 bytes, and that of an adapter with this job's settings has at most" in message
    assert hub.fetched == []


def test_an_adapter_of_an_object_store_is_read_with_its_own_credentials(
    make_context: MakeContext,
    adapter: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = tmp_path / "credentials" / "lora"
    keys.mkdir(parents=True)
    (keys / "AWS_ACCESS_KEY_ID").write_text(ACCESS_KEY)
    (keys / "AWS_SECRET_ACCESS_KEY").write_text(SECRET_KEY)
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        source = ObjectStoreSource(BUCKET, "adapters/first")
        publish(ObjectDestination(source, Secret(keys, "spec.output.secretRef", "keys")), adapter)
        status = fetched(begins_with(make_context, f"{source}/", secret="keys")).status
        assert status.source == str(source)
        assert status.sha256 == file_sha256(adapter / "adapter_model.safetensors")
        message = rejected(begins_with(make_context, str(source)))
        assert "no credentials (spec.lora.from.secretRef)" in message
        message = rejected(begins_with(make_context, f"s3://{BUCKET}/adapters/none", secret="keys"))
        assert message.startswith(f"spec.lora.from.source: s3://{BUCKET}/adapters/none has no objects")


def test_an_adapter_of_a_registry_is_named_by_its_digest(
    make_context: MakeContext, registry_proxy: FaultProxy, adapter: Path, tmp_path: Path
) -> None:
    allowed = (f"http://{registry_proxy.address}",)
    keys = tmp_path / "credentials" / "lora"
    keys.mkdir()
    give_login(keys, registry_proxy.address)
    source = parse_source(f"oci://{registry_proxy.address}/adapters/first:v1")
    assert isinstance(source, RegistrySource)
    secret = Secret(keys, "spec.output.secretRef", "push")
    location = publish(RegistryDestination(source, secret, allowed=allowed), adapter)
    for named in (str(source), location):
        context = replace(begins_with(make_context, named, secret="pull"), registries=allowed)
        assert fetched(context).status.source == location
    assert registry_proxy.address in rejected(begins_with(make_context, location, secret="pull")), "it is not allowed"
