"""Adapters that share one pass of the base compute what each computes alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from qlora_api.memory.training_shape import RECOMPUTE_ALL
from qlora_trainer.core import cpu
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE
from qlora_trainer.model.adapter.attach import (
    activate_adapter,
    adapter_parameters,
    adapter_tensors,
    attach_adapter,
    attach_further_adapter,
    restore_adapter,
    save_adapter,
)
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.kernels.fused_lora import require_apart, routing_of
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.joint import joint_losses, route
from qlora_trainer.model.losses.loss import batch_loss
from tests.support.models.adapted import NF4
from tests.support.models.sequences import CPU, random_sequence
from tests.support.resolved import resolved_lora

# The first is of its own shape and scale, and lacks layers that others adapt.
ADAPTERS = {
    "default": (resolved_lora(rank=8, alpha=4, target_modules=("q_proj", "o_proj", "up_proj")), 3),
    "job00": (resolved_lora(rank=4, alpha=8), 4),
    "job01": (resolved_lora(rank=4, alpha=8, layers_to_transform=(1,)), 5),
}
ROWS = {"default": (40, 25, 70), "job00": (90, 31), "job01": (12, 55, 64, 8)}
BATCHES = {name: Batch.from_sequences([random_sequence(rows, seed=len(rows))], CPU) for name, rows in ROWS.items()}
NAME, REVISION = "org/tiny", "0123abc"


def alone(folder: Path, name: str) -> Any:
    """The model with this adapter only."""
    lora, seed = ADAPTERS[name]
    targets = inspect_family(folder, lora).target_modules
    base = load_base(folder, NF4, "cpu")
    return attach_adapter(
        base, lora, targets, seed=seed, recomputation=RECOMPUTE_ALL, base_name=NAME, base_revision=REVISION
    )


def together(folder: Path) -> Any:
    """The model with all adapters."""
    first, *others = ADAPTERS
    model = alone(folder, first)
    for name in others:
        lora, seed = ADAPTERS[name]
        attach_further_adapter(
            model,
            name,
            lora,
            inspect_family(folder, lora).target_modules,
            seed=seed,
            base_name=NAME,
            base_revision=REVISION,
        )
    return model


def leave_zero(model: Any, seed: int) -> None:
    """Give the active adapter a nonzero B, so that every tensor has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    tensors = adapter_tensors(model)
    restore_adapter(
        model, {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    )


def alone_results(model: Any, batch: Batch) -> list[Tensor]:
    """The loss, and the gradient of each tensor of the adapter."""
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        loss = batch_loss(model.get_base_model(), batch)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in adapter_parameters(model).values())]


def together_results(model: Any, batches: dict[str, Batch]) -> dict[str, list[Tensor]]:
    """The same of each adapter, from one pass."""
    with route(model, batches):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            losses = joint_losses(model, batches)
        torch.stack(list(losses.values())).sum().backward()
    results = {}
    for name, loss in losses.items():
        activate_adapter(model, name)
        results[name] = [loss.detach(), *(parameter.grad for parameter in adapter_parameters(model).values())]
    return results


def test_each_adapter_is_initialized_and_saved_as_alone(tiny_llama: Path, tmp_path: Path) -> None:
    model = together(tiny_llama)
    for name in ADAPTERS:
        activate_adapter(model, name)
        single = alone(tiny_llama, name)
        assert all(torch.equal(value, adapter_tensors(model)[key]) for key, value in adapter_tensors(single).items())
        for folder, saved in ((tmp_path / "alone", single), (tmp_path / "together", model)):
            folder.mkdir(exist_ok=True)
            save_adapter(saved, folder)
        files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
        assert ADAPTER_CONFIG_FILE in files
        assert {path.name: path.read_bytes() for path in (tmp_path / "together").iterdir()} == files


# All apart as on a CPU, two of three, and all stacked.
@pytest.mark.parametrize("stacked_ranks", [0, 12, 256])
def test_losses_and_gradients_of_one_pass_are_those_of_each_adapter_alone(
    stacked_ranks: int, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "stacked_ranks", lambda _device_type: stacked_ranks)
    model = together(tiny_llama)
    for seed, name in enumerate(ADAPTERS):
        activate_adapter(model, name)
        leave_zero(model, seed)
    found = together_results(model, BATCHES)
    # Those of each pass differ.
    assert not routing_of(model).masks
    for seed, name in enumerate(ADAPTERS):
        single = alone(tiny_llama, name)
        leave_zero(single, seed)
        for value, expected in zip(found[name], alone_results(single, BATCHES[name]), strict=True):
            # Rounding to 16 bit alone makes a difference of about one percent to the gradients in 32 bit.
            assert float((value - expected).norm() / expected.norm()) < 0.01


def test_a_loss_that_is_not_finite_reaches_no_other_adapter(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "stacked_ranks", lambda _device_type: 256)
    model = together(tiny_llama)
    with route(model, BATCHES):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            default, *others = joint_losses(model, BATCHES).values()
        (default * torch.nan + sum(others)).backward()
    found = {}
    for name in ADAPTERS:
        activate_adapter(model, name)
        found[name] = all(bool(parameter.grad.isfinite().all()) for parameter in adapter_parameters(model).values())
    assert found == {"default": False, "job00": True, "job01": True}


def test_an_adapter_without_rows_in_a_pass_gets_no_gradient(tiny_llama: Path) -> None:
    model = together(tiny_llama)
    together_results(model, {name: BATCHES[name] for name in ("default", "job01")})
    activate_adapter(model, "job00")
    assert all(parameter.grad is None for parameter in adapter_parameters(model).values())


def test_after_a_joint_pass_a_plain_one_is_of_the_active_adapter(tiny_llama: Path) -> None:
    model = together(tiny_llama)
    together_results(model, BATCHES)
    activate_adapter(model, "job01")
    leave_zero(model, 7)
    single = alone(tiny_llama, "job01")
    leave_zero(single, 7)
    model.eval(), single.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [batch_loss(one.get_base_model(), BATCHES["job01"]) for one in (model, single)]
    assert torch.equal(*losses)


def test_a_layer_that_cannot_tell_whose_a_token_is_is_found(tiny_llama: Path) -> None:
    model = together(tiny_llama)
    require_apart(model)
    layer: Any = model.get_base_model().model.layers[0].self_attn.k_proj
    layer.__class__ = Linear4bit
    with pytest.raises(ModelError, match="does not take the tokens of several adapters"):
        require_apart(model)
