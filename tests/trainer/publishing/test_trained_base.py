"""The published base of an adapter: loads in servers, computes what was measured, and is shared by jobs."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, configuration_utils

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.spec.output import BaseType
from qlora_trainer.core.completion import PrepareRecord, TrainRecord, read_completion
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import sync_tree
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.publishing import manifest as manifests
from qlora_trainer.publishing.trained_base import publish_base
from qlora_trainer.steps import publish as publish_step
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from qlora_trainer.stores.destinations import volume as volume_folder
from qlora_trainer.stores.destinations.destination import Destination
from qlora_trainer.stores.destinations.volume import VolumeFolder
from tests.support.commands.command import Files
from tests.support.models.tiny import JOB_UID, Recorded
from tests.support.runs.published import context
from tests.support.training import run as train

ADDRESS = "pvc://data/bases/tiny"
OTHER_ADDRESS = "pvc://data/bases/bfloat16"
OTHER_UID = "7d0c2f5e-0000-4000-8000-00000000000f"
Row = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def job(trained: Files) -> Files:
    """A trained job that publishes its base."""
    return trained.with_spec({"output": {"base": {"destination": ADDRESS}}})


def dequantized(job: Files) -> Files:
    """The job with its base in bfloat16, elsewhere."""
    return job.with_spec({"output": {"base": {"destination": OTHER_ADDRESS, "type": "bfloat16"}}})


def run(files: Files, *, uid: str = JOB_UID) -> Any:
    return publish(context(files, uid=uid), Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))


@pytest.fixture
def mirrored(job: Files) -> Files:
    """Return a job over the same data, with a copied model and an empty workspace."""
    job.workspace.rename(job.root / "first")
    shutil.copytree(job.models / "model", job.root / "models" / "mirror")
    changes = {"model": {"source": "pvc://models/mirror"}, "training": {"maxSteps": 1}}
    return replace(job, models=job.root / "models").with_spec(changes)


@contextmanager
def in_its_own_workspace(job: Files) -> Iterator[None]:
    """The first job's workspace is back in its place, and the other job's aside."""
    other, first = job.root / "second", job.root / "first"
    if job.workspace.exists():
        job.workspace.rename(other)
    first.rename(job.workspace)
    yield
    job.workspace.rename(first)
    if other.exists():
        other.rename(job.workspace)


def prepare_and_train(files: Files) -> None:
    prepare(context(files, uid=OTHER_UID), Recorded())
    train(context(files, uid=OTHER_UID))


def give_another_template(model: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# of another release #}")


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of the last change of each file."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def held_out_rows(files: Files) -> list[Row]:
    """Tokens and labels of each held-out row, out of the sequences that hold several."""
    record = read_completion(files.workspace / "records" / "prepare.json", PrepareRecord)
    assert record is not None
    data = PreparedDataset.open(files.workspace / record.data_path, "eval")
    rows: list[Row] = []
    for number in range(len(data)):
        sequence = data[number]
        lengths = list(sequence.row_lengths)
        rows += zip(sequence.input_ids.split(lengths), sequence.labels.split(lengths), strict=True)
    return rows


def loss_of(model: Any, rows: list[Row]) -> float:
    """Mean loss of the target tokens, by transformers' own formula and attention."""
    summed, targets = 0.0, 0
    for tokens, labels in rows:
        count = int((labels != -100).sum())
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            summed += count * float(model(input_ids=tokens[None], labels=labels[None]).loss)
        targets += count
    return summed / targets


def test_plain_libraries_compute_the_loss_of_training_on_the_published_base(job: Files) -> None:
    record = run(job)
    folder = job.data / "bases" / "tiny"
    trained = read_completion(job.workspace / "records" / "train.json", TrainRecord)
    assert trained is not None
    assert record.base is not None
    assert (record.base.uri, record.base.sha256) == (ADDRESS, trained.base_sha256)
    base, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not {kind: names for kind, names in report.items() if names}
    assert len(AutoTokenizer.from_pretrained(folder)) > 0
    rows = held_out_rows(job)
    assert loss_of(base, rows) == pytest.approx(trained.initial_eval_loss, rel=2e-3)
    model = PeftModel.from_pretrained(base, job.workspace / "adapter").eval()
    assert loss_of(model, rows) == pytest.approx(trained.eval_loss, rel=2e-3)
    card = (job.workspace / "adapter" / "README.md").read_text()
    assert f"`{ADDRESS}` (SHA-256 in 4-bit `{trained.base_sha256}`" in card
    assert "BitsAndBytesConfig" not in card
    assert trained.base_sha256 in (folder / "README.md").read_text()


def test_the_dequantized_base_has_the_weights_that_were_trained_on_and_their_loss(job: Files) -> None:
    run(job)
    in_4_bit = AutoModelForCausalLM.from_pretrained(job.data / "bases" / "tiny")
    assert run(dequantized(job)).base.uri == OTHER_ADDRESS
    folder = job.data / "bases" / "bfloat16"
    base, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not {kind: names for kind, names in report.items() if names}
    assert len(AutoTokenizer.from_pretrained(folder)) > 0
    weights = dict(base.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for name, weight in in_4_bit.named_parameters():
        known = dequantize_4bit(weight, weight.quant_state) if isinstance(weight, Params4bit) else weight
        assert torch.equal(weights[name], known)

    trained = read_completion(job.workspace / "records" / "train.json", TrainRecord)
    assert trained is not None
    model = PeftModel.from_pretrained(base, job.workspace / "adapter").eval()
    assert loss_of(model, held_out_rows(job)) == pytest.approx(trained.eval_loss, rel=2e-3)
    assert f"dequantized to bfloat16, at `{OTHER_ADDRESS}`" in (job.workspace / "adapter" / "README.md").read_text()
    assert "dequantized" in (folder / "README.md").read_text().splitlines()[0]
    assert not list(job.workspace.glob("*dequantized*"))


def test_jobs_share_the_dequantized_base_and_no_folder_holds_both_types(
    job: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(dequantized(job))
    before = state(job.data / "bases" / "bfloat16")
    (job.workspace / "records" / "publish.json").unlink()
    shutil.rmtree(job.workspace / "adapter")
    # The other job's transformers writes another config.json, and its first attempt was killed.
    monkeypatch.setattr(configuration_utils, "__version__", "99.0")
    (job.workspace / ".dequantized.partial").mkdir()
    assert run(dequantized(job), uid=OTHER_UID).base == first.base
    assert not (job.workspace / ".dequantized.partial").exists()
    assert state(job.data / "bases" / "bfloat16") == before
    in_its_place = job.with_spec({"output": {"base": {"destination": OTHER_ADDRESS}}})
    shutil.rmtree(job.workspace / "adapter")
    with pytest.raises(StepFailure, match="holds the 16-bit base of pvc://models/model"):
        run(in_its_place)
    shutil.rmtree(job.workspace / "adapter")
    with pytest.raises(StepFailure, match="holds the 16-bit base of pvc://models/model"):
        prepare(context(in_its_place), Recorded())


def test_jobs_on_the_same_base_share_it(job: Files) -> None:
    first = run(job)
    folder = job.data / "bases" / "tiny"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    # As another job that has trained another adapter.
    shutil.rmtree(job.workspace / "adapter")
    (job.workspace / "records" / "publish.json").unlink()
    assert run(job, uid=OTHER_UID).base == first.base
    assert run(job, uid=OTHER_UID).base == first.base
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_job_with_a_mirrored_model_and_newer_libraries_shares_the_base(
    job: Files, mirrored: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_and_train(mirrored)
    with in_its_own_workspace(job):
        first = run(job)
    folder = job.data / "bases" / "tiny"
    (folder / "README.md").chmod(0o644)
    (folder / "README.md").write_text("# The base of our team\n")
    before, inode = state(folder), folder.stat().st_ino
    monkeypatch.setattr(manifests, "version", lambda _library: "99.0")
    record = run(mirrored, uid=OTHER_UID)
    assert record.base is not None
    assert (record.base.uri, record.base.sha256) == (ADDRESS, first.base.sha256)
    assert (state(folder), folder.stat().st_ino) == (before, inode)


def test_the_base_with_another_tokenizer_is_not_overwritten(job: Files, mirrored: Files) -> None:
    give_another_template(mirrored.models / "mirror")
    prepare_and_train(mirrored)
    # The first job publishes while this one is trained.
    with in_its_own_workspace(job):
        run(job)
    before = state(job.data / "bases" / "tiny")
    message = r"holds this base with another tokenizer: choose another destination.*different: chat_template\.jinja"
    with pytest.raises(StepFailure, match=message) as failure:
        run(mirrored, uid=OTHER_UID)
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert state(job.data / "bases" / "tiny") == before


def test_prepare_names_another_tokenizer_in_the_folder(job: Files, mirrored: Files) -> None:
    with in_its_own_workspace(job):
        run(job)
    give_another_template(mirrored.models / "mirror")
    for _again in range(2):
        with pytest.raises(StepFailure, match="holds this base with another tokenizer") as failure:
            prepare(context(mirrored, uid=OTHER_UID), Recorded())
        assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert not (mirrored.workspace / "records" / "prepare.json").exists()


def test_a_job_that_another_one_overtakes_uses_its_base(job: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job.data / "bases" / "tiny"

    def overtaken(
        trained: TrainedJob, workspace: WorkspaceLayout, destination: Destination, kind: BaseType
    ) -> BaseStatus:
        def sync(stage: Path) -> None:
            monkeypatch.setattr(volume_folder, "sync_tree", sync_tree)
            publish_base(trained, workspace, VolumeFolder(folder, ADDRESS, owner="another pod"), kind)
            sync_tree(stage)

        monkeypatch.setattr(volume_folder, "sync_tree", sync)
        return publish_base(trained, workspace, destination, kind)

    monkeypatch.setattr(publish_step, "publish_base", overtaken)
    assert run(job).base.uri == ADDRESS
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_damaged_base_is_published_again(job: Files) -> None:
    first = run(job)
    weights = job.data / "bases" / "tiny" / "model.safetensors"
    whole = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run(job) == first
    assert weights.read_bytes() == whole


def of_another_quantization(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"fingerprint": "0" * 64}


def of_an_adapter(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"jobUid": OTHER_UID}


@pytest.mark.parametrize(
    ("holder", "message"),
    [(of_another_quantization, "holds the 4-bit base of pvc://models/model"), (of_an_adapter, "holds another adapter")],
)
def test_another_base_or_an_adapter_is_not_overwritten(
    job: Files, holder: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    run(job)
    path = job.data / "bases" / "tiny" / "manifest.json"
    path.chmod(0o644)
    path.write_text(json.dumps(holder(json.loads(path.read_text()))))
    with pytest.raises(StepFailure, match=message) as failure:
        run(job)
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_prepare_accepts_a_folder_that_holds_a_base_and_no_other(job: Files) -> None:
    run(job)
    shutil.rmtree(job.workspace / "adapter")
    prepare(context(job, uid=OTHER_UID), Recorded())
    (job.workspace / "records" / "prepare.json").unlink()
    in_its_place = job.with_spec({"output": {"destination": ADDRESS, "base": {"destination": "pvc://data/other"}}})
    with pytest.raises(StepFailure, match="holds the 4-bit base of"):
        prepare(context(in_its_place), Recorded())


def test_prepare_reports_another_base_in_the_folder(job: Files) -> None:
    run(job)
    path = job.data / "bases" / "tiny" / "manifest.json"
    path.chmod(0o644)
    path.write_text(json.dumps(of_another_quantization(json.loads(path.read_text()))))
    with pytest.raises(StepFailure, match=r"holds the 4-bit base of pvc://models/model .* choose another one") as found:
        prepare(context(job), Recorded())
    assert found.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_a_base_that_has_changed_since_training_is_not_published(job: Files) -> None:
    weights = next(iter((job.workspace / "base").glob("*.safetensors")))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StepFailure, match="but prepare recorded") as failure:
        run(job)
    assert failure.value.exit_code is ExitCode.UNSAFE_ARTIFACT
    assert not (job.data / "bases").exists()
