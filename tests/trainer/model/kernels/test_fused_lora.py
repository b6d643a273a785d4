"""The fused LoRA layer computes the same as PEFT's, and leaves unsupported options to PEFT."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit as Base
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora_trainer.model.kernels import fused_lora
from qlora_trainer.model.kernels.fused_lora import fuse_lora, mark_recomputed
from qlora_trainer.training.optimizer import make_optimizer
from tests.support.resolved import resolved_training


class OneLayer(nn.Module):
    """A 4-bit layer as a model."""

    def __init__(self, bias: bool, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = Base(64, outputs, bias=bias, compute_dtype=dtype, quant_type="nf4")

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        output: Tensor = self.layer(x)
        return output


def adapted(
    *, bias: bool = False, outputs: int = 128, dtype: torch.dtype = torch.bfloat16, alpha: int = 4, **lora: Any
) -> Any:
    """The layer with an adapter of scale 1/2, or another, whose B is not 0."""
    torch.manual_seed(0)
    model = OneLayer(bias, outputs, dtype).to(dtype).requires_grad_(False).to("cpu")
    model.layer.support_avx512bf16_for_cpu = False
    # PEFT asks for this before it makes a layer for 4-bit weights.
    model.is_loaded_in_4bit = True
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=alpha, target_modules=["layer"], **lora))
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


# The second scale is not a power of two.
@pytest.mark.parametrize("alpha", [4, 3])
@pytest.mark.parametrize("recomputed", [False, True], ids=["once", "recomputed"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_in_float32_output_and_gradients_are_those_of_peft(
    bias: bool, recomputed: bool, alpha: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rounding hides a small mistake."""
    asked: list[torch.dtype] = []
    dequantize = fused_lora._dequantize

    def noted(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return dequantize(weight, state, dtype)

    monkeypatch.setattr(fused_lora, "_dequantize", noted)
    settings: dict[str, Any] = {"bias": bias, "dtype": torch.float32, "alpha": alpha}
    expected = results(adapted(**settings), dtype=torch.float32)
    found = results(fused(recomputed=recomputed, **settings), dtype=torch.float32)

    assert set(asked) == {torch.float32}
    assert found.keys() == expected.keys()
    errors = {name: error(found[name], value) for name, value in expected.items()}
    assert max(errors.values()) < 1e-6, errors


def test_a_power_of_two_scales_in_the_matmul_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    in_matmul = results(fused())
    monkeypatch.setattr("math.frexp", lambda _scale: (0.75, 0))
    afterwards = results(fused())

    assert all(torch.equal(in_matmul[name], value) for name, value in afterwards.items())


@torch.no_grad()
def assign(weight: nn.Parameter) -> None:
    weight.copy_(weight * 1.5)


@torch.inference_mode()
def scale_in_inference(weight: nn.Parameter) -> None:
    weight.mul_(1.5)


def replace_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.5


def step(weight: nn.Parameter, **settings: Any) -> None:
    training = resolved_training(learning_rate=0.1, **settings)
    weight.grad = torch.ones_like(weight)
    make_optimizer([weight], training).step()
    weight.grad = None


@pytest.mark.parametrize(
    "change",
    [
        assign,
        scale_in_inference,
        replace_data,
        *(partial(step, optimizer=name) for name in ("adamw", "paged_adamw_32bit", "paged_adamw_8bit")),
    ],
    ids=["assign", "inference", "data", "adamw", "32bit", "8bit"],
)
def test_a_pass_computes_with_the_weights_as_they_are_now(change: Callable[[nn.Parameter], None]) -> None:
    model, other = fused(), fused()
    before = results(model)
    model.zero_grad()
    for name in ("lora_A", "lora_B"):
        change(getattr(layer(model), name)["default"].weight)
        # The other has computed nothing yet.
        setattr(layer(other), name, getattr(layer(model), name))

    found, expected = results(model), results(other)
    assert not torch.equal(found["output"], before["output"])
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class Conversions(TorchDispatchMode):
    """Counts the adapter's matrices that are converted."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.matrices += len(args[0])
        return func(*args, **(kwargs or {}))


def test_weights_are_converted_once_until_they_change() -> None:
    model = fused()
    with Conversions() as counted:
        for _micro_batch in range(3):
            results(model)
        assert counted.matrices == 2
        assign(layer(model).lora_A["default"].weight)
        results(model)
    assert counted.matrices == 3


def test_a_block_that_is_recomputed_keeps_no_converted_weights() -> None:
    model = fused()
    results(model)
    freed = weakref.ref(layer(model).copies.of([layer(model).lora_A["default"].weight], torch.bfloat16)[0])
    mark_recomputed(model)
    assert freed() is None
    with Conversions() as counted:
        results(model)
    # Forward, and again for backward.
    assert counted.matrices == 4


def test_weights_of_the_matmuls_own_type_are_not_converted() -> None:
    with Conversions() as counted:
        results(fused(dtype=torch.float32), dtype=torch.float32)
    assert counted.matrices == 0


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
