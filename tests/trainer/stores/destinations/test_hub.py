"""Adapters in a repository of a model hub: one commit to a private one, which PEFT loads by its name."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_api.contract import ExitCode
from qlora_trainer.steps.publish import publish
from tests.support.commands.command import TIMEOUT_S, Files
from tests.support.failures import failing
from tests.support.models.tiny import Recorded
from tests.support.runs.published import context, rejected
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.support.services.stores import HUB_TOKEN, HubRepository, of

pytestmark = of("hf")


def commits(store: HubRepository) -> list[str]:
    return [request for request in store.hub.requests if "/commit/" in request]


def test_a_publication_is_one_commit_and_large_files_are_sent_once(store: HubRepository) -> None:
    store.proxy.rule = lambda request: Fault(500) if "/commit/" in request.path else None
    rejected(store.publish, ExitCode.UNREACHABLE)
    assert store.stored() == {}
    store.proxy.rule = lambda _request: None
    assert store.publish() == f"{store.uri}@{store.hub.commits[store.key]}"
    assert store.uploads() == ["/large/", "/commit/"]


def test_a_token_for_some_repositories_is_tried_at_the_repository(store: HubRepository) -> None:
    store.hub.role = "read"
    with failing(ExitCode.BAD_CONFIGURATION, "one for reading only"):
        store.destination().require_writable()
    store.put("README.md", b"# Tiny\n")
    with failing(ExitCode.BAD_CONFIGURATION):
        store.destination().require_writable()
    store.hub.role = "fineGrained"
    store.destination().require_writable()
    assert commits(store) == []


def test_a_concurrent_commit_is_not_overwritten(store: HubRepository) -> None:
    store.publish()
    store.put("README.md", b"# Tinu\n")

    def overtake(request: Request) -> None:
        if "/preupload/" in request.path:
            store.hub.commits[store.key] = "0" * 40

    store.proxy.rule = overtake
    rejected(store.publish, ExitCode.UNREACHABLE)
    assert store.stored()["README.md"] == b"# Tinu\n"


@pytest.mark.parametrize("more", [-1, 1])
def test_a_file_of_another_length_than_the_hub_lists_is_not_kept(
    store: HubRepository, tmp_path: Path, more: int
) -> None:
    store.publish()
    name, listed = "adapter_model.safetensors", store.hub.pointers
    path = store.hub.repositories[store.key] / name
    size = path.stat().st_size
    listed[path] = {**listed[path], "size": size - more}
    with failing(ExitCode.UNREACHABLE, f"/{name} arrived with {size} bytes, but the hub lists {size - more}"):
        store.open().files()[name].download(tmp_path / "arrived" / name, lambda _: None)
    assert not [file for file in (tmp_path / "arrived").rglob("*") if file.is_file() and file.stat().st_size > 10**6]


def test_no_token_goes_where_a_large_file_lies(store: HubRepository, tmp_path: Path) -> None:
    """The real hub answers HEAD on a large file with its signed address."""
    store.publish()
    name, content = "adapter_model.safetensors", store.stored()["adapter_model.safetensors"]
    store.hub.tokens.clear()
    listed = store.hub.pointers[store.hub.repositories[store.key] / name]
    with serve_proxy(FaultProxy("", host="127.0.0.2", rule=lambda _request: Fault(200, body=content))) as elsewhere:
        headers = {"X-Linked-Etag": f'"{listed["sha256"]}"', "X-Linked-Size": str(listed["size"])}
        headers |= {"Location": f"http://{elsewhere.address}/signed", "X-Repo-Commit": store.hub.commits[store.key]}
        store.proxy.rule = lambda request: Fault(302, headers) if request.path.endswith(name) else None
        store.open().files()[name].download(tmp_path / "arrived" / name, lambda _: None)
    assert (tmp_path / "arrived" / name).read_bytes() == content
    assert store.hub.tokens == {HUB_TOKEN}
    assert elsewhere.lines("GET") == ["/signed"]
    assert not any(HUB_TOKEN in str(request.headers) for request in elsewhere.seen)


LOAD = """
import sys
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
save_file(get_peft_model_state_dict(PeftModel.from_pretrained(base, sys.argv[2])), sys.argv[3])
"""


def test_peft_loads_the_adapter_by_the_name_of_its_repository(
    trained: Files, store: HubRepository, tmp_path: Path
) -> None:
    """In a new process: the client reads the hub's address once, when it is imported."""
    files = trained.with_spec({"output": {"destination": store.uri, "secretRef": {"name": "write"}}})
    (tmp_path / "credentials" / "output").mkdir(parents=True)
    (tmp_path / "credentials" / "output" / "token").write_text(HUB_TOKEN)
    step = context(files)
    step = replace(step, mounts=replace(step.mounts, credentials=tmp_path / "credentials"))
    record = publish(step, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert record.adapter.uri == f"{store.uri}@{store.hub.commits[store.key]}"
    loaded = tmp_path / "loaded.safetensors"
    environment = {**os.environ, **store.place, "HF_TOKEN": HUB_TOKEN, "HF_HOME": str(tmp_path / "cache")}
    model, repository = str(files.models / "model"), store.uri.removeprefix("hf://")
    command = [sys.executable, "-c", LOAD, model, repository, str(loaded)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = load_file(loaded), load_file(files.workspace / "trained" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
