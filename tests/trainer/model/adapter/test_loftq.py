"""LoftQ's decomposition leaves hardly more of the error of quantization than a full one, and is always the same."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from qlora_api.spec.training import LoraSpec, QuantizationSpec
from qlora_trainer.model.adapter import loftq
from qlora_trainer.model.adapter.attach import adapter_parameters, attach_adapter
from qlora_trainer.model.adapter.loftq import _largest
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.training.distributed.sharding import STORAGE_DTYPE
from tests.support.four_bit import convert
from tests.support.sequences import CPU

NF4 = QuantizationSpec()


def quantization_error(weight: Tensor) -> Tensor:
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return weight - dequantize_4bit(packed, state)


def weights(rows: int, columns: int, *, low_rank: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    if low_rank:
        factors = torch.randn(rows, 32, generator=generator), torch.randn(32, columns, generator=generator)
        weight += 0.01 * factors[0] @ factors[1]
    return weight


@pytest.mark.parametrize(
    ("shape", "rank", "low_rank"),
    [
        # The first two fit into the projections.
        ((64, 128), 4, False),
        ((160, 96), 64, True),
        ((512, 1408), 16, False),
        ((1024, 1024), 64, True),
        pytest.param((4096, 4096), 64, False, marks=pytest.mark.slow),
        pytest.param((4096, 4096), 64, True, marks=pytest.mark.slow),
    ],
)
def test_what_is_left_of_the_error_is_at_most_a_thousandth_larger(
    shape: tuple[int, int], rank: int, low_rank: bool
) -> None:
    missing = quantization_error(weights(*shape, low_rank=low_rank))
    best = torch.linalg.svdvals(missing.double())[rank:].norm()

    left, values, right = _largest(missing, rank)

    assert (missing - (left * values) @ right).norm() <= (1 + 1e-3) * best
    assert bool((values[:-1] >= values[1:]).all())


def test_the_layers_of_a_base_in_main_memory_are_decomposed_on_the_device(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a base that is to be sharded. Without a GPU the device is the one without data."""
    asked: list[torch.device] = []
    decompose = loftq._largest

    def noted(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(matrix.device)
        return decompose(torch.ones(matrix.shape), rank)

    monkeypatch.setattr(loftq, "_largest", noted)
    convert(tiny_llama, tmp_path / "base", NF4)
    base = load_base(tmp_path / "base", NF4, "cpu", STORAGE_DTYPE)
    spec = LoraSpec(rank=4, alpha=8, initialization="loftq")
    layers = inspect_family(tiny_llama, spec).target_modules
    model = attach_adapter(
        base,
        spec,
        layers,
        seed=0,
        gradient_checkpointing=True,
        base_name="tiny",
        base_revision="0",
        original=BaseWeights(tiny_llama, base),
        device=torch.device("meta"),
    )

    assert [device.type for device in asked] == ["meta"] * len(layers)
    trained = adapter_parameters(model).values()
    assert all(parameter.device == CPU and parameter.count_nonzero() for parameter in trained)


def test_it_is_the_same_each_time_and_changes_no_other_random_number() -> None:
    missing = quantization_error(weights(256, 300, low_rank=False))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = _largest(missing, 8)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(6)
    for found, before in zip(_largest(missing, 8), first, strict=True):
        assert torch.equal(found, before)
