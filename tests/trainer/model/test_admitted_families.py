"""Every further family: trained, resumed, read by plain PEFT with the same loss, its rows kept apart."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_api.training import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.data.prepared import IGNORED_LABEL, PackedSequence, PreparedDataset
from qlora_trainer.model.adapter import adapter_parameters, attach_adapter, restore_adapter
from qlora_trainer.model.base import load_base
from qlora_trainer.model.batch import Batch
from qlora_trainer.model.check import check_model
from qlora_trainer.model.loss import batch_loss
from qlora_trainer.model.support import Family, inspect_family
from tests.support.admitted import ONE_ROW, PACKED, tiny_config
from tests.support.sequences import CPU, rows_of
from tests.support.training import adapter_bytes, history, interrupted_at, prepared, run

# Of each make one: with parts of their own, with blocks that differ, repeated or sharing keys, with a state, with
# attention of their own.
ALWAYS = frozenset({"apertus", "gemma3n_text", "gemma4_text", "lfm3", "qwen3_5_text", "stablelm"})
SPEC = {"training": {"maxSteps": 4, "maxSequenceLength": 64, "scheduler": "linear"}}


def families(*names: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in names]


@dataclass(frozen=True)
class Trained:
    """A family's model folder, and the step that trained it without interruption."""

    model: Path
    family: Family
    context: StepContext
    record: TrainRecord

    @property
    def adapter(self) -> Path:
        return self.context.workspace.trained


@pytest.fixture(scope="module", params=families(*PACKED, *ONE_ROW))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(request.param), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Norms that begin at 1 and biases that begin at 0 would not be missed.
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(root / "model")
    family = inspect_family(root / "model", LoraSpec())
    assert family.one_row == (request.param in ONE_ROW)
    context = prepared(root / "workspace", root / "model", SPEC, packed=not family.one_row)
    return Trained(root / "model", family, context, run(context))


def adapted(trained: Trained) -> Any:
    """The 4-bit base with the trained adapter, as the train step holds it."""
    spec = LoraSpec(rank=4, alpha=8)
    model = attach_adapter(
        load_base(trained.model, QuantizationSpec(), "cpu", attention=trained.family.attention),
        spec,
        trained.family.target_modules,
        seed=0,
        gradient_checkpointing=True,
        base_name="tiny",
        base_revision="0",
    )
    restore_adapter(model, load_file(trained.adapter / ADAPTER_FILE))
    return model


def lesson(model: Any, *rows: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients of the last row, behind the others in one sequence."""
    labels = torch.cat([*(torch.full_like(row, IGNORED_LABEL) for row in rows[:-1]), rows[-1]])
    lengths = tuple(len(row) for row in rows)
    batch = Batch.of([PackedSequence(torch.cat(rows), labels, lengths)], CPU)
    torch.manual_seed(0)  # some families have dropout of their own
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = batch_loss(model.get_base_model(), batch)
    return (loss.detach(), *torch.autograd.grad(loss, list(adapter_parameters(model).values())))


def test_every_adapted_layer_learns(trained: Trained) -> None:
    adapter = load_file(trained.adapter / ADAPTER_FILE)

    names = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    assert names == set(trained.family.target_modules)
    assert [name for name, tensor in adapter.items() if not bool(tensor.any())] == []
    assert trained.record.loss < 10


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    context = prepared(tmp_path, trained.model, SPEC, packed=not trained.family.one_row)
    interrupted_at(context, 3)
    run(context)

    assert adapter_bytes(context) == adapter_bytes(trained.context)
    assert history(context) == history(trained.context)


def test_another_row_changes_not_a_bit_of_a_rows_loss_and_gradients(trained: Trained) -> None:
    model, row = adapted(trained), torch.arange(100, 114)
    others = [torch.arange(start, start + 11) for start in (10, 300)]
    if trained.family.one_row:
        before = lesson(model, row)
        lesson(model, others[0])
        after = lesson(model, row)
    else:
        before, after = (lesson(model, other, row) for other in others)

    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("trained", families(*ONE_ROW), indirect=True)
def test_a_family_that_cannot_keep_rows_apart_takes_micro_batches_of_one_row(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        StepFailure, match=r"set spec\.training\.microBatchSize to 1 and raise gradientAccumulationSteps"
    ):
        check_model(trained.model, LoraSpec(), TrainingSpec(micro_batch_size=2, max_sequence_length=64))

    checked = check_model(trained.model, LoraSpec(), TrainingSpec(max_sequence_length=64))
    assert not checked.packs(TrainingSpec(max_sequence_length=64))
    assert "no packing" in caplog.text


def test_plain_peft_over_plain_transformers_gives_the_loss_that_was_reported(trained: Trained) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        trained.model, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            # bitsandbytes' own packing for some CPUs cannot hold layers as narrow as some of Gemma 3n's.
            layer.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(base, trained.adapter).eval()
    data = PreparedDataset.open(trained.context.workspace.data / "rows", "eval")
    total, targets = 0.0, 0
    for index in range(len(data)):
        for tokens, labels in rows_of(data[index]):
            count = int((labels[1:] != IGNORED_LABEL).sum())
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=tokens[None], labels=labels[None]).loss
            total, targets = total + float(loss) * count, targets + count

    assert math.isclose(total / targets, trained.record.eval_loss or 0.0, rel_tol=2e-3)
