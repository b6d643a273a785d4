"""Attention within the rows of a sequence, registered with transformers; changes with its attention interface.

Rows stand one after the other on a single batch row, without padding. Each token sees the tokens before it in its own
row and nothing of the others, so a batch of several rows equals as many batches of one. No attention mask exists: with
a mask transformers would decide by itself what a token sees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "qlora_rows"
"""The name to give as `attn_implementation`."""

# What torch's variable-length kernels are built for: compute capability 8.0 (Ampere) and later, heads up to this size.
_FIRST_CAPABILITY = 8
_LARGEST_HEAD = 256


@dataclass(frozen=True)
class Rows:
    """Where the rows of a sequence begin and end."""

    lengths: tuple[int, ...]
    """Tokens of each row."""
    offsets: Tensor
    """int32 [rows + 1] on the model's device: where each row begins, and the end of the last."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> "Rows":
        """Rows of `lengths` tokens, one after the other."""
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, offsets.to(device, non_blocking=True))

    def position_ids(self) -> Tensor:
        """int64 [1, tokens] in main memory: positions that begin at 0 in each row."""
        return torch.cat([torch.arange(length) for length in self.lengths]).unsqueeze(0)


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION` known to transformers. May be called again."""
    AttentionInterface.register(ATTENTION, rows_attention)


def rows_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    rows: Rows | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row; without `rows`, the tokens are one row.

    `query` is [1, heads, tokens, head size]; `key` and `value` may have fewer heads (grouped-query attention). With a
    sliding window a token sees itself and the `sliding_window - 1` tokens before it. Returns [1, tokens, heads, head
    size]. Raises ValueError for what it does not compute: a mask, a soft cap, a batch of several rows.
    """
    if attention_mask is not None or softcap is not None or query.shape[0] != 1:
        raise ValueError("attention within rows takes a single batch row, no mask and no soft cap")
    if rows is None:
        rows = Rows.of((query.shape[2],), query.device)
    attend: Callable[..., Tensor] = _all_rows_at_once if _has_kernel(query, dropout) else _row_by_row
    return attend(query, key, value, rows, scaling, dropout, sliding_window), None


def _has_kernel(query: Tensor, dropout: float) -> bool:
    return (
        query.is_cuda
        and dropout == 0.0
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= _LARGEST_HEAD
        and torch.cuda.get_device_capability(query.device)[0] >= _FIRST_CAPABILITY
    )


def _all_rows_at_once(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float | None, dropout: float, window: int | None
) -> Tensor:
    longest = max(rows.lengths)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        rows.offsets,
        rows.offsets,
        longest,
        longest,
        scale=scale,
        # The kernel counts the tokens before the current one, transformers the current one too.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    return output.unsqueeze(0)


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float | None, dropout: float, window: int | None
) -> Tensor:
    outputs = []
    # Split, not sliced: the backward pass of each slice would fill a tensor of all rows.
    parts = (tensor.split(rows.lengths, dim=2) for tensor in (query, key, value))
    for row_query, row_key, row_value in zip(*parts, strict=True):
        tokens = row_query.shape[2]
        mask = None if window is None or tokens <= window else _window_mask(tokens, window, query.device)
        outputs.append(
            scaled_dot_product_attention(
                row_query,
                row_key,
                row_value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """bool [tokens, tokens]: True where a token (first axis) sees another (second axis)."""
    positions = torch.arange(tokens, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)
