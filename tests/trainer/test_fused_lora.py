"""The fused LoRA layer computes what PEFT's computes, and leaves to PEFT what it does not cover."""

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit as Base
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_trainer import fused_lora
from qlora_trainer.fused_lora import fuse_lora


class OneLayer(nn.Module):
    """A 4-bit layer as a model."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = Base(64, 128, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")

    def forward(self, x: Tensor) -> Tensor:
        """Its product."""
        output: Tensor = self.layer(x)
        return output


def adapted(*, bias: bool = False, **lora: Any) -> Any:
    """The layer with an adapter whose B is not 0."""
    torch.manual_seed(0)
    model = OneLayer(bias).to(torch.bfloat16).requires_grad_(False).to("cpu")
    model.layer.support_avx512bf16_for_cpu = False
    # PEFT asks for this before it makes a layer for 4-bit weights.
    model.is_loaded_in_4bit = True
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=4, target_modules=["layer"], **lora))
    nn.init.normal_(peft.base_model.model.layer.lora_B["default"].weight)
    return peft


def fused(**settings: Any) -> Any:
    """The same with the fused layer."""
    model = adapted(**settings)
    fuse_lora(model)
    assert isinstance(model.base_model.model.layer, fused_lora.FusedLora)
    return model


def results(model: Any) -> dict[str, Tensor]:
    """The output for fixed rows, and all gradients of a fixed function of it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 50, 64, generator=generator).bfloat16().requires_grad_()
    direction = torch.randn(1, 50, 128, generator=generator)
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    (output.float() * direction).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": output, "x": x.grad, **gradients}


def error(found: Tensor, expected: Tensor) -> float:
    """Of the one against the other, relative."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_peft_but_for_the_rounding(bias: bool) -> None:
    expected, found = results(adapted(bias=bias)), results(fused(bias=bias))

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        # 16-bit products have a relative error of about 2^-9 each.
        assert error(found[name], value) < 2**-7, name


def test_a_block_that_is_computed_again_leaves_out_its_last_product(monkeypatch: pytest.MonkeyPatch) -> None:
    dequantized: list[torch.Size] = []
    whole = fused_lora._dequantized

    def counted(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        dequantized.append(state.shape)
        return whole(weight, state, dtype)

    monkeypatch.setattr(fused_lora, "_dequantized", counted)
    model, x = fused(), torch.randn(1, 50, 64).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        checkpoint(model, x, use_reentrant=False).float().sum().backward()
    # Forward and backward; a block of one layer has nothing to compute again.
    assert len(dequantized) == 2


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.5}, {"use_dora": True}], ids=["dropout", "dora"])
def test_what_it_does_not_cover_is_pefts_to_the_last_bit(lora: dict[str, Any]) -> None:
    expected, found = results(adapted(**lora)), results(fused(**lora))

    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_without_gradients_and_without_the_adapter_it_is_pefts_to_the_last_bit() -> None:
    plain, model, x = adapted(), fused(), torch.randn(1, 50, 64).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(x), plain(x))
