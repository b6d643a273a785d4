"""NF4 as in the paper and bitsandbytes: values, weights in training, and bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import LlamaConfig

from qlora_api.contract import ExitCode
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.base.load import load_base, storage_of
from qlora_trainer.model.nf4.quantization import layer_bytes
from tests.support.models.tiny import SHAPE, save_model
from tests.support.training import prepared, run

# arXiv 2305.14314, appendix E: "the exact values of the NF4 data type".
PAPERS_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
KINDS = [QuantizationSpec(), QuantizationSpec(double_quant=False), QuantizationSpec(type="fp4")]
# Layers that fill no whole block: 3 × 50 and 7 × 9 weights, in addition to the usual.
ODD_SHAPES = [(128, 64), (3, 50), (7, 9), (1, 1)]


def quantized(outputs: int, inputs: int, spec: QuantizationSpec) -> Linear4bit:
    """A layer of random weights in 4 bit, as loading makes it."""
    layer = Linear4bit(
        inputs,
        outputs,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=spec.double_quant,
        quant_type=spec.type,
    )
    torch.manual_seed(0)
    layer.weight.data = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    return layer.to("cpu")


def layers_of(model: torch.nn.Module) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: f"{spec.type}-{spec.double_quant}")
def test_every_loaded_weight_equals_bitsandbytes_quantization_of_the_file(
    tiny_qwen2: Path, spec: QuantizationSpec
) -> None:
    original = load_file(tiny_qwen2 / "model.safetensors")
    model = load_base(tiny_qwen2, spec, "cpu")
    identity: dict[Any, Any] = {}

    layers = layers_of(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        packed, state = quantize_4bit(
            original[f"{name}.weight"], blocksize=64, compress_statistics=spec.double_quant, quant_type=spec.type
        )
        assert torch.equal(layer.weight.data, packed), name
        read = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(read, dequantize_4bit(packed, state)), name
        # The layer multiplies with that weight: of the identity it makes its transpose.
        size = layer.in_features
        unit = identity.setdefault(size, torch.eye(size, dtype=torch.bfloat16))
        bias = 0 if layer.bias is None else layer.bias
        with torch.no_grad():
            assert torch.equal(layer(unit), read.t() + bias), name


def test_the_values_are_those_of_the_paper_and_each_weight_gets_the_nearest() -> None:
    layer = quantized(64, 128, QuantizationSpec(double_quant=False))
    state = layer.weight.quant_state
    torch.testing.assert_close(state.code, torch.tensor(PAPERS_NF4), rtol=0, atol=0)

    torch.manual_seed(0)
    weights = torch.randn(64, 128, dtype=torch.bfloat16).float().reshape(-1, 64)
    largest = weights.abs().amax(dim=1, keepdim=True)
    nearest = (weights[..., None] / largest[..., None] - torch.tensor(PAPERS_NF4)).abs().argmin(dim=-1)
    packed = layer.weight.data.flatten().to(torch.int64)
    found = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1, 64)

    assert torch.equal(state.absmax, largest.flatten())
    assert torch.equal(found, nearest)


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: f"{spec.type}-{spec.double_quant}")
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_a_layers_bytes_follow_from_its_shape(shape: tuple[int, int], spec: QuantizationSpec) -> None:
    layer = quantized(*shape, spec)
    blocks = -(-shape[0] * shape[1] // 64)

    found = storage_of(layer)

    constants = blocks + 4 * -(-blocks // 256) + 4 + 256 * 4 if spec.double_quant else 4 * blocks
    expected = -(-shape[0] * shape[1] // 2) + 16 * 4 + constants
    assert (found.parameters, found.bytes) == (shape[0] * shape[1], expected)


def test_a_large_layer_takes_4_127_bits_a_parameter() -> None:
    found = storage_of(quantized(4096, 4096, QuantizationSpec()))

    assert found.parameters == 4096 * 4096
    assert found.bits_per_parameter == pytest.approx(4.127, abs=0.002)


def test_all_layers_of_a_model_are_counted_and_nothing_else(tiny_llama: Path) -> None:
    model = load_base(tiny_llama, QuantizationSpec(), "cpu")
    sizes = [layer.weight.quant_state.shape.numel() for layer in layers_of(model).values()]

    found = storage_of(model)

    assert found.parameters == sum(sizes) == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert found.bytes == sum(layer_bytes(size, double_quant=True) for size in sizes)
    assert storage_of(torch.nn.Linear(4, 4)).bits_per_parameter == 0.0


def test_a_layer_held_in_another_way_is_rejected_by_name(tiny_llama: Path) -> None:
    model = load_base(tiny_llama, QuantizationSpec(), "cpu")
    state = layers_of(model)["model.layers.1.mlp.up_proj"].weight.quant_state
    state.absmax = state.absmax.float()

    with pytest.raises(StepFailure, match=r"^model\.layers\.1\.mlp\.up_proj\.weight takes 5704 bytes and 5320 ") as e:
        storage_of(model)
    assert e.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_a_trained_job_reports_the_memory_of_its_base(tmp_path: Path) -> None:
    wide = save_model(tmp_path / "model", LlamaConfig(**(SHAPE | {"hidden_size": 256, "intermediate_size": 512})))
    context = prepared(tmp_path / "workspace", wide, {"training": {"maxSteps": 1}})

    record = run(context)

    expected = storage_of(load_base(wide, QuantizationSpec(), "cpu"))
    assert record.quantized_parameters == expected.parameters
    assert record.bits_per_parameter == pytest.approx(expected.bits_per_parameter, abs=1e-4)
