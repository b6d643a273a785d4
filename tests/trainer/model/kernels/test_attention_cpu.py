"""Attention on a CPU and its gradients equal explicit scores for all shapes and types."""

import pytest
import torch
from torch import Tensor

from qlora_trainer.model.kernels.attention import RowBoundaries, rows_attention
from tests.support.models.attention import HEADS, LENGTHS, MODULE, tensors, visible


def explicit(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention by its formula (Vaswani et al. 2017, arXiv 1706.03762), [1, tokens, heads, head size]."""
    shared = HEADS // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~visible(window), float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 40, 300, 2000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2**-18), (torch.bfloat16, 2**-7)])
def test_attention_and_its_gradients_are_those_of_explicit_scores(
    window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Up to rounding, as a share of the reference's norm.

    In 16 bit four values are rounded on the way to a gradient, each by at most 2^-9 of itself: the output, the
    gradients of the weights and of the scores, and the result. In 32 bit sums of up to 700 numbers are rounded, by
    2^-24 each time.
    """
    exact = [tensor.detach().to(dtype).double().requires_grad_() for tensor in tensors()]
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    expected = explicit(exact[0], exact[1], exact[2], 0.7, window)
    rows = RowBoundaries.from_lengths(LENGTHS, torch.device("cpu"))
    query, key, value = inputs
    output, _ = rows_attention(MODULE, query, key, value, None, scaling=0.7, sliding_window=window, rows=rows)

    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.autograd.grad((expected * weights.double()).sum(), exact)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for found, reference in zip((output, *gradients), (expected, *wanted), strict=True):
        assert found.dtype == dtype
        # A token that sees only itself has a gradient of 0 for its query, but for the rounding of sums in 32 bit.
        rounding_of_zeros = 1e-5 * found.numel() ** 0.5
        assert (found.double() - reference).norm() <= tolerance * reference.norm() + rounding_of_zeros


def test_inputs_of_other_types_are_computed_in_the_type_of_autocast() -> None:
    query, key, value = tensors()
    rows = RowBoundaries.from_lengths(LENGTHS, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = rows_attention(MODULE, query, key, value.bfloat16(), None, rows=rows)
    narrow, _ = rows_attention(MODULE, query.bfloat16(), key.bfloat16(), value.bfloat16(), None, rows=rows)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, narrow)


def test_rows_that_do_not_cover_all_tokens_are_rejected() -> None:
    with pytest.raises(ValueError, match="rows of 300 tokens, but 1005 tokens"):
        rows_attention(MODULE, *tensors(), None, rows=RowBoundaries.from_lengths((300,), torch.device("cpu")))
