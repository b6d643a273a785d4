"""gpt-oss is trained on its experts as they are published, in MXFP4: exact, and in the same bytes."""

import json
import math
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_api.contract import ExitCode
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.base.load import load_base, storage_of
from qlora_trainer.model.experts import stack as experts_in_stacks
from qlora_trainer.model.experts.compute import Groups, _Product
from qlora_trainer.model.experts.stack import BLOCKS, SCALES, Mxfp4Stack, expert_stacks, tensors_of
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.memory.dry_run import StepSize
from qlora_trainer.model.memory.fit import training_shape
from qlora_trainer.model.memory.job_memory import measured_estimate
from qlora_trainer.model.memory.live_bytes import LiveBytes
from qlora_trainer.model.memory.measure import measure
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from tests.support.manifests import job_spec
from tests.support.models.four_bit import convert
from tests.support.models.mxfp4 import CONFIG, WEIGHTS, save_gpt_oss
from tests.support.models.plain_loss import mean_loss
from tests.support.models.tiny import SHAPE, Recorded, chat_row, write_rows
from tests.support.resolved import resolved_lora, resolved_spec
from tests.support.training import history, run
from tests.trainer.conftest import MakeContext

NF4 = QuantizationSpec()
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one. Do not change it: copy it."""
    return save_gpt_oss(tmp_path_factory.mktemp("gpt_oss") / "model")


def random_stack(shape: tuple[int, int, int], scales: tuple[int, int]) -> Mxfp4Stack:
    stack, random = Mxfp4Stack(shape, "cpu"), torch.Generator().manual_seed(0)
    wanted = tensors_of(shape)
    stack.put(BLOCKS, torch.randint(256, wanted[BLOCKS].shape, generator=random).to(torch.uint8))
    stack.put(SCALES, torch.randint(*scales, wanted[SCALES].shape, generator=random).to(torch.uint8))
    return stack


@pytest.mark.parametrize("scales", [(0, 253), (118, 124)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_experts_are_dequantized_as_by_transformers_bit_for_bit(
    dtype: torch.dtype, scales: tuple[int, int]
) -> None:
    stack = random_stack((5, 96, 40), scales)
    whole = convert_moe_packed_tensors(stack.blocks, stack.scales, dtype=torch.bfloat16)
    assert stack.dense(0, 5, dtype).shape == stack.shape == whole.shape
    assert whole.isfinite().all()
    for first, end in ((0, 5), (1, 3), (4, 5)):
        found = stack.dense(first, end, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, whole[first:end].to(dtype))


def test_dequantizing_takes_little_more_memory_than_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = random_stack((5, 96, 40), (118, 124))
    expected = stack.dense(0, 5, torch.bfloat16)
    # No multiple of it.
    monkeypatch.setattr(experts_in_stacks, "_PLACES", 100)

    with LiveBytes("cpu") as live:
        for buffer in stack.buffers():
            live.add(buffer)
        before = live.bytes
        found = stack.dense(0, 5, torch.bfloat16)

    assert torch.equal(found, expected)
    assert live.peak - before < 1.1 * found.nbytes


@pytest.mark.parametrize("groups", [(2, 0, 4), torch.tensor([2, 2, 6], dtype=torch.int32)], ids=["apart", "together"])
def test_products_and_gradients_are_those_of_the_dequantized_weights(groups: Groups) -> None:
    stack = random_stack((3, 64, 32), (118, 124))
    rows = torch.randn(6, 64, dtype=torch.bfloat16, requires_grad=True)
    dense = stack.dense(0, 3, torch.bfloat16)

    found = _Product.apply(rows, stack, groups, True)
    found.float().square().sum().backward()
    gradient, rows.grad = rows.grad, None
    expected = torch.cat([rows[:2] @ dense[0], rows[2:] @ dense[2]])
    expected.float().square().sum().backward()

    assert torch.equal(found, expected)
    assert torch.equal(gradient, rows.grad)


def test_the_base_has_the_published_bytes_of_the_experts(tmp_path: Path, gpt_oss: Path) -> None:
    convert(gpt_oss, tmp_path / "base", NF4)
    published, base = load_file(gpt_oss / WEIGHTS), load_file(tmp_path / "base" / WEIGHTS)
    packed = [name for name in published if name.endswith((BLOCKS, SCALES))]
    assert len(packed) == 8
    assert all(torch.equal(base[name], published[name]) for name in packed)
    assert BaseLayout.from_folder(gpt_oss, NF4).bytes == pytest.approx(sum(t.nbytes for t in base.values()), rel=0.01)

    model = load_base(tmp_path / "base", NF4, "cpu", attention="eager")

    stacks = dict(expert_stacks(model))
    assert len(stacks) == 4
    for name, stack in stacks.items():
        whole = convert_moe_packed_tensors(published[f"{name}_blocks"], published[f"{name}_scales"])
        assert torch.equal(stack.dense(0, 4, torch.bfloat16), whole)
        assert stack.bytes == stack.parameters_count * 4.25 / 8 + 1536
    layers = {kind.name: kind for kind in storage_of(model).layers}
    assert layers["gate_up_proj"].bytes_each == 4 * 64 * 256 * 17 // 32 + 1536
    settings = json.loads((tmp_path / "base" / CONFIG).read_text())["quantization_config"]
    # A program that loads the base without this trainer gets an error, not random experts.
    assert (settings["quant_method"], settings["experts"]) == ("qlora_4bit", "mxfp4")


def test_it_is_trained_and_plain_libraries_get_the_same_loss(
    make_context: MakeContext, tmp_path: Path, gpt_oss: Path
) -> None:
    rows = [chat_row(f"Question {n}?", f"kubectl get pods {n}") for n in range(12)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    context = make_context({"dataset": {"eval": {"fraction": 0.25}}}, model=gpt_oss)
    record = prepare(context, Recorded())
    assert (record.experts_in_mxfp4, record.attention, record.packed) == (True, None, True)
    assert record.measured is not None
    assert record.measured.mxfp4_parameters == 2 * 4 * 64 * (256 + 128)

    trained = run(context)

    assert trained.eval_loss is not None
    assert trained.initial_eval_loss is not None
    assert trained.eval_loss < trained.initial_eval_loss
    losses = [line["loss"] for line in history(context) if "loss" in line]
    assert losses[-1] < losses[0]
    data = PreparedDataset.open(context.workspace.root / record.data_path, "eval")
    plain = AutoModelForCausalLM.from_pretrained(
        gpt_oss,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        attn_implementation="eager",
        device_map={"": "cpu"},
    )
    # Transformers does not have attention in 4 bit: its weights are given those of the base.
    base = load_base(context.workspace.base, NF4, "cpu", attention="eager")
    replace_attention(plain, base)
    assert math.isclose(mean_loss(plain, data), trained.initial_eval_loss, rel_tol=2e-3)
    adapted = PeftModel.from_pretrained(plain, str(context.workspace.trained)).eval()
    assert math.isclose(mean_loss(adapted, data), trained.eval_loss, rel_tol=2e-3)

    publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    card = (context.workspace.adapter / "README.md").read_text()
    assert "AutoTokenizer, Mxfp4Config\n" in card
    assert "    quantization_config=Mxfp4Config(dequantize=True),\n    dtype=torch.bfloat16,\n)" in card
    assert "with its experts in MXFP4, as they were published" in card


def replace_attention(plain: Any, base: Any) -> None:
    layers = dict(base.named_modules())
    for name, module in plain.named_modules():
        if name.endswith("_proj") and ".self_attn." in name:
            module.weight.data = layers[name](torch.eye(module.in_features, dtype=torch.bfloat16)).T.clone()
            if module.bias is not None:
                module.weight.data -= module.bias[:, None]


def test_the_estimate_counts_four_and_a_quarter_bits_for_each_weight_of_an_expert(gpt_oss: Path) -> None:
    spec = resolved_spec(job_spec())
    found = measure(gpt_oss / CONFIG, spec, [StepSize(1, 8, True)], "digest")
    attention, experts = 2 * 64 * (64 + 32 + 32 + 64), 2 * 4 * 64 * 384
    assert (found.quantized_parameters, found.mxfp4_parameters) == (attention, experts)
    training = training_shape(spec, ())
    without = found.model_copy(update={"mxfp4_parameters": 0})
    more = measured_estimate(found, training).base_weights - measured_estimate(without, training).base_weights
    assert more == pytest.approx(experts * 4.25 / 8, abs=1)


Change = Callable[[dict[str, Tensor]], None]


def put(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        weights[f"{EXPERTS}.{name}"] = make(weights[f"{EXPERTS}.{name}"]).contiguous()

    return change


def with_scale(scale: int) -> Callable[[Tensor], Tensor]:
    return lambda scales: torch.cat([scales[:-1], torch.full_like(scales[-1:], scale)])


def without(name: str) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        del weights[f"{EXPERTS}.{name}"]

    return change


def in_16_bit(weights: dict[str, Tensor]) -> None:
    blocks, scales = (weights.pop(f"{EXPERTS}.down_proj{role}") for role in (BLOCKS, SCALES))
    weights[f"{EXPERTS}.down_proj"] = convert_moe_packed_tensors(blocks, scales)


BROKEN: dict[str, tuple[Change, str]] = {
    "an infinite weight": (put("down_proj_scales", with_scale(253)), "has the scale 253, and at most 252 is finite"),
    "no number": (put("down_proj_scales", with_scale(255)), "has the scale 255"),
    "too few groups": (put("gate_up_proj_blocks", lambda blocks: blocks[:, :, :1]), r"U8 \[4, 256, 2, 16\]"),
    "flat": (put("gate_up_proj_blocks", lambda blocks: blocks.reshape(4, 256, 32)), r"U8 \[4, 256, 32\], and must"),
    "of another type": (put("gate_up_proj_scales", lambda scales: scales.view(torch.int8)), "it is I8"),
    "no scales": (without("gate_up_proj_scales"), r"missing, first model\.layers\.1.*gate_up_proj_scales"),
    "in 16 bit": (in_16_bit, "down_proj in .* is not in MXFP4"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_or_forged_experts_are_rejected_with_the_tensors_name(tmp_path: Path, gpt_oss: Path, name: str) -> None:
    change, message = BROKEN[name]
    folder = Path(shutil.copytree(gpt_oss, tmp_path / "model"))
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(StepFailure) as caught:
        convert(folder, tmp_path / "base", NF4)
    assert caught.value.exit_code is ExitCode.MODEL_UNAVAILABLE
    assert re.search(message, caught.value.message), caught.value.message
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama", **SHAPE}, "already quantized (mxfp4)"),
        (
            {"intermediate_size": 48},
            "in MXFP4 with 48 inputs (model.layers.0.mlp.experts.down_proj), no multiple of 32",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "already quantized (fp8)"),
    ],
)
def test_models_in_another_form_are_rejected_by_name(
    tmp_path: Path, gpt_oss: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((gpt_oss / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(StepFailure) as caught:
        inspect_family(tmp_path, resolved_lora())
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert message in caught.value.message
