"""On a CPU every 4-bit layer computes with the quantized weights, in the counted memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import LlamaConfig

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.architecture.dequantized_model import model_without_weights
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.experts.stack import ExpertStack, Mxfp4Stack
from qlora_trainer.model.memory.live_bytes import LiveBytes
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.model.nf4.dequantization import correct_dequantization
from tests.support.models.four_bit import convert
from tests.support.models.tiny import SHAPE, save_model

# Half a block a row, one and a half, less than a block in all, no whole number of blocks, whole blocks, an odd row.
SHAPES = [(64, 32), (64, 96), (3, 10), (5, 50), (2, 3, 22), (64, 128), (7, 9)]


@pytest.fixture(autouse=True)
def _corrected() -> None:
    correct_dequantization()


def values(packed: Tensor, absmax: Tensor, kind: str, size: int) -> Tensor:
    """Unpack by the format: two values a byte, high half first, a constant per 64."""
    flat = packed.reshape(-1).view(torch.uint8).int()
    places = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:size]
    return get_4bit_type(kind, device="cpu")[places] * absmax.repeat_interleave(64)[:size]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_of_any_shape_is_dequantized_block_by_block(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, storage: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype) * 0.1
    packed, state = quantize_4bit(weight, blocksize=64, quant_type=kind)
    if packed.numel() % storage.itemsize:
        pytest.skip("bytes that are no whole number of this type")

    found = dequantize_4bit(packed.view(-1).view(storage).view(-1, 1), state)

    assert (found.dtype, found.shape) == (dtype, weight.shape)
    assert torch.equal(found.view(-1), values(packed, state.absmax, kind, weight.numel()).to(dtype))


def test_layers_of_a_model_multiply_with_the_merged_weights(tmp_path: Path) -> None:
    """Its inner size is no multiple of 64, as in a few published models."""
    model = save_model(tmp_path / "model", LlamaConfig(**SHAPE | {"hidden_size": 96, "intermediate_size": 160}))
    convert(model, tmp_path / "base", QuantizationSpec(double_quant=False))
    base = load_base(tmp_path / "base", QuantizationSpec(double_quant=False), "cpu")
    weights = BaseWeights(tmp_path / "base", model_without_weights(model))

    layers = {name: module for name, module in base.named_modules() if isinstance(module, Linear4bit)}

    assert len(layers) == 14
    for name, layer in layers.items():
        state = layer.weight.quant_state
        stored = values(layer.weight.data, state.absmax, "nf4", state.shape.numel()).to(torch.bfloat16)
        unit = torch.eye(layer.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(layer(unit).t(), stored.view(state.shape)), name
        assert torch.equal(weights[f"{name}.weight"], stored.view(state.shape)), name


STACK = (4, 512, 512)


def allocated(function: Callable[[], Tensor]) -> int:
    """Return the peak of the bytes that PyTorch's allocator has given out."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function()
    assert kept.numel()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    "stack",
    [
        Mxfp4Stack(STACK, "cpu"),
        ExpertStack(STACK, 2, QuantizationSpec(), "cpu"),
        ExpertStack(STACK, 2, QuantizationSpec(double_quant=False), "cpu"),
    ],
    ids=["mxfp4", "nf4", "nf4 of one level"],
)
def test_the_allocator_matches_the_count_of_a_dry_run(stack: ExpertStack | Mxfp4Stack) -> None:
    live = LiveBytes("cpu")
    with live:
        for buffer in stack.buffers():
            # Places that are in the tables.
            live.add(buffer.zero_())
        before = live.bytes
        live.take_peak()
        stack.dense(0, 4, torch.bfloat16)
    counted = live.take_peak() - before

    # Small tensors of bookkeeping are rounded up.
    assert allocated(lambda: stack.dense(0, 4, torch.bfloat16)) == pytest.approx(counted, rel=0.01)
