"""Attention on a GPU: the variable-length kernel matches attention row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.model.kernels.attention import RowBoundaries, rows_attention

LENGTHS = (7, 130, 1, 64, 300)
SHAPES = [(4, 4, 64), (8, 2, 64), (8, 1, 128), (4, 2, 256), (2, 2, 96), (4, 2, 512)]


def inputs(heads: int, key_heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = ((1, heads, tokens, size), (1, key_heads, tokens, size), (1, key_heads, tokens, size))
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return query, key, value


def attend(
    tensors: tuple[Tensor, ...],
    window: int | None,
    softcap: float | None = None,
    sinks: tuple[float, ...] | None = None,
) -> Tensor:
    query, key, value = tensors
    rows = RowBoundaries.from_lengths(LENGTHS, query.device)
    scores = None if sinks is None else torch.tensor(sinks, device=query.device)
    settings: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "s_aux": scores}
    return rows_attention(torch.nn.Module(), query, key, value, None, rows=rows, **settings)[0]


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_32_bit_attention_on_the_cpu(shape: tuple[int, int, int], window: int | None) -> None:
    tensors = inputs(*shape)
    expected = attend(tuple(tensor.cpu().float() for tensor in tensors), window)
    found = attend(tensors, window).cpu().float()
    # Two roundings to bfloat16 (8 bits): of the weights and of the output.
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("window", [None, 16])
def test_a_capped_score_equals_the_cpus(window: int | None) -> None:
    tensors = inputs(4, 2, 64)
    expected = attend(tuple(tensor.cpu().float() for tensor in tensors), window, 20.0)
    torch.testing.assert_close(attend(tensors, window, 20.0).cpu().float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("window", [None, 16])
def test_no_row_sees_another_bit_for_bit(window: int | None) -> None:
    query, key, value = inputs(8, 2, 64)
    before = attend((query, key, value), window)
    changed, start = 1, LENGTHS[0]
    end = start + LENGTHS[changed]
    for tensor in (query, key, value):
        tensor[:, :, start:end] = torch.randn_like(tensor[:, :, start:end])
    after = attend((query, key, value), window)
    assert torch.equal(before[:, :start], after[:, :start])
    assert torch.equal(before[:, end:], after[:, end:])
    assert not torch.equal(before[:, start:end], after[:, start:end])


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("sinks", [None, (-1.0, 0.0, 2.0, 5.0)], ids=["without sinks", "with sinks"])
@pytest.mark.parametrize("size", [64, 512])
def test_output_and_gradients_equal_those_of_the_cpu(
    sinks: tuple[float, ...] | None, window: int | None, size: int
) -> None:
    tensors = tuple(tensor.requires_grad_() for tensor in inputs(4, 2, size))
    there = tuple(tensor.detach().cpu().float().requires_grad_() for tensor in tensors)
    found, expected = attend(tensors, window, sinks=sinks).float(), attend(there, window, sinks=sinks)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)
    found.square().sum().backward()
    expected.square().sum().backward()
    for found, expected in zip(tensors, there, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        error = (found.grad.cpu().float() - expected.grad).norm() / expected.grad.norm()
        assert float(error) < 2e-2
