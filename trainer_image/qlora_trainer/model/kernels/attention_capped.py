"""Attention with capped scores within rows, as one differentiable operation: no kernel of PyTorch has a cap.

Scores exist for a block of queries at a time, in 32 bit, and are computed again in backward. Queries that share a key
are rows of one matmul, so that no key is copied for each of them, and what can be is computed in place.

FlexAttention has a cap, but compiles for each shape. The scores of a block take heads × 256 × row length × 4 bytes, a
few times over, instead of the square of the row length.
"""

from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_trainer.model.protocols import AutogradContext

_QUERIES = 256
"""Queries whose capped scores are computed together.

The scores are heads x this x tokens of the row, in 32 bit, four times over.
"""


def capped_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float,
) -> Tensor:
    """Attention with the scores `softcap * tanh(scale * query · key / softcap)` (Gemma 2, arXiv 2408.00118).

    `query` is [1, heads, tokens, head size]; `key` and `value` may have fewer heads. A token sees itself and those
    before it in the same row, of `lengths` tokens, or of these only the `window - 1` before it. Returns
    [1, tokens, heads, head size].
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    return cast("Tensor", _CappedRows.apply(query, key, value, lengths, scale, window, softcap))


class _Context(AutogradContext, Protocol):
    settings: tuple[tuple[int, ...], float, int | None, float]


class _CappedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        context: _Context,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float,
    ) -> Tensor:
        _, heads, tokens, _ = query.shape
        output = query.new_empty(1, tokens, heads, value.shape[3])
        # Of each query the logarithm of the sum of its scores' exponentials.
        normalizers = query.new_empty(heads, tokens, dtype=torch.float32)
        for block, seen, hidden in _blocks(lengths, window, query.device):
            scores = _tanh(query, key, block, seen, scale / softcap).mul_(softcap)
            _by_head(scores, heads).masked_fill_(hidden, float("-inf"))
            sums = scores.logsumexp(dim=2, keepdim=True)
            weights = scores.sub_(sums).exp_().to(value.dtype)
            output[0, block] = _by_head(weights @ value[0, :, seen], heads).transpose(0, 1)
            normalizers[:, block] = _by_head(sums, heads).squeeze(2)
        context.save_for_backward(query, key, value, output, normalizers)
        context.settings = lengths, scale, window, softcap
        return output

    @staticmethod
    @once_differentiable
    def backward(context: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, normalizers = context.saved_tensors
        lengths, scale, window, softcap = context.settings
        heads, groups = query.shape[1], key.shape[1]
        gradient = gradient.transpose(1, 2)
        query_gradient = torch.empty_like(query)
        # Every block of a row adds to these.
        key_gradient, value_gradient = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        for block, seen, hidden in _blocks(lengths, window, query.device):
            of_output = _by_key(gradient, block, groups)
            # A query's weights add up to one: what is the same for all of them changes nothing.
            common = (of_output.float() * _by_key(output.transpose(1, 2), block, groups).float()).sum(2, keepdim=True)
            tanh = _tanh(query, key, block, seen, scale / softcap)
            weights = (tanh * softcap).sub_(normalizers[:, block].reshape(groups, -1, 1)).exp_()
            _by_head(weights, heads).masked_fill_(hidden, 0.0)
            value_gradient[0, :, seen] += weights.to(value.dtype).transpose(1, 2) @ of_output
            # The derivative of the cap is 1 - tanh².
            slope = tanh.square_().neg_().add_(1.0).mul_(weights)
            of_scores = (of_output @ value[0, :, seen].transpose(1, 2)).float().sub_(common).mul_(slope).mul_(scale)
            of_scores = of_scores.to(query.dtype)
            query_gradient[0, :, block] = _by_head(of_scores @ key[0, :, seen], heads)
            key_gradient[0, :, seen] += of_scores.transpose(1, 2) @ _by_key(query, block, groups)
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), None, None, None, None


def _tanh(query: Tensor, key: Tensor, block: slice, seen: slice, factor: float) -> Tensor:
    """tanh(factor · query · key), float32 [key heads, queries of these, tokens seen]."""
    products = _by_key(query, block, key.shape[1]) @ key[0, :, seen].transpose(1, 2)
    return products.to(torch.float32).mul_(factor).tanh_()


def _by_key(tensor: Tensor, block: slice, groups: int) -> Tensor:
    """The block's tokens of [1, heads, tokens, size], grouped by key.

    Returns [1, key heads, queries of these, size].
    """
    return tensor[0, :, block].reshape(groups, -1, tensor.shape[3])


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """[key heads, queries of these, any] as [heads, tokens of the block, any]."""
    return tensor.view(heads, -1, tensor.shape[2])


def _blocks(
    lengths: tuple[int, ...], window: int | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of each block: its queries' tokens, the tokens that any of them sees, and which each of them does not.

    The last is bool [queries, tokens seen].
    """
    start = 0
    for length in lengths:
        end = start + length
        for first in range(start, end, _QUERIES):
            block = slice(first, min(first + _QUERIES, end))
            seen = slice(start if window is None else max(start, first + 1 - window), block.stop)
            queries, keys = (torch.arange(part.start, part.stop, device=device) for part in (block, seen))
            distance = queries[:, None] - keys[None, :]
            yield block, seen, (distance < 0) if window is None else (distance < 0) | (distance >= window)
        start = end
