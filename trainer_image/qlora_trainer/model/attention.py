"""Attention within the rows of a sequence, registered with transformers.

Rows follow one another on a single batch row, without padding. Each token sees the tokens before it in its own
row and nothing of other rows, so a batch of several rows equals as many batches of one. No attention mask exists: with
a mask transformers would decide itself what a token sees.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from qlora_trainer.core import cpu
from qlora_trainer.model.attention_cpu import causal_rows

ATTENTION = "qlora_rows"
"""The name to give as `attn_implementation`."""
# What torch's variable-length kernels are built for: compute capability 8.0 (Ampere) and later, heads up to this size.
_FIRST_CAPABILITY = 8
_LARGEST_HEAD = 256
_CAPPED_QUERIES = 256
"""Queries whose capped scores exist at once: heads x this x tokens of the row, in float32, a few times over."""
# Arguments that transformers passes to every attention and that do not change what a token sees.
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache"})


@dataclass(frozen=True)
class RowBoundaries:
    """Where the rows of a sequence start and end."""

    lengths: tuple[int, ...]
    """Tokens of each row."""
    offsets: Tensor
    """int32 [rows + 1] on the model's device: where each row starts, and the end of the last."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> "RowBoundaries":
        """Rows of `lengths` tokens, one after the other."""
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, offsets.to(device, non_blocking=True))

    def position_ids(self) -> Tensor:
        """int64 [1, tokens] in main memory: positions, from 0 in each row."""
        return torch.cat([torch.arange(length) for length in self.lengths]).unsqueeze(0)


@dataclass(frozen=True)
class _Settings:
    """How scores are computed from queries and keys, besides the rows."""

    scale: float | None
    """Factor of the scores; None is one over the square root of the head size."""
    dropout: float
    window: int | None
    softcap: float | None


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
    rows: RowBoundaries | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row; without `rows`, the tokens are one row.

    `query` is [1, heads, tokens, head size]; `key` and `value` may have fewer heads (grouped-query attention). With a
    sliding window a token sees itself and the `sliding_window - 1` tokens before it. With a soft cap the scores become
    `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118). Returns [1, tokens, heads, head size].

    Raises ValueError for what it does not compute: a mask, several batch rows, keys from a cache, attention to later
    tokens, or anything else that a family passes, such as attention sinks.
    """
    unknown = sorted(name for name in others.keys() - _WITHOUT_EFFECT if others[name] is not None)
    if unknown:
        raise ValueError(f"its attention takes {', '.join(unknown)}, which this trainer does not support")
    if not getattr(module, "is_causal", True):
        raise ValueError("its tokens attend to later ones, which this trainer does not support")
    if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError("attention within rows takes a single batch row, no mask and no cache")
    if rows is None:
        rows = RowBoundaries.of((query.shape[2],), query.device)
    settings = _Settings(scaling, dropout, sliding_window, softcap)
    if _has_kernel(query, settings):
        return _all_rows_at_once(query, key, value, rows, settings), None
    if cpu.fuses_attention(query.device.type, dropout=dropout, softcap=softcap):
        return causal_rows(query, key, value, rows.lengths, settings.scale, sliding_window), None
    return _row_by_row(query, key, value, rows, settings), None


def _has_kernel(query: Tensor, settings: _Settings) -> bool:
    return (
        query.is_cuda
        and settings.dropout == 0.0
        and settings.softcap is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= _LARGEST_HEAD
        and torch.cuda.get_device_capability(query.device)[0] >= _FIRST_CAPABILITY
    )


def _all_rows_at_once(query: Tensor, key: Tensor, value: Tensor, rows: RowBoundaries, settings: _Settings) -> Tensor:
    longest = max(rows.lengths)
    # Without the sums of its rows, which are not asked for.
    output: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        rows.offsets,
        rows.offsets,
        longest,
        longest,
        scale=settings.scale,
        # The kernel counts the tokens before the current one, transformers the current one too.
        window_size=(-1 if settings.window is None else settings.window - 1, 0),
        enable_gqa=True,
    )
    return output.unsqueeze(0)


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, rows: RowBoundaries, settings: _Settings) -> Tensor:
    # Split, not sliced: the backward pass of each slice would write a tensor of all rows.
    parts = (tensor.split(rows.lengths, dim=2) for tensor in (query, key, value))
    attend = _one_row if settings.softcap is None else _one_capped_row
    outputs = [
        attend(row_query, row_key, row_value, settings) for row_query, row_key, row_value in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _one_row(query: Tensor, key: Tensor, value: Tensor, settings: _Settings) -> Tensor:
    tokens, window = query.shape[2], settings.window
    whole = range(tokens)
    mask = None if window is None or tokens <= window else _visible(whole, whole, window, query.device)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=settings.dropout,
        is_causal=mask is None,
        scale=settings.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _one_capped_row(query: Tensor, key: Tensor, value: Tensor, settings: _Settings) -> Tensor:
    """Attention with capped scores, a block of queries at a time; backward recomputes each block's scores."""
    tokens, outputs = query.shape[2], []
    for first in range(0, tokens, _CAPPED_QUERIES):
        block = range(first, min(first + _CAPPED_QUERIES, tokens))
        seen = range(0 if settings.window is None else max(0, first + 1 - settings.window), block.stop)
        outputs.append(
            checkpoint(
                _capped_block,
                query[:, :, block.start : block.stop],
                key[:, :, seen.start : seen.stop],
                value[:, :, seen.start : seen.stop],
                _visible(block, seen, settings.window, query.device),
                settings,
                use_reentrant=False,
                preserve_rng_state=settings.dropout > 0.0,
            )
        )
    return torch.cat(outputs, dim=2)


def _capped_block(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, settings: _Settings) -> Tensor:
    heads, size = query.shape[1], query.shape[3]
    # Heads that share a key get an axis of their own, so that no key is copied.
    grouped = query.unflatten(1, (key.shape[1], heads // key.shape[1]))
    scale = size**-0.5 if settings.scale is None else settings.scale
    scores = _capped((grouped @ key.unsqueeze(2).transpose(3, 4)).float() * scale, settings.softcap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1).to(value.dtype)
    return (torch.dropout(weights, settings.dropout, train=True) @ value.unsqueeze(2)).flatten(1, 2)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _visible(tokens: range, others: range, window: int | None, device: torch.device) -> Tensor:
    """Bool [tokens, others]: True where a token sees another, both given by their positions in the row."""
    rows, columns = (torch.arange(part.start, part.stop, device=device) for part in (tokens, others))
    distance = rows[:, None] - columns[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
