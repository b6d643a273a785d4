"""Normalizations and activations match the family's; unknown ones stay unchanged."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qlora_trainer.core import cpu
from qlora_trainer.model.kernels.activations import fuse_activations
from qlora_trainer.model.kernels.norms import fuse_norms
from tests.support.families import FAMILIES

SIZE = 96
NORMS = [LlamaRMSNorm, Olmo2RMSNorm, Gemma2RMSNorm, nn.RMSNorm]
BY_HAND = {"olmo", "cohere", "cohere2"}
"""Families that subtract the mean without PyTorch's layer: they return the type of their input themselves."""


class Doubled(LlamaRMSNorm):
    """Almost a root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Gated(LlamaRMSNorm):
    """Takes two tensors."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class GatedOrNot(LlamaRMSNorm):
    """Takes a second tensor if it is given one, as Mamba's norms do."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


def norm(kind: type[nn.Module], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    module: Any = kind(SIZE, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight += 0.2 * torch.randn(SIZE)
    return module


def fused(module: nn.Module) -> Any:
    model = nn.Sequential(module)
    fuse_norms(model)
    return model[0]


def results(module: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradient of a fixed function of it."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype is torch.bfloat16):
        output = module(x)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((output * direction.to(output.dtype)).sum(), x)
    return [output, gradient]


@pytest.mark.parametrize("on_cpu", [True, False], ids=["ours", "torch"])
@pytest.mark.parametrize("kind", NORMS)
def test_a_root_mean_square_and_its_gradient_are_those_of_the_family(
    kind: type[nn.Module], on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "fuses_norms", lambda _device_type: on_cpu)
    sizes = torch.logspace(-4, 2, 50).unsqueeze(1)
    for dtype, tolerance in ((torch.float32, 2**-20), (torch.bfloat16, 2**-7)):
        x = (sizes * torch.randn(1, 50, SIZE, generator=torch.Generator().manual_seed(1))).to(dtype)
        expected = results(norm(kind, dtype), x)
        module = fused(norm(kind, dtype))
        assert type(module).__name__ == f"Fused{kind.__name__}"
        for found, reference in zip(results(module, x), expected, strict=True):
            assert found.dtype == dtype
            # Row by row: those that are small count too. Rounded twice by the one and the other, 2^-9 each time.
            errors = (found.float() - reference.float()).norm(dim=-1) / reference.float().norm(dim=-1)
            assert float(errors.max()) < tolerance


def test_in_16_bit_the_result_is_nearer_to_the_exact_one_than_the_familys() -> None:
    x = torch.randn(1, 500, SIZE).bfloat16()
    module = norm(LlamaRMSNorm, torch.bfloat16)
    exact = rms_norm(x.double(), (SIZE,), module.weight.double(), 1e-5)

    def error(output: Tensor) -> float:
        return float((output.double() - exact).norm())

    family = error(results(module, x)[0])
    assert error(results(fused(module), x)[0]) < family


@pytest.mark.parametrize("kind", NORMS[:3])
def test_an_evaluation_is_the_familys_to_the_last_bit(kind: type[nn.Module]) -> None:
    x = torch.randn(1, 50, SIZE).bfloat16()
    with torch.no_grad():
        assert torch.equal(fused(norm(kind, torch.bfloat16))(x), norm(kind, torch.bfloat16)(x))


@pytest.mark.parametrize(
    "module", [Doubled(SIZE), Gated(SIZE), GatedOrNot(SIZE), nn.PReLU(1), nn.Linear(8, 8), nn.Embedding(4, 8)]
)
def test_modules_with_another_computation_stay_as_they_are(module: nn.Module) -> None:
    before = type(module)
    assert type(fused(module)) is before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_of_every_family_are_recognized_without_their_data(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family][0].get_text_config(decoder=True))
    parameters = [name for name, _ in model.named_parameters()]
    fuse_norms(model)
    kinds = {type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__}
    assert all(kind.startswith("Fused") for kind in kinds) == (family not in BY_HAND)
    assert [name for name, _ in model.named_parameters()] == parameters


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"])
def test_a_gelu_of_many_operations_becomes_one(name: str) -> None:
    model = nn.Sequential(ACT2FN[name])
    x = torch.linspace(-10, 10, 1001)
    expected = model(x)
    fuse_activations(model)
    assert type(model[0]) is nn.GELU
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "gelu", "quick_gelu", "relu2", "mish", "linear", "laplace"])
def test_another_activation_stays_as_it_is(name: str) -> None:
    model = nn.Sequential(ACT2FN[name])
    before = model[0]
    fuse_activations(model)
    assert model[0] is before
