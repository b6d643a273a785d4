"""LoftQ's decomposition leaves hardly more of the error of quantization than a full one, and is always the same."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from qlora_trainer.model.loftq import _largest


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
