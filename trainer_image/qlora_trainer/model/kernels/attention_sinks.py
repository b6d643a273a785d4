"""Attention with sinks within rows on a GPU, by FlashAttention's kernel, which has none.

A sink is a score of each head, without a key and a value, that takes its share of a token's weights (gpt-oss, arXiv
2508.10925). With l, the logarithm of the sum of a token's exponentiated scores, and l' that with the sink's, the output
is the one without a sink times exp(l - l'). The kernel's backward pass computes a weight as exp(score - l), and reads
the output only to sum its product with the gradient: given l' and the output with a sink, it is exact.
"""

from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import varlen

from qlora_trainer.model.protocols import AutogradContext

# Private, but what varlen_attn itself calls. cuDNN's backward pass takes no window, so FlashAttention is named.
_forward = torch.ops.torch_attn._varlen_attn
_backward = torch.ops.torch_attn._varlen_attn_backward
_BACKEND = varlen._FLASH_ATTENTION_BACKEND


def rescale(output: Tensor, normalizer: Tensor, sinks: Tensor) -> Tensor:
    """Give each head of an attention without sinks its sink; returns the normalizer with sinks.

    `output`: [..., heads, head size], changed in place. `normalizer`: [..., heads], the logarithms of the sums of
    exponentiated scores. `sinks`: [heads].
    """
    total = torch.logaddexp(normalizer, sinks.to(normalizer.dtype))
    output.mul_((normalizer - total).exp_().unsqueeze(-1))
    return total


def rows_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """Attention as `varlen_attn` computes it, with sinks: [tokens, heads, head size].

    `query` is [tokens, heads, head size]; `key` and `value` may have fewer heads. `sinks` are [heads] and frozen.
    """
    return cast("Tensor", _RowsWithSinks.apply(query, key, value, sinks, offsets, longest, scale, list(window_size)))


class _Context(AutogradContext, Protocol):
    longest: int
    scale: float
    window_size: list[int]


class _RowsWithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        context: _Context,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        offsets: Tensor,
        longest: int,
        scale: float,
        window_size: list[int],
    ) -> Tensor:
        is_causal = window_size == [-1, 0]
        given = (query, key, value, offsets, offsets, longest, longest, is_causal, scale, window_size, True)
        output, normalizer, random = _forward(*given, backend=_BACKEND)
        total = rescale(output, normalizer.T, sinks).T.contiguous()
        context.save_for_backward(query, key, value, output, total, offsets, random)
        context.longest, context.scale, context.window_size = longest, scale, window_size
        return cast("Tensor", output)

    @staticmethod
    @once_differentiable
    def backward(context: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, total, offsets, random = context.saved_tensors
        given = (gradient.contiguous(), query, key, value, output, total, offsets, offsets)
        longest, window_size = context.longest, context.window_size
        settings = (longest, longest, window_size == [-1, 0], random, context.scale, window_size)
        return (*_backward(*given, *settings, backend=_BACKEND), None, None, None, None, None)
