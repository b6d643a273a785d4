"""A model stored in 4 bit by bitsandbytes is trained unchanged; wrong parts are named."""

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
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_api.contract import ExitCode
from qlora_api.spec.training import LoraSpec, QuantizationSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from qlora_trainer.training.distributed.sharding import STORAGE_DTYPE
from tests.support.families import EXPERTS
from tests.support.models.four_bit import convert, quantized, require_equal, settings
from tests.support.models.plain_loss import mean_loss
from tests.support.models.tiny import Recorded, chat_row, save_model, write_rows
from tests.support.training import run
from tests.trainer.conftest import MakeContext

NF4 = QuantizationSpec()
KINDS = [QuantizationSpec(type=kind, double_quant=double) for kind in ("nf4", "fp4") for double in (True, False)]
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="session")
def in_nf4(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama in NF4 with double quantization. Do not change it: copy it."""
    return quantized(tiny_llama, tmp_path_factory.mktemp("nf4") / "model", settings())


def plain(folder: Path) -> Any:
    """The model as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantization", KINDS, ids=lambda kind: f"{kind.type}-{kind.double_quant}")
def test_the_base_has_the_bytes_that_were_published(
    tmp_path: Path, tiny_llama: Path, quantization: QuantizationSpec, storage: torch.dtype
) -> None:
    config = settings(quantization, bnb_4bit_quant_storage=storage)
    model = quantized(tiny_llama, tmp_path / "model", config)
    convert(model, tmp_path / "base", quantization)

    found = load_base(tmp_path / "base", quantization, "cpu")

    published = plain(model)
    for module in published.modules():
        if isinstance(module, Linear4bit):
            module.weight.data = module.weight.data.view(-1).view(torch.uint8).view(-1, 1)
    require_equal(found, published)
    # Sharded runs read the packed bytes as another type.
    load_base(tmp_path / "base", quantization, "cpu", STORAGE_DTYPE)


def test_layers_may_be_spread_over_files(tmp_path: Path, tiny_llama: Path, in_nf4: Path) -> None:
    model = quantized(tiny_llama, tmp_path / "model", settings(), max_shard_size="5KB")
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    assert any(file != weight_map[name.partition(".weight")[0] + ".weight"] for name, file in weight_map.items())
    convert(model, tmp_path / "base", NF4)
    require_equal(load_base(tmp_path / "base", NF4, "cpu"), plain(in_nf4))


def test_a_model_in_another_16_bit_type_computes_in_bfloat16(tmp_path: Path, in_nf4: Path) -> None:
    """Published ones compute in float16, the type of their constants and norms."""
    model = changed(in_nf4, tmp_path, in_float16)
    convert(model, tmp_path / "base", NF4)
    require_equal(load_base(tmp_path / "base", NF4, "cpu"), plain(in_nf4))


def in_float16(weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if ".quant_state." in name:
            weights[name] = described(tensor, dtype="float16")
        elif name.endswith("norm.weight"):
            weights[name] = tensor.to(torch.float16)


def described(tensor: Tensor, **changes: Any) -> Tensor:
    """The description of a layer with other values; one that is None is left out."""
    found = json.loads(bytes(tensor.tolist())) | changes
    text = json.dumps({name: value for name, value in found.items() if value is not None})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def changed(model: Path, root: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the model with other weights."""
    folder = Path(shutil.copytree(model, root / "changed"))
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_it_is_trained_and_merged_and_plain_libraries_get_the_same_loss(
    make_context: MakeContext, tmp_path: Path, in_nf4: Path
) -> None:
    rows = [chat_row(f"Question {n}?", f"kubectl get pods {n}") for n in range(12)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    spec = {"dataset": {"eval": {"fraction": 0.25}}, "output": {"merged": {}}}
    context = make_context(spec, model=in_nf4)
    record = prepare(context, Recorded())
    require_equal(load_base(context.workspace.base, NF4, "cpu"), plain(in_nf4))

    trained = run(context)

    assert trained.eval_loss is not None
    assert trained.initial_eval_loss is not None
    assert trained.eval_loss < trained.initial_eval_loss
    data = PreparedDataset.open(context.workspace.root / record.data_path, "eval")
    base = plain(in_nf4)
    assert math.isclose(mean_loss(base, data), trained.initial_eval_loss, rel_tol=2e-3)
    adapted = PeftModel.from_pretrained(base, str(context.workspace.trained)).eval()
    assert math.isclose(mean_loss(adapted, data), trained.eval_loss, rel_tol=2e-3)

    publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    merged = context.workspace.merged
    assert "quantization_config" not in json.loads((merged / CONFIG).read_text())
    assert math.isclose(mean_loss(plain(merged), data), trained.eval_loss, rel_tol=1e-2)


def refused(model: Path, root: Path, quantization: QuantizationSpec = NF4) -> StepFailure:
    with pytest.raises(StepFailure) as caught:
        convert(model, root / "base", quantization)
    assert not (root / "base").exists()
    return caught.value


def test_a_job_with_another_format_is_rejected_with_both_formats(tmp_path: Path, in_nf4: Path) -> None:
    failure = refused(in_nf4, tmp_path, QuantizationSpec(type="fp4", double_quant=False))
    assert failure.exit_code is ExitCode.BAD_CONFIGURATION
    assert "spec.quantization is type fp4, doubleQuant false, and the model is stored" in failure.message
    assert "as type nf4, doubleQuant true" in failure.message


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        (["lm_head", "model.layers.0.mlp"], r"has model\.layers\.0\.mlp\.down_proj\.weight, .* in 16 bit and none in"),
        (["embed_tokens"], r"has none in 16 bit and lm_head\.weight in 4 bit instead"),
    ],
)
def test_a_model_with_other_layers_in_4_bit_is_rejected(
    tmp_path: Path, tiny_llama: Path, skipped: list[str], message: str
) -> None:
    model = quantized(tiny_llama, tmp_path / "model", settings(llm_int8_skip_modules=skipped))
    with pytest.raises(StepFailure, match=message) as caught:
        BaseLayout.from_folder(model, NF4)
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION
    same = quantized(tiny_llama, tmp_path / "same", settings(llm_int8_skip_modules=["lm_head", "vision_tower"]))
    convert(same, tmp_path / "base", NF4)


def test_experts_need_the_original(tmp_path: Path) -> None:
    routed = save_model(tmp_path / "routed", EXPERTS["qwen3_moe"][0])
    model = quantized(routed, tmp_path / "model", settings())
    with pytest.raises(StepFailure, match="mixture of experts that is quantized already, and its experts are not"):
        inspect_family(model, LoraSpec())


def with_settings(model: Path, root: Path, changes: dict[str, Any]) -> Path:
    """Copy the model with these settings of its quantization. None drops a setting."""
    folder = Path(shutil.copytree(model, root / "model"))
    config = json.loads((folder / CONFIG).read_text())
    settings = config["quantization_config"] | changes
    config["quantization_config"] = {
        name: value for name, value in settings.items() if changes.get(name, 0) is not None
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes' 8 bit, load_in_8bit"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit true: allowed are nf4 or fp4"),
        ({"load_in_4bit": "yes"}, "already quantized"),
        ({"quant_method": "gptq"}, "already quantized (gptq)"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4'"),
        ({"bnb_4bit_use_double_quant": 1}, "bnb_4bit_use_double_quant 1"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules 'lm_head': allowed is a list"),
        ({"llm_int8_skip_modules": [7]}, "llm_int8_skip_modules [7]"),
        ({"llm_int8_skip_modules": ["(a+)+$"]}, "llm_int8_skip_modules ['(a+)+$']"),
        ({"llm_int8_skip_modules": ["m"] * 5000}, "up to 4096 names of modules"),
    ],
)
def test_another_quantization_is_rejected_by_name(
    tmp_path: Path, in_nf4: Path, changes: dict[str, Any], message: str
) -> None:
    folder = with_settings(in_nf4, tmp_path, changes)
    with pytest.raises(StepFailure) as caught:
        inspect_family(folder, LoraSpec())
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert message in caught.value.message
    assert "name the original 16-bit model instead" in caught.value.message


@pytest.mark.parametrize(
    "changes",
    [{"quant_method": None}, {"bnb_4bit_quant_storage": "load", "bnb_4bit_compute_dtype": 5, "more": {}}],
    ids=["a model of 2023 names no method", "further settings have no effect"],
)
def test_another_description_of_the_same_quantization_changes_nothing(
    tmp_path: Path, in_nf4: Path, changes: dict[str, Any]
) -> None:
    convert(with_settings(in_nf4, tmp_path, changes), tmp_path / "base", NF4)
    require_equal(load_base(tmp_path / "base", NF4, "cpu"), plain(in_nf4))


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name] = make(weights[name]).contiguous()

    return change


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy[-1] = value
        return copy

    return make


def text(content: str) -> Callable[[Tensor], Tensor]:
    return lambda _tensor: torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: (weights.pop(name), None)[1]


def beside(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({name: torch.zeros(1)})


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "too few bytes": (put(UP, lambda packed: packed[:-1]), "and must be 4096 bytes as one column of U8"),
    "in 16 bit": (put(UP, lambda _packed: torch.zeros(128, 64, dtype=torch.bfloat16)), r"BF16 \[128, 64\], and must"),
    "of another type": (put(UP, lambda packed: packed.to(torch.int64)), "it is I64"),
    "too few constants": (put(f"{UP}.absmax", lambda absmax: absmax[:-1]), r"U8 \[127\], and must be U8 \[128\]"),
    "constants not quantized": (put(f"{UP}.absmax", Tensor.float), r"F32 \[128\], and must be U8 \[128\]"),
    "no constants": (without(f"{UP}.absmax"), rf"missing, first {UP}\.absmax"),
    "no description": (without(STATE), rf"missing, first {STATE}"),
    "an unknown tensor": (
        beside(f"{UP}.bias_correction"),
        r"bias_correction in model\.safetensors belongs to no layer",
    ),
    "constants of a norm": (beside("model.norm.weight.absmax"), r"model\.norm\.weight\.absmax .* belongs to no layer"),
    "another type's name": (
        beside(f"{UP}.quant_state.bitsandbytes__fp4"),
        "bitsandbytes__fp4 in .* belongs to no layer that is in 4 bit",
    ),
    "a constant that is NaN": (put(f"{UP}.nested_absmax", with_value(math.nan)), "infinite or not a number"),
    "a constant that is infinite": (put(f"{UP}.nested_absmax", with_value(math.inf)), "infinite or not a number"),
    "a negative constant": (put(f"{UP}.nested_absmax", with_value(-1.0)), "negative"),
    "other values of constants": (put(f"{UP}.nested_quant_map", with_value(0.5)), "not those of the dynamic 8-bit"),
    "values that are NaN": (put(f"{UP}.nested_quant_map", with_value(math.nan)), "not those of the dynamic 8-bit"),
    "other values": (put(f"{UP}.quant_map", with_value(0.5)), "its values are not those of nf4"),
    "no JSON": (put(STATE, text("{")), "is no part of a 4-bit layer"),
    "no UTF-8": (put(STATE, lambda _state: torch.full((9,), 255, dtype=torch.uint8)), "is no part of a 4-bit layer"),
    "no object": (put(STATE, text("[]")), "it is no JSON object"),
    "nested too deep": (put(STATE, text("[" * 4000)), "is no part of a 4-bit layer"),
    "a key twice": (put(STATE, text('{"blocksize": 64, "blocksize": 64}')), "a key twice"),
    "too long": (put(STATE, text(" " * 5000)), "must be U8 with at most 4096 bytes"),
    "another shape": (put(STATE, lambda state: described(state, shape=[64, 128])), "'shape': \\[64, 128\\]"),
    "a shape of floats": (put(STATE, lambda state: described(state, shape=[128.0, 64])), "128.0"),
    "another block": (put(STATE, lambda state: described(state, blocksize=128)), "'blocksize': 128"),
    "another outer block": (put(STATE, lambda state: described(state, nested_blocksize=64)), "and must describe"),
    "a type that is code": (put(STATE, lambda state: described(state, dtype="load")), "a dtype of bfloat16, float16"),
    "an offset that is NaN": (put(STATE, lambda state: described(state, nested_offset=math.nan)), "the number NaN"),
    "an offset that is too large": (
        put(STATE, text('{"quant_type": "nf4", "blocksize": 64, "nested_offset": 1e999}')),
        "no finite number",
    ),
    "no offset": (put(STATE, lambda state: described(state, nested_offset=None)), "no finite number"),
    "a key too many": (put(STATE, lambda state: described(state, extra=1)), "'extra': 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_forged_file_is_rejected_with_the_tensors_name(tmp_path: Path, in_nf4: Path, name: str) -> None:
    change, message = BROKEN[name]
    failure = refused(changed(in_nf4, tmp_path, change), tmp_path)
    assert failure.exit_code is ExitCode.MODEL_UNAVAILABLE
    assert re.search(message, failure.message), failure.message
