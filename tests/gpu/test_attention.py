"""Attention on a GPU: the variable-length kernel matches attention row by row."""

import pytest
import torch
from torch import Tensor

from qlora_trainer.model.kernels.attention import RowBoundaries, rows_attention

LENGTHS = (7, 130, 1, 64, 300)
SHAPES = [(4, 4, 64), (8, 2, 64), (8, 1, 128), (4, 2, 256), (2, 2, 96)]


def inputs(heads: int, key_heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    shapes = ((1, heads, tokens, size), (1, key_heads, tokens, size), (1, key_heads, tokens, size))
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return query, key, value


def attend(tensors: tuple[Tensor, Tensor, Tensor], window: int | None, softcap: float | None = None) -> Tensor:
    rows = RowBoundaries.from_lengths(LENGTHS, tensors[0].device)
    output, _ = rows_attention(torch.nn.Module(), *tensors, None, rows=rows, sliding_window=window, softcap=softcap)
    return output


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


def test_gradients_equal_those_of_the_cpu() -> None:
    tensors = tuple(tensor.requires_grad_() for tensor in inputs(4, 2, 64))
    there = tuple(tensor.detach().cpu().float().requires_grad_() for tensor in tensors)
    attend(tensors, None).float().square().sum().backward()
    attend(there, None).square().sum().backward()
    for found, expected in zip(tensors, there, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        error = (found.grad.cpu().float() - expected.grad).norm() / expected.grad.norm()
        assert float(error) < 2e-2
