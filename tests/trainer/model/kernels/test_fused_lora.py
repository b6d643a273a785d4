"""The fused LoRA layer computes the same as PEFT's, and leaves unsupported options to PEFT."""

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit as Base
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_trainer.model.kernels import fused_lora
from qlora_trainer.model.kernels.fused_lora import fuse_lora


class OneLayer(nn.Module):
    """A 4-bit layer as a model."""

    def __init__(self, bias: bool, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = Base(64, outputs, bias=bias, compute_dtype=dtype, quant_type="nf4")

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        output: Tensor = self.layer(x)
        return output


def adapted(*, bias: bool = False, outputs: int = 128, dtype: torch.dtype = torch.bfloat16, **lora: Any) -> Any:
    """The layer with an adapter of scale 1/2 whose B is not 0."""
    torch.manual_seed(0)
    model = OneLayer(bias, outputs, dtype).to(dtype).requires_grad_(False).to("cpu")
    model.layer.support_avx512bf16_for_cpu = False
    # PEFT asks for this before it makes a layer for 4-bit weights.
    model.is_loaded_in_4bit = True
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=4, target_modules=["layer"], **lora))
    nn.init.normal_(peft.base_model.model.layer.lora_B["default"].weight)
    return peft


def fused(*, recomputed: bool = False, **settings: Any) -> Any:
    """The same with the fused layer."""
    model = adapted(**settings)
    fuse_lora(model, recomputed=recomputed)
    assert isinstance(layer(model), fused_lora.FusedLora)
    return model


def layer(model: Any) -> Any:
    """The one with the adapter."""
    return model.base_model.model.layer


def results(model: Any, rows: int = 50, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The output for fixed rows, and all gradients of a fixed function of it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, rows, 64, generator=generator).to(dtype).requires_grad_()
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        output = checkpoint(model, x, use_reentrant=False) if getattr(layer(model), "recomputed", False) else model(x)
    direction = torch.randn(output.shape, generator=generator)
    (output.float() * direction).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": output, "x": x.grad, **gradients}


def error(found: Tensor, expected: Tensor) -> float:
    """Of the one against the other, relative."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("recomputed", [False, True], ids=["once", "recomputed"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
# The second is large enough to be computed in two parts, whose sizes differ.
@pytest.mark.parametrize(("rows", "outputs"), [(50, 128), (801, 576)])
def test_output_and_gradients_are_those_of_peft_but_for_the_rounding(
    rows: int, outputs: int, bias: bool, recomputed: bool
) -> None:
    expected = results(adapted(bias=bias, outputs=outputs), rows)
    found = results(fused(bias=bias, outputs=outputs, recomputed=recomputed), rows)

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        # 16-bit matmuls have a relative error of about 2^-9 each.
        assert error(found[name], value) < 2**-7, name


@pytest.mark.parametrize("recomputed", [False, True], ids=["once", "recomputed"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_in_float32_output_and_gradients_are_those_of_peft(
    bias: bool, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rounding hides a small mistake."""
    asked: list[torch.dtype] = []
    dequantize = fused_lora._dequantize

    def noted(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return dequantize(weight, state, dtype)

    monkeypatch.setattr(fused_lora, "_dequantize", noted)
    settings: dict[str, Any] = {"bias": bias, "dtype": torch.float32}
    expected = results(adapted(**settings), dtype=torch.float32)
    found = results(fused(recomputed=recomputed, **settings), dtype=torch.float32)

    assert set(asked) == {torch.float32}
    assert found.keys() == expected.keys()
    errors = {name: error(found[name], value) for name, value in expected.items()}
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize(("recomputed", "dequantized"), [(False, 5), (True, 4)])
def test_a_recomputed_block_skips_its_last_matmul_and_may_keep_weights(
    monkeypatch: pytest.MonkeyPatch, recomputed: bool, dequantized: int
) -> None:
    calls: list[str] = []

    def count(name: str) -> None:
        function = getattr(fused_lora, name)

        def counted(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(fused_lora, name, counted)

    count("_dequantize")
    count("_matmul_into")
    first, second = (fused(recomputed=recomputed, outputs=64) for _ in range(2))
    x = torch.randn(1, 50, 64).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checkpoint(lambda rows: second(first(rows)), x, use_reentrant=False).float().sum().backward()
    # Two matmuls forward, one of them again, two backward.
    assert calls.count("_matmul_into") == 5
    assert calls.count("_dequantize") == dequantized


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.5}, {"use_dora": True}], ids=["dropout", "dora"])
def test_variants_that_are_not_fused_are_pefts_to_the_last_bit(lora: dict[str, Any]) -> None:
    expected, found = results(adapted(**lora)), results(fused(**lora))

    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_without_gradients_or_the_adapter_the_output_is_pefts_to_the_last_bit() -> None:
    plain, model, x = adapted(), fused(), torch.randn(1, 50, 64).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(x), plain(x))
