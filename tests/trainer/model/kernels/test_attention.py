"""Attention and its gradients equal explicit scores; unknown settings are rejected."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from benchmarks.kernels import Launches
from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.kernels.attention import RowBoundaries, rows_attention
from qlora_trainer.model.memory.backward import gradients
from qlora_trainer.model.memory.device import fake_cuda
from qlora_trainer.model.memory.live_bytes import LiveBytes
from tests.support.models.attention import HEADS, LENGTHS, MODULE, tensors, visible

ROWS = RowBoundaries.from_lengths(LENGTHS, torch.device("cpu"))


@pytest.mark.parametrize("window", [None, 1, 40, 300])
def test_capped_attention_and_its_gradients_are_those_of_transformers(window: int | None) -> None:
    settings: dict[str, Any] = {"scaling": 0.7, "softcap": 1.5}
    mask = torch.zeros(1, 1, sum(LENGTHS), sum(LENGTHS)).masked_fill(~visible(window), float("-inf"))
    inputs = tensors()
    expected, _ = eager_attention_forward(MODULE, *inputs, mask, **settings)
    output, _ = rows_attention(MODULE, *inputs, None, sliding_window=window, rows=ROWS, **settings)

    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_the_familys_dropout_of_attention_is_off() -> None:
    """It is a setting of the base's own training, and the base is frozen."""
    inputs = tensors()
    for softcap in (None, 1.5):
        dropped, _ = rows_attention(MODULE, *inputs, None, dropout=0.5, softcap=softcap, rows=ROWS)
        assert torch.equal(dropped, rows_attention(MODULE, *inputs, None, softcap=softcap, rows=ROWS)[0])


def test_another_row_changes_not_a_bit_of_a_rows_capped_attention_and_gradients() -> None:
    first, last = slice(LENGTHS[0]), slice(-LENGTHS[-1], None)
    results = []
    for shift in (0.0, 1.0):
        inputs = tensors()
        with torch.no_grad():
            for tensor in inputs:
                tensor[:, :, first] += shift
        output, _ = rows_attention(MODULE, *inputs, None, softcap=1.5, sliding_window=300, rows=ROWS)
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        results.append([output[:, last], *(gradient[:, :, last] for gradient in gradients)])
    assert all(map(torch.equal, *results))


def test_a_kernel_is_given_few_numbers_of_rows_and_few_bounds_of_them() -> None:
    """It is built for few, for any packed rows."""
    generator = torch.Generator().manual_seed(0)
    geometries = set()
    for _ in range(200):
        lengths = tuple(torch.randint(20, 400, (int(torch.randint(5, 16, (), generator=generator)),)).tolist())
        rows = RowBoundaries.from_lengths(lengths, torch.device("cpu"))
        offsets = rows.offsets.tolist()
        assert [after - before for before, after in pairwise(offsets)][: len(lengths)] == list(lengths)
        assert set(offsets[len(lengths) :]) == {sum(lengths)}
        assert rows.longest >= max(lengths)
        geometries.add((len(offsets), rows.longest))
    assert len(geometries) <= 4


@pytest.mark.parametrize(
    ("module", "mask", "settings", "message"),
    [
        (MODULE, None, {"s_aux": torch.zeros(HEADS), "softcap": 1.0}, "its attention takes softcap and s_aux"),
        (MODULE, None, {"position_bias": 1, "more": 2}, "takes more, position_bias"),
        (SimpleNamespace(is_causal=False), None, {}, "attend to later ones"),
        (MODULE, torch.zeros(1), {}, "no mask"),
    ],
)
def test_an_attention_setting_that_is_not_computed_is_rejected(
    module: Any, mask: Tensor | None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        rows_attention(module, *tensors(), mask, **settings)


def test_keys_from_a_cache_are_rejected() -> None:
    query, key, value = tensors()
    with pytest.raises(ModelError, match="no cache"):
        rows_attention(MODULE, query[:, :, -1:], key, value, None)


def explicit(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Compute attention by its formula, [1, tokens, heads, head size].

    See Vaswani et al. 2017, arXiv 1706.03762.
    """
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
    query, key, value = inputs
    output, _ = rows_attention(MODULE, query, key, value, None, scaling=0.7, sliding_window=window, rows=ROWS)

    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.autograd.grad((expected * weights.double()).sum(), exact)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    for found, reference in zip((output, *gradients), (expected, *wanted), strict=True):
        assert found.dtype == dtype
        # A token that sees only itself has a gradient of 0 for its query, but for the rounding of sums in 32 bit.
        rounding_of_zeros = 1e-5 * found.numel() ** 0.5
        assert (found.double() - reference).norm() <= tolerance * reference.norm() + rounding_of_zeros


@pytest.mark.parametrize(("size", "value_size", "groups"), [(512, 512, 4), (192, 128, 1)], ids=["large", "latent"])
def test_a_gpu_computes_heads_that_flash_attention_does_not_take_in_one_call_for_all_rows(
    size: int, value_size: int, groups: int
) -> None:
    counts = set()
    for lengths in ((341,), (121, 120, 100)):
        with fake_cuda(), Launches() as launches:
            rows = RowBoundaries(lengths, torch.empty(5, dtype=torch.int32, device="cuda"))
            query, key, value = (
                torch.empty(1, heads, 341, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
                for heads, width in ((4, size), (4 // groups, size), (4 // groups, value_size))
            )
            output, _ = rows_attention(MODULE, query, key, value, None, rows=rows)
            gradients(output, [query, key, value], torch.empty_like(output))
        assert output.shape == (1, 341, 4, value_size)
        counts.add(launches.operations)
    assert len(counts) == 1


def test_one_long_row_among_many_short_ones_takes_little_more_memory_than_a_single_row() -> None:
    """The kernel's backward pass takes as much for each row as for the longest."""

    def most_bytes(*lengths: int) -> int:
        with fake_cuda(), LiveBytes("cuda") as live:
            rows = RowBoundaries(lengths, torch.empty(len(lengths) + 1, dtype=torch.int32, device="cuda"))
            query, key, value = (
                torch.empty(1, 4, 4096, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)
            )
            output, _ = rows_attention(MODULE, query, key, value, None, rows=rows)
            gradients(output, [query, key, value], torch.empty_like(output))
            return live.take_peak()

    assert most_bytes(2048, *[16] * 128) < 1.6 * most_bytes(4096)


def test_inputs_of_other_types_are_computed_in_the_type_of_autocast() -> None:
    query, key, value = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = rows_attention(MODULE, query, key, value.bfloat16(), None, rows=ROWS)
    narrow, _ = rows_attention(MODULE, query.bfloat16(), key.bfloat16(), value.bfloat16(), None, rows=ROWS)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, narrow)


def test_rows_that_do_not_cover_all_tokens_are_rejected() -> None:
    with pytest.raises(ValueError, match="rows of 300 tokens, but 1005 tokens"):
        rows_attention(MODULE, *tensors(), None, rows=RowBoundaries.from_lengths((300,), torch.device("cpu")))
