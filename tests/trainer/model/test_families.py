"""Each family is trained by the real step: it resumes to the last bit, keeps rows apart, and plain PEFT agrees."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_api.memory.model_shape import SUPPORTED_MODEL_TYPES
from qlora_api.training import LoraSpec, QuantizationSpec
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StopRequest
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.data.prepared import IGNORED_LABEL, PackedSequence, PreparedDataset
from qlora_trainer.model.adapter import adapter_parameters, attach_adapter, restore_adapter
from qlora_trainer.model.base import load_base
from qlora_trainer.model.batch import Batch
from qlora_trainer.model.loss import batch_loss
from qlora_trainer.model.support import MIN_QUANTIZED_FRACTION, inspect_family
from tests.support.families import FAMILIES
from tests.support.sequences import CPU, rows_of
from tests.support.training import StopAtStep, adapter_bytes, history, prepared, run

# One of each make: gated, with sliding windows and caps, with fused layers, with another MLP. A checkpoint holds the
# adapter, whatever the family.
RESUMED_ALWAYS = ("llama", "gemma2", "phi3", "gpt_neox")
SPEC: dict[str, Any] = {"training": {"maxSteps": 4, "maxSequenceLength": 64, "scheduler": "linear"}}


@dataclass(frozen=True)
class Trained:
    """A family's model folder, and the step that trained it without interruption."""

    model: Path
    layers: frozenset[str]
    context: StepContext
    record: TrainRecord

    @property
    def adapter(self) -> Path:
        return self.context.workspace.trained


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    config, layers = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Norms that begin at 1 and biases that begin at 0 would not be missed.
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(root / "model")
    context = prepared(root / "workspace", root / "model", SPEC)
    return Trained(root / "model", frozenset(layers.split()), context, run(context))


def test_every_supported_family_is_trained_here() -> None:
    assert set(SUPPORTED_MODEL_TYPES) <= {config.get_text_config().model_type for config, _ in FAMILIES.values()}


def test_every_linear_layer_of_every_block_is_quantized_and_learns(trained: Trained) -> None:
    family = inspect_family(trained.model, LoraSpec())
    adapter = load_file(trained.adapter / ADAPTER_FILE)

    assert family.quantized_fraction >= MIN_QUANTIZED_FRACTION
    assert not family.one_row
    assert len(family.target_modules) == 2 * len(trained.layers)
    assert {name.rpartition(".")[2] for name in family.target_modules} == trained.layers
    assert {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter} == set(
        family.target_modules
    )
    assert all(bool(tensor.any()) for tensor in adapter.values())
    assert trained.record.eval_loss is not None
    assert trained.record.initial_eval_loss is not None
    assert trained.record.eval_loss < 0.98 * trained.record.initial_eval_loss


@pytest.mark.parametrize(
    "trained",
    [pytest.param(name, marks=() if name in RESUMED_ALWAYS else pytest.mark.slow) for name in FAMILIES],
    indirect=True,
)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bytes(trained: Trained, tmp_path: Path) -> None:
    context = prepared(tmp_path, trained.model, SPEC)
    stop = StopRequest()
    with pytest.raises(Interrupted):
        run(context, stop=stop, records=StopAtStep(3, stop))

    resumed = run(context)
    assert resumed.attempts == 2
    # Memory is that of the whole process, which only grows.
    same = {"peak_memory_bytes": trained.record.peak_memory_bytes, "attempts": trained.record.attempts}
    assert resumed.model_copy(update=same) == trained.record
    assert adapter_bytes(context) == adapter_bytes(trained.context)
    assert history(context) == history(trained.context)


def test_another_row_in_the_sequence_changes_not_a_bit_of_a_rows_loss_and_gradients(trained: Trained) -> None:
    spec = LoraSpec(rank=4, alpha=8)
    model = attach_adapter(
        load_base(trained.model, QuantizationSpec(), "cpu"),
        spec,
        inspect_family(trained.model, spec).target_modules,
        seed=0,
        gradient_checkpointing=True,
        base_name="tiny",
        base_revision="0",
    )
    restore_adapter(model, load_file(trained.adapter / ADAPTER_FILE))

    def of_the_second(first: Tensor) -> tuple[Tensor, ...]:
        second = torch.arange(100, 114)
        labels = torch.cat([torch.full_like(first, IGNORED_LABEL), second])
        batch = Batch.of([PackedSequence(torch.cat([first, second]), labels, (len(first), len(second)))], CPU)
        torch.manual_seed(0)  # some families have dropout of their own
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = batch_loss(model.get_base_model(), batch)
        return (loss.detach(), *torch.autograd.grad(loss, list(adapter_parameters(model).values())))

    behind_one, behind_another = (of_the_second(torch.arange(start, start + 11)) for start in (10, 300))

    assert len(behind_one) == 1 + 2 * 2 * len(trained.layers)
    assert all(bool(tensor.any()) for tensor in behind_one)
    assert all(map(torch.equal, behind_one, behind_another))


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
    model = PeftModel.from_pretrained(base, trained.adapter).eval()
    data = PreparedDataset.open(trained.context.workspace.data / "rows", "eval")
    total, targets = 0.0, 0
    for index in range(len(data)):
        for tokens, labels in rows_of(data[index]):
            count = int((labels[1:] != IGNORED_LABEL).sum())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=tokens[None], labels=labels[None]).loss
            total, targets = total + float(loss) * count, targets + count

    assert math.isclose(total / targets, trained.record.eval_loss or 0.0, rel_tol=2e-3)
