"""Causal attention within rows on a CPU, as one differentiable operation.

For rows below 256 tokens the kernel's 16-bit backward pass is up to five times slower than its 32-bit one, so short
rows have their gradients in 32 bit.
"""

from typing import Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_trainer.core import cpu
from qlora_trainer.model.kernels.attention_sinks import rescale
from qlora_trainer.model.protocols import AutogradContext

# Private, but what scaled_dot_product_attention itself calls here.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def causal_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    lengths: tuple[int, ...],
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attention of each token to itself and those before it in its row: [1, tokens, heads, head size].

    `query` is [1, heads, tokens, head size]; `key` and `value` may have fewer heads. `lengths` are the rows' tokens.
    With a window a token sees itself and the `window - 1` before it. `sinks` are [heads] and frozen: see
    `attention_sinks`, whose arithmetic holds for this kernel too. Raises ValueError unless the rows are all tokens.
    """
    if sum(lengths) != query.shape[2]:
        raise ValueError(f"rows of {sum(lengths)} tokens, but {query.shape[2]} tokens")
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    return cast("Tensor", _CausalRows.apply(query, key, value, sinks, lengths, scale, window))


class _Context(AutogradContext, Protocol):
    lengths: tuple[int, ...]
    scale: float | None
    window: int | None


class _CausalRows(torch.autograd.Function):
    @staticmethod
    def forward(
        context: _Context,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        lengths: tuple[int, ...],
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        normalizers = []
        for row, padded in _rows(lengths):
            parts = (_pad(tensor[:, :, row], padded, tensor.dtype) for tensor in (query, key, value))
            mask = _mask(padded, window, query.dtype)
            row_output, normalizer = _forward(*parts, 0.0, mask is None, attn_mask=mask, scale=scale)
            if sinks is not None:
                total = rescale(row_output.transpose(1, 2), normalizer.transpose(1, 2), sinks)
                normalizer = total.transpose(1, 2).contiguous()
            output[:, row] = row_output[:, :, : row.stop - row.start].transpose(1, 2)
            normalizers.append(normalizer)
        context.save_for_backward(query, key, value, output, *normalizers)
        context.lengths, context.scale, context.window = lengths, scale, window
        return output

    @staticmethod
    @once_differentiable
    def backward(context: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *normalizers = context.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
        # The kernel gives each head of the keys to one thread: a copy for every head of the queries keeps all busy.
        shared = query.shape[1] // key.shape[1]
        keys, values = (t.repeat_interleave(shared, dim=1) if shared > 1 else t for t in (key, value))
        given = (gradient.transpose(1, 2), query, keys, values, output.transpose(1, 2))
        for (row, padded), normalizer in zip(_rows(context.lengths), normalizers, strict=True):
            in_float32 = padded <= cpu.FLOAT32_GRADIENT_TOKENS
            dtype = torch.promote_types(query.dtype, torch.float32) if in_float32 else query.dtype
            parts = (_pad(tensor[:, :, row], padded, dtype) for tensor in given)
            mask = _mask(padded, context.window, query.dtype)
            of_rows = _backward(*parts, normalizer, 0.0, mask is None, attn_mask=mask, scale=context.scale)
            for whole, part in zip(gradients, of_rows, strict=True):
                of_heads = part[:, :, : row.stop - row.start].unflatten(1, (whole.shape[1], -1))
                whole[:, :, row] = of_heads.sum(dim=2) if of_heads.shape[2] > 1 else of_heads.squeeze(2)
        return (*gradients, None, None, None, None)


def _rows(lengths: tuple[int, ...]) -> list[tuple[slice, int]]:
    """The slice of each row, and its number of tokens with padding."""
    rows, start = [], 0
    for length in lengths:
        rows.append((slice(start, start + length), cpu.padded_row(length)))
        start += length
    return rows


def _pad(tensor: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """[1, heads, row, size] with zeros up to `tokens`, as the kernel reads it."""
    _, heads, row, size = tensor.shape
    if row == tokens and tensor.dtype == dtype:
        return tensor
    padded = tensor.new_empty((1, tokens, heads, size), dtype=dtype).transpose(1, 2)
    padded[:, :, :row] = tensor
    padded[:, :, row:] = 0
    return padded


def _mask(tokens: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
    """[tokens, tokens] to add to scores of `dtype`, at least float32, or None where nothing is hidden."""
    if window is None or tokens <= window:
        return None
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril_().triu_(1 - window)
    none = torch.zeros(tokens, tokens, dtype=torch.promote_types(dtype, torch.float32))
    return none.masked_fill_(~visible, float("-inf"))
