"""The memory that prepare finds: measured for any family, and once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Starcoder2Config

from qlora_api import automatic
from qlora_api.contract import ExitCode
from qlora_api.memory.together import ShareOfMemory, add_up
from qlora_trainer.core import sandbox
from qlora_trainer.core.completion import PrepareRecord, read_completion
from qlora_trainer.model.memory.fit import training_shape
from qlora_trainer.model.memory.job_memory import MeasuredJob, memory_together
from qlora_trainer.steps.prepare import prepare
from tests.support.commands.command import new_files
from tests.support.failures import failing
from tests.support.manifests import merged
from tests.support.models.tiny import SHAPE, Recorded, chat_row, save_model, write_rows
from tests.support.resolved import OPEN
from tests.support.training import with_record
from tests.trainer.conftest import MakeContext

# Biases and norms are 2 % of anything smaller.
WIDE = SHAPE | {"hidden_size": 128, "intermediate_size": 512}
LARGE_CARD: dict[str, Any] = {"resources": {"gpuMemory": "24Gi"}}


@pytest.fixture(autouse=True)
def _rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods " * 3) for n in range(8)])


def test_a_family_whose_layers_are_not_listed_is_measured(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "starcoder2", Starcoder2Config(**WIDE))
    context = make_context(LARGE_CARD, model=model)
    record = prepare(context, records)
    assert record.model_type == "starcoder2"
    assert (record.memory.source, record.memory.verdict) == ("DryRun", "fits")
    assert record.memory.estimate_bytes is not None
    assert record.measured is not None
    # One matrix is input and output, and its weights have 16 bit.
    assert 2 * 512 * 128 < record.measured.unquantized_bytes < 2 * 512 * 128 * 1.2
    assert record.memory.message == (
        "spec.training.microBatchSize: 2 and spec.training.gradientAccumulationSteps: 1 fits too (0.6 GiB) and is "
        "faster, with the same result"
    )
    assert read_completion(context.workspace.completion("prepare"), PrepareRecord) == record


@pytest.mark.parametrize(("packing", "group_size"), [(True, 1), (False, 1), (True, 3)])
def test_a_repeated_prepare_reports_the_same_without_measuring_again(
    make_context: MakeContext, records: Recorded, monkeypatch: pytest.MonkeyPatch, packing: bool, group_size: int
) -> None:
    spec = LARGE_CARD | {"training": {"packing": packing}}
    first = prepare(replace(make_context(spec), group_size=group_size), records)
    assert "microBatchSize" in first.memory.message
    assert (first.memory.shared_bytes is None) == (group_size == 1)
    monkeypatch.setattr(sandbox, "within_limits", lambda *_: pytest.fail("measured again"))
    assert prepare(replace(make_context(spec), group_size=group_size), records) == first


def test_a_model_that_no_gpu_of_this_size_holds_is_rejected_with_measured_advice(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "starcoder2", Starcoder2Config(**WIDE | {"num_hidden_layers": 1}))
    spec = {"resources": {"gpuMemory": "1Gi"}, "training": {"microBatchSize": 512, "maxSequenceLength": 512}}
    with failing(ExitCode.DOES_NOT_FIT, match=r"GiB of GPU memory .* set spec\.training\.microBatchSize: "):
        prepare(make_context(spec, model=model), records)


def test_the_chosen_micro_batch_is_halved_until_it_fits_with_the_same_sequences_in_a_step(
    make_context: MakeContext, records: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "_MICRO_BATCH_TOKENS", 512 * 512)
    monkeypatch.setattr(automatic, "_LARGEST_BATCH", 512)
    monkeypatch.setattr(automatic, "_STEPS", 1)
    model = save_model(tmp_path / "starcoder2", Starcoder2Config(**WIDE | {"num_hidden_layers": 1}))
    whole = {"maxSequenceLength": 512, "packing": False, "epochs": 64}
    left_open = merged(OPEN, {"training": whole})
    any_gpu = prepare(make_context(left_open, model=model), records)
    small = left_open | {"resources": {"gpuMemory": "1Gi"}}
    record = prepare(make_context(small, model=model), records)

    found = [each.resolve(make_context(small).spec).training for each in (any_gpu, record)]
    assert found[0].micro_batch_size == 512 > found[1].micro_batch_size > 1
    assert {each.micro_batch_size * each.gradient_accumulation_steps for each in found} == {512}
    [micro_batch] = [each for each in record.settings if each.name == "microBatchSize"]
    assert (micro_batch.reason, record.memory.verdict) == ("fits the GPU", "fits")
    larger = {"microBatchSize": found[1].micro_batch_size * 4}
    with failing(ExitCode.DOES_NOT_FIT, match="and a GPU of 1 GiB"):
        prepare(make_context(merged(small, {"training": larger}), model=model), records)


def test_prepare_again_estimates_as_many_recomputed_blocks(make_context: MakeContext, records: Recorded) -> None:
    context = make_context({"training": {"gradientCheckpointing": True}})
    all_blocks = prepare(context, records).memory
    again = prepare(with_record(context, recomputed_blocks=1), records)
    assert again.recomputed_blocks == 1
    assert (again.memory.estimate_bytes or 0) > (all_blocks.estimate_bytes or 0)


def test_prepare_reports_the_shared_memory_of_a_group_from_a_joint_dry_run(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "starcoder2", Starcoder2Config(**WIDE))
    context = replace(make_context(LARGE_CARD, model=model), group_size=3)
    record = prepare(context, records)
    share = ShareOfMemory.from_status(record.memory)
    assert share is not None
    assert record.measured is not None
    config, spec = model / "config.json", record.resolve(context.spec)
    job = MeasuredJob.from_config(config, spec, training_shape(spec, record.target_modules), record.measured)
    together = memory_together(config, [spec] * 2, [job] * 2)
    assert add_up([share] * 2).expected == pytest.approx(together.expected, rel=0.01)
    base = job.measured.unquantized_bytes + job.measured.quantized_parameters // 2
    assert base < share.shared < share.expected


def test_the_operator_marks_a_job_of_a_group_in_the_environment(tmp_path: Path, tiny_llama: Path) -> None:
    done = new_files(tmp_path / "job", tiny_llama.parent).run("prepare", QLORA_GROUP_SIZE="2")
    assert done.exit_code == ExitCode.DONE, done.stdout + done.stderr
    assert done.result.memory is not None
    assert done.result.memory.shared_bytes is not None
