"""The step `prepare` on a volume: its files, its rejections, and its repetition."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import StableLmConfig

from qlora_api.contract import ExitCode
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.completion import PrepareRecord, read_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.data.sampling import hold_out
from qlora_trainer.model.families import admission
from qlora_trainer.model.families.family import Family
from qlora_trainer.steps.prepare import prepare
from tests.support.commands.command import Done, Files
from tests.support.failures import failing
from tests.support.models.tiny import SHAPE, Recorded, chat_row, save_model, write_rows
from tests.trainer.conftest import MakeContext


def clock() -> datetime:
    """Stands still: the record has the seconds of fetching, which differ between runs."""
    return datetime(2026, 1, 2, tzinfo=UTC)


@dataclass(frozen=True)
class Jobs:
    """Jobs over twenty rows on a volume."""

    make: MakeContext
    records: Recorded
    rows: list[dict[str, Any]]
    data: Path

    def prepare(self, spec: dict[str, Any] | None = None, model: Path | None = None) -> PrepareRecord:
        context = self.make(spec) if model is None else self.make(spec, model=model)
        return prepare(context, self.records, now=clock)

    def reject(self, code: ExitCode, model: Path) -> str:
        """The message of prepare, which ends with this code and leaves nothing behind."""
        context = self.make(model=model)
        with failing(code) as failure:
            prepare(context, self.records)
        assert not [*context.workspace.root.rglob("*")]
        return failure.value.message


@pytest.fixture
def jobs(tmp_path: Path, make_context: MakeContext, records: Recorded) -> Jobs:
    """Rows of different length are in the job's data file."""
    rows = [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(20)]
    return Jobs(make_context, records, rows, write_rows(tmp_path / "data" / "train.jsonl", rows))


@pytest.fixture
def own_model(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "own" / "model"))


def opened(context: StepContext, record: PrepareRecord, split: Any = "train") -> PreparedDataset:
    return PreparedDataset.open(context.workspace.root / record.data_path, split)


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_leaves_packed_data_and_a_record(jobs: Jobs, tiny_llama: Path) -> None:
    context = jobs.make()
    record = prepare(context, jobs.records, now=clock)
    assert read_completion(context.workspace.completion("prepare"), PrepareRecord) == record
    assert record.model_path == str(tiny_llama)
    assert record.model_revision.startswith("sha256:")
    assert record.model_type == "llama"
    assert len(record.target_modules) == 14
    assert record.packed
    data = opened(context, record)
    assert data.rows == record.dataset.used_rows == record.dataset.rows == 20
    assert data.tokens == record.dataset.tokens == sum(len(data[n].input_ids) for n in range(len(data)))
    assert len(data) < 20
    for sequence in (data[n] for n in range(len(data))):
        assert len(sequence.input_ids) == len(sequence.labels) == sum(sequence.row_lengths) <= 64
        starts = torch.tensor([0, *sequence.row_lengths]).cumsum(0)[:-1]
        assert (sequence.labels[starts] == -100).all()
    assert data.target_tokens == sum(int((data[n].labels != -100).sum()) for n in range(len(data)))
    assert not list(context.workspace.root.rglob("*.partial"))


def test_the_same_job_gives_the_same_bytes(jobs: Jobs, tmp_path: Path) -> None:
    spec = {"dataset": {"eval": {"fraction": 0.2}}}
    first = jobs.make(spec)
    prepare(first, jobs.records, now=clock)
    before = everything_below(first.workspace.root)
    shutil.rmtree(first.workspace.root)
    jobs.prepare(spec)
    assert everything_below(first.workspace.root) == before


def test_a_finished_step_succeeds_again_without_reading_the_data(jobs: Jobs, tmp_path: Path) -> None:
    record = jobs.prepare()
    before = everything_below(tmp_path / "workspace")
    (tmp_path / "data" / "train.jsonl").unlink()
    assert jobs.prepare() == record
    assert everything_below(tmp_path / "workspace") == before


def test_a_run_too_short_for_its_keep_and_early_stop_settings_is_reported(jobs: Jobs) -> None:
    def remarks(every: int) -> tuple[str, ...]:
        training = {"maxSteps": 12, "evalEverySteps": every, "keep": "best"}
        job = jobs.make({"training": training, "dataset": {"eval": {"fraction": 0.25}}})
        return prepare(job, jobs.records, now=clock).remarks

    said = "spec.training.evalEverySteps is 12 and the run has 12 steps, with no evaluations between its start and its"
    first = remarks(12)
    assert first[1].partition(" end: ")[0] == said
    assert remarks(12) == first, "not said twice"
    # The data is prepared already, and the remark is of the current job.
    assert remarks(11) == first[:1]


def test_few_steps_are_reported_with_the_settings_that_make_more(jobs: Jobs) -> None:
    (remark,) = jobs.prepare({"training": {"maxSteps": None, "epochs": 2}}).remarks
    assert remark.startswith("the run makes 10 optimizer steps (2 epochs × 10 sequences / (microBatchSize 1 × ")
    assert remark.endswith("gradientAccumulationSteps: 1 makes 20, epochs: 10 then 100")
    changed = {"gradientAccumulationSteps": 1, "epochs": 10}
    assert jobs.prepare({"training": {"maxSteps": None, **changed}}).remarks == ()


def test_a_warm_up_that_takes_the_whole_run_is_rejected_before_the_base(jobs: Jobs) -> None:
    words = "spec.training.warmupSteps is 4, and the run makes 4 optimizer steps", "set warmupSteps below 4, or train"
    context = jobs.make({"training": {"warmupSteps": 4}})
    with failing(ExitCode.BAD_CONFIGURATION, *words):
        prepare(context, jobs.records)
    assert not context.workspace.base.exists()
    assert not context.workspace.completion("prepare").exists()
    jobs.prepare({"training": {"warmupSteps": 3}})
    with failing(ExitCode.BAD_CONFIGURATION, *words):
        jobs.prepare({"training": {"warmupSteps": 4}})  # the data is prepared already


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": {"maxRows": 10}},
        {"training": {"maxSequenceLength": 48}},
        {"training": {"packing": False}},
        {"training": {"trainOn": "all"}},
        {"lora": {"targetModules": ["q_proj"]}},
    ],
)
def test_a_changed_job_is_prepared_again(jobs: Jobs, change: dict[str, Any]) -> None:
    first = jobs.prepare()
    second = jobs.prepare(change)
    assert second.fingerprint != first.fingerprint
    assert second.data_path != first.data_path


def test_changed_data_is_prepared_again(jobs: Jobs, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "eval.jsonl", jobs.rows[:2])
    context = jobs.make({"dataset": {"eval": {"source": "pvc://data/eval.jsonl"}}})
    first = prepare(context, jobs.records, now=clock)
    write_rows(tmp_path / "data" / "train.jsonl", jobs.rows[:10])
    second = prepare(context, jobs.records, now=clock)
    assert (second.dataset.used_rows, second.dataset.eval_rows) == (10, 2)
    write_rows(tmp_path / "data" / "eval.jsonl", jobs.rows[:3])
    third = prepare(context, jobs.records, now=clock)
    assert third.dataset.eval_rows == 3
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3


def test_a_setting_that_does_not_affect_the_data_changes_the_estimate_only(jobs: Jobs) -> None:
    first = jobs.prepare()
    second = jobs.prepare({"lora": {"rank": 64}, "resources": {"gpuMemory": "24Gi"}})
    assert second.fingerprint == first.fingerprint
    assert (second.memory.estimate_bytes or 0) > (first.memory.estimate_bytes or 0) > 0
    assert (first.memory.verdict, second.memory.verdict) == ("unknown", "fits")


@pytest.mark.parametrize("lost", ["manifest.json", "train.safetensors", "record"])
def test_lost_files_are_made_again(jobs: Jobs, lost: str) -> None:
    context = jobs.make()
    record = prepare(context, jobs.records, now=clock)
    path = context.workspace.completion("prepare")
    (path if lost == "record" else context.workspace.root / record.data_path / lost).unlink()
    assert prepare(context, jobs.records, now=clock) == record
    assert opened(context, record).rows == 20


@pytest.mark.parametrize("resolved", [None, {"model": "a", "tokenizer": None, "data": "b", "evalData": None}])
def test_data_with_a_damaged_manifest_are_made_again(jobs: Jobs, resolved: dict[str, Any] | None) -> None:
    context = jobs.make()
    record = prepare(context, jobs.records, now=clock)
    (context.workspace.root / record.data_path / "manifest.json").write_text(json.dumps({"resolved": resolved}))
    assert prepare(context, jobs.records, now=clock) == record


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def give_other_shapes(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors | {"token_offsets": torch.tensor(7)}, path, metadata=facts)


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, give_other_shapes, make_a_folder])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_rows_whose_file_is_damaged_are_made_again(jobs: Jobs, split: str, damage: Callable[[Path], None]) -> None:
    context = jobs.make({"dataset": {"eval": {"fraction": 0.2}}})
    record = prepare(context, jobs.records, now=clock)
    path = context.workspace.root / record.data_path / f"{split}.safetensors"
    before = path.read_bytes()
    damage(path)
    assert prepare(context, jobs.records, now=clock) == record
    assert path.read_bytes() == before


def test_rows_that_are_too_long_are_left_out_and_counted(jobs: Jobs, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [*jobs.rows, chat_row("Long?", "word " * 100)])
    status = jobs.prepare().dataset
    assert (status.rows, status.used_rows, status.too_long_rows) == (21, 20, 1)
    assert status.longest_row_tokens > 100


def test_a_family_whose_rows_see_each_other_is_not_packed(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect = admission.inspect_model

    def leaking(folder: Path, lora: LoraSpec) -> Family:
        return replace(inspect(folder, lora), one_row=True)

    monkeypatch.setattr(admission, "inspect_model", leaking)
    context = jobs.make()
    record = prepare(context, jobs.records, now=clock)
    assert not record.packed
    assert len(opened(context, record)) == 20
    with pytest.raises(StepFailure, match=r"apart, and spec\.training\.objective compares two answers in one pass"):
        jobs.prepare({"training": {"objective": "dpo"}})


@pytest.mark.parametrize(("fraction", "held_out"), [(0.001, 1), (0.2, 4), (0.999, 19)])
def test_a_fraction_is_held_out_and_neither_lost_nor_trained_on(jobs: Jobs, fraction: float, held_out: int) -> None:
    context = jobs.make({"dataset": {"eval": {"fraction": fraction}}})
    record = prepare(context, jobs.records, now=clock)
    assert (record.dataset.used_rows, record.dataset.eval_rows) == (20 - held_out, held_out)
    assert opened(context, record).rows + opened(context, record, "eval").rows == 20


def test_the_seed_alone_chooses_the_held_out_rows() -> None:
    kept, held_out = (part.tolist() for part in hold_out(1000, 0.1, 7, "rows"))
    assert sorted(kept + held_out) == list(range(1000))
    assert hold_out(1000, 0.1, 7, "rows")[1].tolist() == held_out
    assert len(set(held_out) & set(hold_out(1000, 0.1, 8, "rows")[1].tolist())) < 30


def test_only_the_first_rows_are_read_with_max_rows(jobs: Jobs) -> None:
    status = jobs.prepare({"dataset": {"maxRows": 5}}).dataset
    assert (status.rows, status.used_rows) == (5, 5)


def test_the_revision_of_a_model_on_a_volume_is_its_content(jobs: Jobs, own_model: Path) -> None:
    first = jobs.prepare(model=own_model).model_revision
    (own_model / "notes.txt").write_text("not used")
    (own_model / "pytorch_model.bin").write_text("not used")
    shutil.rmtree(own_model.parents[1] / "workspace")
    assert jobs.prepare(model=own_model).model_revision == first
    weights = load_file(own_model / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, own_model / "model.safetensors")
    shutil.rmtree(own_model.parents[1] / "workspace")
    assert jobs.prepare(model=own_model).model_revision != first


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "pvc://models/model has no config.json; it has chat_template.jinja, generation_config.json"),
        ("tokenizer.json", "pvc://models/model has no tokenizer (tokenizer.json, tokenizer.model, vocab.json)"),
        ("model.safetensors", "pvc://models/model has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_an_incomplete_model_is_rejected(jobs: Jobs, own_model: Path, missing: str, message: str) -> None:
    (own_model / missing).unlink()
    found = jobs.reject(ExitCode.MODEL_UNAVAILABLE, own_model)
    assert message in found


def test_a_missing_model_is_rejected(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    message = jobs.reject(ExitCode.MODEL_UNAVAILABLE, tmp_path / "own" / "none")
    assert message == "pvc://models/none is not a folder on the volume: check the path"


def test_a_model_folder_that_leads_out_of_its_volume_is_rejected(jobs: Jobs, own_model: Path, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "model").symlink_to(own_model)
    message = jobs.reject(ExitCode.UNSAFE_ARTIFACT, tmp_path / "volume" / "model")
    assert message.startswith("pvc://models/model is a link that leads out of its volume")


def test_incomplete_folders_of_a_killed_attempt_are_deleted(jobs: Jobs) -> None:
    context = jobs.make()
    left = context.workspace.data / ".layout.partial"
    left.mkdir(parents=True)
    (left / "train.safetensors").write_bytes(b"half")
    record = prepare(context, jobs.records, now=clock)
    assert [path.name for path in context.workspace.data.iterdir()] == [record.fingerprint]


def run(context: StepContext, tmp_path: Path, model: Path) -> Done:
    """The end of the step's command line."""
    done = Files(tmp_path, model.parent, context.spec.dump()).run("prepare")
    assert not done.stderr
    return done


def test_the_command_line_reports_the_prepared_data(jobs: Jobs, tmp_path: Path, tiny_llama: Path) -> None:
    result = run(jobs.make(), tmp_path, tiny_llama).result
    assert result.outcome == "succeeded"
    assert result.dataset is not None
    assert result.dataset.used_rows == 20
    assert (result.model_revision or "").startswith("sha256:")


def test_the_result_has_the_amount_of_computation(jobs: Jobs) -> None:
    record = jobs.prepare({"training": {"maxSteps": None, "epochs": 3}})
    assert record.work is not None
    # Every token is trained on three times.
    assert record.work.parameters > 10_000
    assert record.work.tokens == 3 * record.dataset.tokens
    # Three passes of two operations for each weight and token: forward, backward, and forward again.
    assert record.work.flops == 6 * record.work.parameters * record.work.tokens


@pytest.mark.parametrize("packing", [{"packing": True}, {"packing": None}], ids=str)
def test_the_result_lists_deviations_from_the_spec(packing: dict[str, bool | None], jobs: Jobs, tmp_path: Path) -> None:
    model = save_model(tmp_path / "stablelm" / "model", StableLmConfig(**SHAPE, initializer_range=0.1))
    result = run(jobs.make({"training": packing}), tmp_path, model).result
    assert result.outcome == "succeeded"
    assert "; no packing: rows in one sequence would affect each other in this stablelm" in result.message


def test_the_command_line_reports_why_data_is_rejected(jobs: Jobs, tmp_path: Path, tiny_llama: Path) -> None:
    context = jobs.make()
    (tmp_path / "data" / "train.jsonl").write_text('{"messages": [{"role": "us')
    result = run(context, tmp_path, tiny_llama).result
    assert (result.exit_code, result.outcome, result.reason) == (11, "failed", "BadDataset")
    assert result.message.startswith("pvc://data/train.jsonl line 1 column 24: not valid JSON")
    assert [path.name for path in context.workspace.root.iterdir()] == ["records"]
