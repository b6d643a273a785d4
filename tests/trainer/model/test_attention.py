"""Attention with capped scores equals that of transformers in every block of a long row; the unknown is rejected."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from qlora_trainer.model.attention import RowBoundaries, rows_attention
from tests.support.attention import HEADS, LENGTHS, MODULE, tensors, visible


@pytest.mark.parametrize("window", [None, 1, 40, 300])
def test_capped_attention_and_its_gradients_are_those_of_transformers(window: int | None) -> None:
    settings: dict[str, Any] = {"scaling": 0.7, "softcap": 1.5}
    mask = torch.zeros(1, 1, sum(LENGTHS), sum(LENGTHS)).masked_fill(~visible(window), float("-inf"))
    inputs = tensors()
    expected, _ = eager_attention_forward(MODULE, *inputs, mask, **settings)
    rows = RowBoundaries.of(LENGTHS, torch.device("cpu"))
    output, _ = rows_attention(MODULE, *inputs, None, sliding_window=window, rows=rows, **settings)

    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_dropout_of_capped_weights_is_the_same_when_they_are_recomputed() -> None:
    inputs = tensors()
    rows = RowBoundaries.of(LENGTHS, torch.device("cpu"))
    torch.manual_seed(2)
    output, _ = rows_attention(MODULE, *inputs, None, dropout=0.5, softcap=1.5, rows=rows)
    (gradient,) = torch.autograd.grad(output.sum(), inputs[2])
    torch.manual_seed(2)
    again, _ = rows_attention(MODULE, *inputs, None, dropout=0.5, softcap=1.5, rows=rows)

    assert torch.equal(output, again)
    # Output is linear in the values: with the same weights, its sum is their product with the gradient.
    torch.testing.assert_close((gradient * inputs[2]).sum(), output.sum(), rtol=1e-4, atol=1e-2)
    assert not torch.allclose(output, rows_attention(MODULE, *inputs, None, softcap=1.5, rows=rows)[0])


@pytest.mark.parametrize(
    ("module", "mask", "settings", "message"),
    [
        (MODULE, None, {"s_aux": torch.zeros(HEADS)}, "its attention takes s_aux"),
        (MODULE, None, {"position_bias": 1, "more": 2}, "takes more, position_bias"),
        (SimpleNamespace(is_causal=False), None, {}, "attend to later ones"),
        (MODULE, torch.zeros(1), {}, "no mask"),
    ],
)
def test_an_attention_setting_that_is_not_computed_is_rejected(
    module: Any, mask: Tensor | None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rows_attention(module, *tensors(), mask, **settings)


def test_keys_from_a_cache_are_rejected() -> None:
    query, key, value = tensors()
    with pytest.raises(ValueError, match="no cache"):
        rows_attention(MODULE, query[:, :, -1:], key, value, None)
