"""The settings that a job leaves to prepare: chosen from its rows, recorded, trained with, and kept."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qlora_api import automatic
from qlora_api.contract import ExitCode
from qlora_api.spec.resolved import open_settings
from qlora_trainer.core.completion import PrepareRecord, asked_sha256, read_completion
from qlora_trainer.core.context import Device
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.losses.batch import Batch, MicroBatch, read_batch
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.training import loop
from tests.support.commands.command import Files
from tests.support.failures import failing
from tests.support.manifests import merged
from tests.support.models.tiny import SHAPE, Recorded, chat_row, save_model, write_rows
from tests.support.resolved import OPEN
from tests.support.training import history, interrupted_at, run
from tests.trainer.conftest import MakeContext

FEW: dict[str, Any] = merged(OPEN, {"training": {"maxSteps": 4, "saveEverySteps": 2}})
"""A job whose length is set, and a few rows are enough."""


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., None]:
    """Writes so many rows, and others."""

    def write(count: int, *others: dict[str, Any]) -> None:
        short = [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(count)]
        write_rows(tmp_path / "data" / "train.jsonl", [*short, *others])

    return write


def values(record: PrepareRecord) -> dict[str, Any]:
    """The choices, by the last part of their path."""
    return {each.name: each.parsed for each in record.settings}


def reason(record: PrepareRecord, name: str) -> str:
    return next(each.reason for each in record.settings if each.name == name)


def test_a_job_with_only_a_model_and_data_reports_each_choice_with_its_reason(
    make_context: MakeContext, rows: Callable[..., None], tmp_path: Path, tiny_llama: Path
) -> None:
    rows(120)
    context = make_context(OPEN)
    done = Files(tmp_path, tiny_llama.parent, context.spec.dump()).run("prepare")
    record = read_completion(context.workspace.completion("prepare"), PrepareRecord)
    assert record is not None, done.stdout
    assert {each.setting for each in record.settings} == open_settings(context.spec)
    assert all(each.reason for each in record.settings if type(each.parsed) in (int, float))
    assert done.result.settings == record.settings
    shown = done.result.message.partition("; automatic: ")[2]
    assert shown.startswith(f"maxSequenceLength 128 ({reason(record, 'maxSequenceLength')}), ")
    assert f"learningRate {values(record)['learningRate']} (for a width of 64), scheduler linear (falls to 0" in shown


@pytest.mark.parametrize(
    ("device", "memory", "recomputed"),
    [
        ("cpu", {}, True),
        ("cpu", {"memory": "2Gi"}, True),
        ("cpu", {"memory": "8Gi"}, False),
        ("cpu", {"memory": "8Gi", "gpus": 4}, True),
        ("cpu", {"memory": "8Gi", "gpuMemory": "24Gi"}, True),
        ("cuda", {"gpuMemory": "24Gi"}, False),
    ],
)
def test_activations_are_kept_where_the_memory_of_the_gpu_or_a_cpus_pod_has_room(
    device: Device, memory: dict[str, str], recomputed: bool, make_context: MakeContext, rows: Callable[..., None]
) -> None:
    rows(2)
    context = make_context(merged(OPEN, {"resources": memory}))
    record = prepare(dataclasses.replace(context, device=device), Recorded())
    assert values(record)["gradientCheckpointing"] is recomputed


def test_settings_are_chosen_again_for_another_recomputation(make_context: MakeContext) -> None:
    asked = {
        asked_sha256(make_context(merged(OPEN, {"training": {"gradientCheckpointing": value}})).spec)
        for value in (None, True, False)
    }
    assert len(asked) == 3


def test_the_run_trains_with_the_choices_and_another_rule_changes_nothing_of_it(
    make_context: MakeContext, rows: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(2)
    context = make_context(OPEN)
    record = prepare(context, Recorded())
    chosen = values(record)
    assert (chosen["epochs"], chosen["packing"], chosen["rank"], chosen["scheduler"]) == (10, False, 16, "linear")
    for name, other in (("_MOST_EPOCHS", 2), ("_RANK", 32), ("_RATE", 1e-6)):
        monkeypatch.setattr(automatic, name, other)
    assert prepare(context, Recorded()) == record

    trained = run(context)

    sequences = len(PreparedDataset.open(context.workspace.root / record.data_path, "train"))
    of_step = chosen["microBatchSize"] * chosen["gradientAccumulationSteps"]
    assert trained.training_step == chosen["epochs"] * sequences // of_step == 20
    rates = [line["learningRate"] for line in history(context) if "learningRate" in line]
    assert rates[chosen["warmupSteps"]] == max(rates) == chosen["learningRate"]
    assert rates[-1] < rates[-2] < chosen["learningRate"]
    adapter = json.loads((context.workspace.trained / ADAPTER_CONFIG_FILE).read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (chosen["rank"], chosen["alpha"])
    assert prepare(context, Recorded()) == record


def test_a_step_has_the_rows_and_the_rate_that_the_job_asks_for(
    make_context: MakeContext, rows: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen rows would be packed into a few sequences, and by default each makes a step."""
    rows(16)
    usual = prepare(make_context(OPEN | {"workspace": {"claimName": "usual"}}), Recorded())
    asked = {"epochs": 1, "scheduler": "constant", "warmupSteps": 0, "saveEverySteps": 1}
    own = merged(OPEN, {"training": asked | {"batchSize": 6, "learningRateMultiplier": 0.5}})
    context = make_context(own)
    record = prepare(context, Recorded())
    assert values(record)["packing"] is False

    drawn: list[int] = []

    def drawing(data: PreparedDataset, sequences: MicroBatch, device: torch.device) -> Batch:
        drawn.extend(row for sequence in sequences for row in data.row_numbers(sequence))
        return read_batch(data, sequences, device)

    monkeypatch.setattr(f"{loop.__name__}.read_batch", drawing)
    interrupted_at(context, 1)
    assert len(drawn) == 6
    context = make_context(own | {"resources": {"gpuMemory": "24Gi"}})
    chosen = values(prepare(context, Recorded()))
    assert chosen["microBatchSize"] * chosen["gradientAccumulationSteps"] == 6
    assert run(context).training_step == 3
    assert sorted(drawn) == list(range(16))
    rates = {line["learningRate"] for line in history(context) if "learningRate" in line}
    assert rates == {values(usual)["learningRate"] / 2} == {values(record)["learningRate"]}

    with failing(ExitCode.BAD_CONFIGURATION, r"training.batchSize was 6, is 8"):
        prepare(make_context(merged(own, {"training": {"batchSize": 8}})), Recorded())


def test_a_multiplier_that_makes_an_impossible_rate_is_rejected_with_the_highest(
    make_context: MakeContext, rows: Callable[..., None]
) -> None:
    rows(2)
    context = make_context(merged(OPEN, {"training": {"learningRateMultiplier": 1000}}))
    with failing(ExitCode.BAD_CONFIGURATION, "learningRateMultiplier is 1000", "of 29 for", "set it to 34 or less"):
        prepare(context, Recorded())


def test_a_value_that_is_set_is_kept_and_no_value_changes_once_a_run_has_begun(
    make_context: MakeContext, rows: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(20)
    own = merged(FEW, {"lora": {"rank": 2}, "training": {"learningRate": 0.003, "gradientAccumulationSteps": 1}})
    context = make_context(own)
    record = prepare(context, Recorded())
    assert not {"rank", "learningRate", "gradientAccumulationSteps", "epochs"} & values(record).keys()
    spec = record.resolve(context.spec)
    assert (spec.lora.rank, spec.training.learning_rate) == (2, 0.003)
    interrupted_at(context, 2)
    changed = make_context(merged(own, {"training": {"learningRate": 0.004}}))
    with failing(ExitCode.BAD_CONFIGURATION, r"training.learningRate was 0.003, is 0.004"):
        prepare(changed, Recorded())
    assert prepare(context, Recorded()) == record
    monkeypatch.setattr(automatic, "_ALPHA", 64)
    on_another = prepare(make_context(own | {"resources": {"gpuMemory": "24Gi"}}), Recorded())
    assert (values(on_another)["alpha"], reason(on_another, "alpha")) == (32, reason(record, "alpha"))


def test_before_a_run_has_begun_another_gpu_is_chosen_for_again(
    make_context: MakeContext, rows: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(20)
    assert values(prepare(make_context(FEW), Recorded()))["rank"] == 16
    monkeypatch.setattr(automatic, "_RANK", 32)
    assert values(prepare(make_context(FEW), Recorded()))["rank"] == 16
    on_another = FEW | {"resources": {"gpuMemory": "24Gi"}}
    assert values(prepare(make_context(on_another), Recorded()))["rank"] == 32


@pytest.mark.parametrize(("dataset", "held_out"), [({}, 20), ({"eval": {"fraction": 0}}, 0)])
def test_of_many_rows_a_tenth_is_held_out_unless_the_job_holds_out_none(
    make_context: MakeContext, rows: Callable[..., None], dataset: dict[str, Any], held_out: int
) -> None:
    rows(200)
    context = make_context(FEW | {"dataset": dataset})
    record = prepare(context, Recorded())
    assert (record.dataset.used_rows, record.dataset.eval_rows) == (200 - held_out, held_out)
    assert values(record)["keep"] == ("best" if held_out else "last")
    assert ("evalEverySteps" in values(record)) == bool(held_out)
    assert (run(context).eval_loss is not None) == bool(held_out)


def test_one_row_of_many_tokens_is_left_out_for_shorter_sequences(
    make_context: MakeContext, rows: Callable[..., None], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "long", LlamaConfig(**SHAPE | {"max_position_embeddings": 8192}))
    rows(400, chat_row("Long?", "word " * 1000))
    context = make_context(FEW, model=model)
    record = prepare(context, Recorded())
    longest = record.dataset.longest_row_tokens
    assert 2048 < longest < 8192
    assert [path.name for path in context.workspace.data.iterdir()] == [record.fingerprint]
    assert values(record)["maxSequenceLength"] == 128
    assert reason(record, "maxSequenceLength") == f"leaves out 1 of 401 rows, up to {longest} tokens"
    assert record.dataset.too_long_rows == 1


def test_a_row_beyond_the_models_positions_decides_nothing(
    make_context: MakeContext, rows: Callable[..., None]
) -> None:
    rows(20, chat_row("Long?", "word " * 600))
    record = prepare(make_context(FEW), Recorded())
    longest = record.dataset.longest_row_tokens
    assert longest > 512
    assert values(record)["maxSequenceLength"] == 128
    assert reason(record, "maxSequenceLength") == f"leaves out 1 of 21 rows, up to {longest} tokens"
    assert record.dataset.too_long_rows == 1
