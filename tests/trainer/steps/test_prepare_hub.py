"""Models and data sets of a hub: downloads, rejections, and retries."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qlora_api.contract import ExitCode
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.model.base.conversion import BaseConversion
from qlora_trainer.steps.prepare import prepare
from tests.support.commands.command import new_files
from tests.support.fake_hub import COMMIT, OTHER_COMMIT, FakeHub, Rejection
from tests.support.models.four_bit import manifest_of, require_made_of
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.services.hub_jobs import MODEL, rejection, tiny_hub
from tests.trainer.conftest import MakeContext

LARGE_CARD: dict[str, Any] = {"resources": {"gpuMemory": "80Gi"}}


@dataclass(frozen=True)
class HubJobs:
    """Jobs over a hub with the model acme/tiny."""

    hub: FakeHub
    make_context: MakeContext
    records: Recorded

    @property
    def repository(self) -> Path:
        """The model on the hub."""
        return self.hub.repositories["models/acme/tiny"]

    def context(self, spec: dict[str, Any] | None = None) -> StepContext:
        return self.make_context(MODEL | (spec or {}))

    def prepare(self, spec: dict[str, Any] | None = None) -> PrepareRecord:
        return prepare(self.context(spec), self.records)

    def reject(self, code: ExitCode, spec: dict[str, Any] | None = None) -> str:
        """The message of prepare, which must end with this code."""
        return rejection(self.make_context, self.records, code, spec)


@pytest.fixture
def jobs(
    tmp_path: Path, tiny_llama: Path, make_context: MakeContext, records: Recorded, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubJobs]:
    """With further files on the hub that no test reads."""
    with tiny_hub(tmp_path, tiny_llama, monkeypatch) as served:
        jobs = HubJobs(served, make_context, records)
        (jobs.repository / "pytorch_model.bin").write_bytes(b"pickle")
        (jobs.repository / "modeling_tiny.py").write_text("raise SystemExit('this must never run')")
        (jobs.repository / "README.md").write_text("# Tiny")
        yield jobs


def test_a_model_is_downloaded_at_its_commit_without_code_and_pickles(jobs: HubJobs) -> None:
    context = jobs.context()
    record = prepare(context, jobs.records)
    folder = context.workspace.root / record.model_path
    assert (record.model_path, record.model_revision) == (f"model/{COMMIT}", COMMIT)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json"}
    require_made_of(context, record, (jobs.repository / "model.safetensors").read_bytes())
    assert not set(jobs.hub.fetched) & {"pytorch_model.bin", "modeling_tiny.py", "README.md"}
    assert jobs.hub.fetched.index("config.json") == 0
    assert jobs.hub.fetched[-1] == "model.safetensors"
    activities = [line["activity"] for line in jobs.records.written]
    assert any(activity.startswith("downloading model 0.") for activity in activities)


def test_a_finished_step_succeeds_again_without_the_hub(jobs: HubJobs) -> None:
    record = jobs.prepare()
    asked = len(jobs.hub.requests)
    jobs.hub.commit = OTHER_COMMIT
    assert jobs.prepare() == record
    assert len(jobs.hub.requests) == asked


def test_a_model_that_exceeds_the_gpu_is_rejected_before_its_weights(jobs: HubJobs) -> None:
    spec = {"resources": {"gpuMemory": "8Gi"}, "training": {"maxSequenceLength": 512, "microBatchSize": 8}}
    config = jobs.repository / "config.json"
    # Few blocks, each of billions of parameters: the dry run takes time for each block, whatever its size.
    large = {"hidden_size": 16384, "intermediate_size": 57344, "num_hidden_layers": 5, "num_attention_heads": 128}
    config.write_text(json.dumps({**json.loads(config.read_text()), **large, "head_dim": 128}))
    message = jobs.reject(ExitCode.DOES_NOT_FIT, spec)
    assert "GiB of GPU memory" in message
    assert "a GPU of 8 GiB (gpuMemory of spec.resources, the profile or its nodes) has 7.8 to use" in message
    assert "to use: set spec.training.microBatchSize: 1" in message
    assert "no setting is enough, so use a larger GPU or a smaller model" in message
    assert "model.safetensors" not in jobs.hub.fetched
    assert jobs.records.findings.memory is not None
    assert jobs.records.findings.memory.verdict == "exceeds"


def test_the_estimate_of_a_model_that_fits_is_reported(jobs: HubJobs) -> None:
    memory = jobs.prepare(LARGE_CARD).memory
    assert memory.verdict == "fits"
    assert memory.budget_bytes is not None
    assert None not in (memory.low_bytes, memory.estimate_bytes, memory.high_bytes)
    sizes = [memory.low_bytes or 0, memory.estimate_bytes or 0, memory.high_bytes or 0, memory.budget_bytes]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("spec", "answer", "message"),
    [
        (
            {"model": {"source": "hf://acme/none"}},
            None,
            "model hf://acme/none does not exist, or may not be read with no",
        ),
        ({"model": {"source": "hf://acme/tiny", "revision": "v9"}}, None, "model hf://acme/tiny has no revision 'v9'"),
        (
            {},
            Rejection(401),
            "does not exist, or may not be read with no token (spec.model.tokenSecretRef)",
        ),
        ({}, Rejection(403, "GatedRepo"), "model hf://acme/tiny is gated and was asked for with no token"),
        ({}, Rejection(403), "may not be read with no token (spec.model.tokenSecretRef) (HTTP 403): check the name"),
        ({}, Rejection(410), "was rejected by http://127.0.0.1:"),
    ],
)
def test_a_model_without_permission_is_rejected(
    jobs: HubJobs, spec: dict[str, Any], answer: Rejection | None, message: str
) -> None:
    jobs.hub.reject = lambda _method, _path: answer
    assert message in jobs.reject(ExitCode.MODEL_UNAVAILABLE, spec)


@pytest.mark.parametrize("answer", [Rejection(403, "GatedRepo"), Rejection(404, "EntryNotFound")])
def test_files_without_permission_are_rejected(jobs: HubJobs, answer: Rejection) -> None:
    """The listing of a gated repository is open, its files are not."""
    jobs.hub.reject = lambda _method, path: answer if "/resolve/" in path else None
    assert "model hf://acme/tiny " in jobs.reject(ExitCode.MODEL_UNAVAILABLE)


def test_the_partial_download_of_an_older_commit_is_deleted(jobs: HubJobs) -> None:
    jobs.hub.corrupt = lambda name: name == "model.safetensors"
    jobs.reject(ExitCode.UNREACHABLE)
    jobs.hub.corrupt, jobs.hub.commits["models/acme/tiny"] = lambda _name: False, "b" * 40
    context = jobs.context()
    models = context.workspace.models
    assert [path.name for path in models.iterdir()] == [f".{COMMIT}.partial"]
    prepare(context, jobs.records)
    assert [path.name for path in models.iterdir()] == ["b" * 40]


def test_a_model_with_pickles_only_is_rejected(jobs: HubJobs) -> None:
    (jobs.repository / "model.safetensors").unlink()
    message = jobs.reject(ExitCode.UNSAFE_ARTIFACT)
    assert message.startswith("hf://acme/tiny has its weights only as pytorch_model.bin, which can run code")
    assert not jobs.hub.fetched


def in_two_files(repository: Path) -> None:
    """Put the repository's weights into two files."""
    tensors = load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    weight_map = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, repository / file)
    (repository / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_one_file_of_the_original_at_a_time_takes_room(jobs: HubJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    in_two_files(jobs.repository)
    context, convert = jobs.context(), BaseConversion.convert
    seen: list[list[str]] = []

    def convert_and_look(conversion: BaseConversion, path: Path, sha256: str) -> None:
        seen.append([found.name for found in context.workspace.models.rglob("*.safetensors")])
        convert(conversion, path, sha256)

    monkeypatch.setattr(BaseConversion, "convert", convert_and_look)
    record = prepare(context, jobs.records)
    assert seen == [["model-0.safetensors"], ["model-1.safetensors"]]
    assert not [*context.workspace.models.rglob("*.safetensors")]
    assert len([*manifest_of(context, record).sources]) == 2


def test_a_killed_preparation_downloads_no_file_again_that_is_in_the_base(jobs: HubJobs) -> None:
    in_two_files(jobs.repository)
    jobs.hub.corrupt = lambda name: name == "model-1.safetensors"
    jobs.reject(ExitCode.UNREACHABLE)
    jobs.hub.corrupt = lambda _name: False
    context = jobs.context()
    record = prepare(context, jobs.records)
    assert jobs.hub.fetched.count("model-0.safetensors") == 1
    # Nor is the model downloaded again for other data.
    other = jobs.prepare({"training": {"maxSequenceLength": 48}})
    assert jobs.hub.fetched.count("model-1.safetensors") == 2
    assert (other.base_sha256, other.model_revision) == (record.base_sha256, record.model_revision)
    assert other.fingerprint != record.fingerprint


def test_another_quantization_is_another_base_of_the_same_model(jobs: HubJobs) -> None:
    first = jobs.prepare()
    context = jobs.context({"quantization": {"type": "fp4"}})
    second = prepare(context, jobs.records)
    assert second.base_sha256 != first.base_sha256
    assert manifest_of(context, second).quantization.type == "fp4"
    assert not [*context.workspace.models.rglob("*.safetensors")]


def test_an_index_that_leads_elsewhere_is_rejected(jobs: HubJobs) -> None:
    repository = jobs.repository
    (repository / "model.safetensors").unlink()
    (repository / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../etc/passwd"}}')
    message = jobs.reject(ExitCode.UNSAFE_ARTIFACT)
    assert "model.safetensors.index.json names '../../etc/passwd'; allowed are plain names" in message


def test_weights_in_several_files_are_those_of_the_index(jobs: HubJobs) -> None:
    repository = jobs.repository
    (repository / "model.safetensors").rename(repository / "model-00001-of-00001.safetensors")
    (repository / "consolidated.safetensors").write_bytes(b"the same in another layout")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    jobs.prepare()
    assert [name for name in jobs.hub.fetched if name.endswith(".safetensors")] == ["model-00001-of-00001.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("config.json", {"auto_map": {"AutoModel": "m.M"}}, ExitCode.UNSAFE_ARTIFACT, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": "t.T"}}, ExitCode.UNSAFE_ARTIFACT, "auto_map"),
        ("config.json", {"quantization_config": {}}, ExitCode.BAD_CONFIGURATION, "quantization_config"),
        ("config.json", {"model_type": "jetmoe"}, ExitCode.BAD_CONFIGURATION, "jetmoe"),
    ],
)
def test_unusable_settings_are_rejected_before_the_weights(
    jobs: HubJobs, name: str, content: dict[str, Any], code: ExitCode, message: str
) -> None:
    path = jobs.repository / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    assert message in jobs.reject(code)
    assert "model.safetensors" not in jobs.hub.fetched


def test_a_bad_data_set_is_rejected_before_the_weights(jobs: HubJobs, tmp_path: Path) -> None:
    (tmp_path / "data" / "train.jsonl").write_text("")
    jobs.reject(ExitCode.BAD_DATASET)
    assert "model.safetensors" not in jobs.hub.fetched


def test_a_read_only_destination_is_rejected_before_anything_is_read(jobs: HubJobs) -> None:
    output = {"output": {"destination": "hf://acme/tuned"}}
    message = jobs.reject(ExitCode.BAD_CONFIGURATION, output)
    assert "set spec.output.secretRef to a Secret whose token may write" in message
    assert jobs.hub.fetched == []
    # An operator of the first contract gives this step no credentials for it.
    prepare(replace(jobs.context(output), contract_version=1), jobs.records)


def test_a_download_without_disk_space_is_not_started(jobs: HubJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    message = jobs.reject(ExitCode.STORAGE_FULL)
    assert "the download of hf://acme/tiny and its 4-bit base needs 0.4 MiB, but the workspace volume has" in message
    assert "model.safetensors" not in jobs.hub.fetched


def test_the_token_is_read_from_its_file(jobs: HubJobs, tmp_path: Path) -> None:
    jobs.hub.token = "hf_abcdefghijklmnop"
    spec = {"model": {"source": "hf://acme/tiny", "tokenSecretRef": {"name": "hub"}}}
    missing = jobs.reject(ExitCode.UNREACHABLE, spec)
    assert missing.startswith("Secret 'hub' with key 'token' (spec.model.tokenSecretRef) does not exist")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text("hf_wrong\n")
    wrong = jobs.reject(ExitCode.MODEL_UNAVAILABLE, spec)
    assert "may not be read with the token of spec.model.tokenSecretRef (HTTP 401)" in wrong
    (tmp_path / "secrets" / "token").write_text(f"{jobs.hub.token}\n")
    assert jobs.prepare(spec).model_revision == COMMIT


@pytest.fixture
def rows(jobs: HubJobs, tmp_path: Path) -> Path:
    """The repository of the data set acme/rows."""
    jobs.hub.repositories["datasets/acme/rows"] = tmp_path / "hub" / "rows"
    write_rows(tmp_path / "hub" / "rows" / "data" / "train-00000.jsonl", [chat_row("a", "b")] * 3)
    write_rows(tmp_path / "hub" / "rows" / "data" / "test-00000.jsonl", [chat_row("a", "b")] * 2)
    (tmp_path / "hub" / "rows" / "README.md").write_text("# Rows")
    shards = tmp_path / "hub" / "shards"
    jobs.hub.repositories["datasets/acme/shards"] = shards
    for name, count in {"large/0": 2, "large/1": 3, "small/0": 1, "held-out": 4}.items():
        write_rows(shards / f"{name}.jsonl", [chat_row("a", "b")] * count)
    (shards / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: large, default: true, data_files: 'large/*.jsonl'}\n"
        "- config_name: small\n  data_files:\n"
        "  - {split: train, path: small/*.jsonl}\n"
        "  - {split: validation, path: [held-out.jsonl]}\n---\n# Shards"
    )
    return tmp_path / "hub" / "rows"


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("dataset", "used", "held_out"),
    [
        ({"source": "hf://acme/rows"}, 3, 0),
        ({"source": "hf://acme/rows", "split": "test"}, 2, 0),
        ({"source": "hf://acme/rows/data/test-00000.jsonl"}, 2, 0),
        ({"source": "hf://acme/rows", "eval": {"source": "hf://acme/rows/data/test-00000.jsonl"}}, 3, 2),
        ({"source": "hf://acme/rows", "eval": {"source": "hf://acme/rows"}}, 3, 2),
        ({"source": "hf://acme/rows/data", "split": "test"}, 2, 0),
        ({"source": "hf://acme/shards"}, 5, 0),
        ({"source": "hf://acme/shards", "config": "small", "eval": {"source": "hf://acme/shards"}}, 1, 4),
    ],
)
def test_a_data_set_of_the_hub_is_found(jobs: HubJobs, dataset: dict[str, Any], used: int, held_out: int) -> None:
    record = prepare(jobs.make_context({"dataset": dataset}), jobs.records)
    assert (record.dataset.used_rows, record.dataset.eval_rows) == (used, held_out)


@pytest.mark.usefixtures("rows")
def test_a_revision_is_that_of_the_repository_that_it_is_named_for(jobs: HubJobs) -> None:
    jobs.hub.commits["datasets/acme/rows"] = "a" * 40
    dataset = {"source": "hf://acme/rows", "revision": "a" * 40}
    held_out = {"eval": {"source": "hf://acme/shards/held-out.jsonl"}}
    record = prepare(jobs.make_context({"dataset": dataset | held_out}), jobs.records)
    assert (record.dataset.used_rows, record.dataset.eval_rows) == (3, 4)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"source": "hf://acme/none"}, "dataset hf://acme/none does not exist, or may not be read with no token"),
        (
            {"source": "hf://acme/rows", "split": "dev"},
            "hf://acme/rows has no data file of the split 'dev': set spec.dataset.split, or name the file, as in",
        ),
        (
            {"source": "hf://acme/rows/x.csv"},
            "hf://acme/rows has no data file or folder 'x.csv'; it has data/test-00000.jsonl",
        ),
        (
            {"source": "hf://acme/many"},
            "hf://acme/many has files of several kinds, .csv and .jsonl: name one file, or a folder with one kind",
        ),
    ],
)
def test_a_missing_or_mixed_data_set_of_the_hub_is_rejected(
    jobs: HubJobs, rows: Path, dataset: dict[str, Any], message: str
) -> None:
    many = rows.with_name("many")
    for name in ("train-0.jsonl", "train-1.csv"):
        write_rows(many / name, [chat_row("a", "b")])
    jobs.hub.repositories["datasets/acme/many"] = many
    assert message in jobs.reject(ExitCode.BAD_DATASET, {"dataset": dataset})


def test_neither_the_token_nor_a_signed_address_is_left_anywhere(jobs: HubJobs, tmp_path: Path) -> None:
    """The real hub redirects a download to an address that works for any client."""
    jobs.hub.token = "hf_canarytokenthatreads"
    signed = iter([f"{jobs.hub.endpoint}/acme/tiny/resolve/{COMMIT}/model.safetensors?X-Amz-Signature=canary"])

    def reject(method: str, path: str) -> Rejection | None:
        location = next(signed, None) if method == "GET" and path.endswith("model.safetensors") else None
        return None if location is None else Rejection(302, location=location)

    jobs.hub.reject = reject
    files = new_files(tmp_path / "job", tmp_path, MODEL)
    done = files.run("prepare", HF_TOKEN=jobs.hub.token)
    assert done.exit_code == 0, done.stdout + done.stderr
    assert jobs.hub.tokens == {jobs.hub.token}
    left = [path.read_bytes() for path in files.root.rglob("*") if path.is_file()]
    for canary in (jobs.hub.token, "X-Amz-Signature"):
        assert not any(canary.encode() in content for content in (*left, done.stdout.encode(), done.stderr.encode()))
