"""Adapters published to a model hub: one commit, verified, without overwriting others."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_api.contract import ExitCode
from qlora_api.sources import HubSource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.publish import publish as publish_step
from qlora_trainer.stores import hub as hub_module
from qlora_trainer.stores.contents import Contents, Manifest, describe_files
from qlora_trainer.stores.destinations.destination import publish_folder
from qlora_trainer.stores.destinations.hub import HubDestination
from tests.support.commands.command import TIMEOUT_S, Files
from tests.support.fake_hub import FakeHub, Rejection, serve
from tests.support.models.tiny import Recorded
from tests.support.runs.published import MANIFEST, Publish, context, rejected
from tests.support.services.fault_proxy import Fault, FaultProxy, serve_proxy

TOKEN = "hf_CanaryTokenThatWrites"
KEY = "models/acme/tuned"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub that takes one token."""
    with serve(FakeHub(token=TOKEN, folder=tmp_path / "hub")) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setattr(hub_module, "_WAITS", ())
        yield served


@pytest.fixture
def publish(tmp_path: Path, hub: FakeHub, contents: Contents) -> Publish:
    """Publishes the adapter to hf://acme/tuned."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")

    def run(manifest: Manifest = MANIFEST) -> str:
        destination = HubDestination(HubSource("acme/tuned"), Secret(tmp_path, "spec.output.secretRef", "write"))
        return publish_folder(destination, contents, manifest.model_copy(update={"files": describe_files(contents)}))

    return run


def repository(hub: FakeHub) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in hub.repositories[KEY].iterdir() if path.name != ".gitattributes"}


def commits(hub: FakeHub) -> list[str]:
    return [request for request in hub.requests if "/commit/" in request]


def test_a_private_repository_gets_everything_in_one_commit(publish: Publish, hub: FakeHub, contents: Contents) -> None:
    assert publish() == f"hf://acme/tuned@{hub.commits[KEY]}"
    found = repository(hub)
    assert b'"jobUid": "one"' in found.pop("manifest.json")
    assert found == {
        name: content if isinstance(content, bytes) else content.read_bytes() for name, content in contents.items()
    }
    assert len(commits(hub)) == 1
    assert not any(TOKEN in request for request in hub.requests)


def test_a_token_without_write_access_is_rejected_before_publication(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    destination = HubDestination(HubSource("acme/tuned"), Secret(tmp_path, "spec.output.secretRef", "write"))
    destination.require_writable()
    hub.role = "read"
    with pytest.raises(StepFailure, match="one for reading only") as failure:
        destination.require_writable()
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    hub.repositories[KEY] = tmp_path
    with pytest.raises(StepFailure) as failure:
        destination.require_writable()
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    hub.role = "fineGrained"
    destination.require_writable()
    assert commits(hub) == []


def test_publishing_again_commits_nothing(publish: Publish, hub: FakeHub) -> None:
    assert publish() == publish()
    assert len(commits(hub)) == 1


def test_an_interrupted_upload_is_finished_and_large_files_are_not_sent_again(publish: Publish, hub: FakeHub) -> None:
    hub.reject = lambda _method, path: Rejection(500) if "/commit/" in path else None
    rejected(publish, ExitCode.UNREACHABLE)
    assert repository(hub) == {}
    hub.reject = lambda _method, _path: None
    hub.requests.clear()
    publish()
    assert "manifest.json" in repository(hub)
    assert not any("/large/" in request for request in hub.requests)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md"])
def test_a_damaged_file_is_replaced(publish: Publish, hub: FakeHub, name: str) -> None:
    publish()
    whole = repository(hub)
    (hub.repositories[KEY] / name).write_bytes(whole[name][:-1] + b"?")
    publish()
    assert repository(hub) == whole


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md", "manifest.json"])
def test_files_that_do_not_read_back_are_not_reported_as_published(publish: Publish, hub: FakeHub, name: str) -> None:
    hub.lose = lambda path: path == name
    assert f"hf://acme/tuned/{name} of commit" in rejected(publish, ExitCode.UNREACHABLE)


def test_the_adapter_of_another_job_is_never_replaced(publish: Publish, hub: FakeHub) -> None:
    publish()
    before = repository(hub)
    message = rejected(publish, ExitCode.BAD_CONFIGURATION, MANIFEST.model_copy(update={"job_uid": "two"}))
    assert "the destination hf://acme/tuned holds another adapter, of job 'tiny' (UID one" in message
    assert repository(hub) == before


def test_a_foreign_repository_is_never_written_to(publish: Publish, hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories[KEY] = tmp_path / "theirs"
    hub.repositories[KEY].mkdir()
    (hub.repositories[KEY] / "thesis.tex").write_text("years of work")
    assert "has files that no QLoRAJob published" in rejected(publish, ExitCode.BAD_CONFIGURATION)
    assert commits(hub) == []


def test_the_adapter_of_a_job_that_was_faster_is_never_replaced(publish: Publish, hub: FakeHub) -> None:
    """Both jobs found no repository; the other one commits before this one makes it."""
    fast: list[str] = []

    def overtake(_method: str, path: str) -> None:
        if path == "/api/repos/create" and not fast:
            hub.reject = lambda _method, _path: None
            fast.append(publish())

    hub.reject = overtake
    slow = MANIFEST.model_copy(update={"job_uid": "slow"})
    message = rejected(publish, ExitCode.BAD_CONFIGURATION, slow)
    assert "the destination hf://acme/tuned holds another adapter, of job 'tiny' (UID one" in message
    assert publish() == fast[0]


def test_a_concurrent_commit_is_not_overwritten(publish: Publish, hub: FakeHub) -> None:
    publish()
    (hub.repositories[KEY] / "README.md").write_text("# Tinu\n")

    def reject(_method: str, path: str) -> None:
        if "/preupload/" in path:
            hub.commits[KEY] = "0" * 40

    hub.reject = reject
    rejected(publish, ExitCode.UNREACHABLE)
    assert repository(hub)["README.md"] == b"# Tinu\n"


LOAD = """
import sys
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
save_file(get_peft_model_state_dict(PeftModel.from_pretrained(base, "acme/tuned")), sys.argv[2])
"""


def test_peft_loads_the_adapter_by_the_name_of_its_repository(trained: Files, hub: FakeHub, tmp_path: Path) -> None:
    """In a new process: the client reads the hub's address once, when it is imported."""
    files = trained.with_spec({"output": {"destination": "hf://acme/tuned", "secretRef": {"name": "write"}}})
    (tmp_path / "credentials" / "output").mkdir(parents=True)
    (tmp_path / "credentials" / "output" / "token").write_text(TOKEN)
    step = context(files)
    step = replace(step, mounts=replace(step.mounts, credentials=tmp_path / "credentials"))
    record = publish_step(step, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert record.adapter.uri == f"hf://acme/tuned@{hub.commits[KEY]}"
    loaded = tmp_path / "loaded.safetensors"
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", LOAD, str(files.models / "model"), str(loaded)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = load_file(loaded), load_file(files.workspace / "trained" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_without_write_access_is_a_permanent_failure(publish: Publish, hub: FakeHub, status: int) -> None:
    hub.reject = lambda method, _path: Rejection(status) if method == "POST" else None
    message = rejected(publish, ExitCode.BAD_CONFIGURATION)
    assert f"may not be written with the token of spec.output.secretRef (HTTP {status})" in message


@pytest.mark.parametrize("status", [429, 503])
def test_a_failing_hub_is_retried(publish: Publish, hub: FakeHub, status: int) -> None:
    hub.reject = lambda _method, path: Rejection(status) if "/commit/" in path or "/api/models/" in path else None
    rejected(publish, ExitCode.UNREACHABLE)


def test_no_token_follows_a_redirect(publish: Publish, hub: FakeHub) -> None:
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(404, body=b"{}"))) as elsewhere:
        hub.reject = lambda _method, path: Rejection(307, location=f"http://{elsewhere.address}{path}")
        with pytest.raises(StepFailure):
            publish()
    assert elsewhere.seen
    assert not any("Authorization" in request.headers for request in elsewhere.seen)
    assert not any(TOKEN in f"{request.path} {request.headers}" for request in elsewhere.seen)


def test_a_statement_about_earlier_files_goes_in_the_commit_with_the_new_ones(publish: Publish, hub: FakeHub) -> None:
    publish()
    (hub.repositories[KEY] / "lineage.intoto.json").write_bytes(b"{}")
    (hub.repositories[KEY] / "notes.txt").write_bytes(b"of somebody else")
    publish(MANIFEST.model_copy(update={"spec_sha256": "c" * 64}))
    assert "lineage.intoto.json" not in repository(hub)
    assert "notes.txt" in repository(hub)
    assert len(commits(hub)) == 2
