"""The memory that prepare finds: measured for any family, and once."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Starcoder2Config

from qlora_api.contract import ExitCode
from qlora_trainer.core.completion import PrepareRecord, read_completion
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.dry_run import limited
from qlora_trainer.steps.prepare import prepare
from tests.support.tiny import SHAPE, Recorded, chat_row, save_model, write_rows
from tests.trainer.conftest import MakeContext

# Biases and norms are 2 % of anything smaller.
WIDE = SHAPE | {"hidden_size": 128, "intermediate_size": 512}
LARGE_CARD: dict[str, Any] = {"resources": {"gpuMemory": 24}}


@pytest.fixture(autouse=True)
def _rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods " * 3) for n in range(8)])


def test_a_family_without_an_entry_in_the_table_is_measured(
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


@pytest.mark.parametrize("packing", [True, False])
def test_a_repeated_prepare_says_the_same_and_does_not_measure_again(
    make_context: MakeContext, records: Recorded, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    spec = LARGE_CARD | {"training": {"packing": packing}}
    first = prepare(make_context(spec), records)
    assert "microBatchSize" in first.memory.message
    monkeypatch.setattr(limited, "within_limits", lambda *_: pytest.fail("measured again"))
    assert prepare(make_context(spec), records) == first


def test_a_model_that_no_gpu_of_this_size_holds_is_rejected_with_measured_advice(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "starcoder2", Starcoder2Config(**WIDE))
    spec = {"resources": {"gpuMemory": 1}, "training": {"microBatchSize": 512, "maxSequenceLength": 512}}
    with pytest.raises(StepFailure, match=r"GiB of GPU memory .* set spec\.training\.microBatchSize: ") as failure:
        prepare(make_context(spec, model=model), records)
    assert failure.value.exit_code is ExitCode.DOES_NOT_FIT
