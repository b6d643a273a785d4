"""Attention within the rows of a sequence, registered with transformers.

Rows follow one another on a single batch row, without padding. Each token sees the tokens before it in the same
row and nothing of other rows, so a batch of several rows equals as many batches of one. No attention mask exists: with
a mask transformers would decide itself what a token sees.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from qlora_trainer.core import cpu
from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.kernels.attention_capped import capped_rows
from qlora_trainer.model.kernels.attention_cpu import causal_rows
from qlora_trainer.model.kernels.attention_sinks import rows_with_sinks

ATTENTION = "qlora_rows"
"""The name to give as `attn_implementation`."""
# The limit of torch's variable-length kernels on the GPUs that `training.device` accepts: heads up to this size,
# in steps of eight.
_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8
_SHORTEST_BOUND = 256
_LARGEST_PADDING = 2
# Of PyTorch's memory-efficient attention: a token sees those before it.
_CAUSAL = 1
# transformers passes these to every attention. Dropout of weights is a setting of the base's own training.
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "dropout"})


@dataclass(frozen=True)
class RowBoundaries:
    """Where the rows of a sequence start and end.

    On Hopper and Blackwell cuDNN builds a graph, in tens of milliseconds, for each number of rows and longest row. So
    it is given powers of two: rows without tokens follow the real ones, and the longest row is a bound.
    FlashAttention builds nothing, and takes memory for each row: it is given the real ones.

    cuDNN's backward pass takes memory for rows that are all as long as the bound: 2.2 GB for 8,192 tokens of Llama 3 8B
    in 30 rows, one of them with 4,000. FlashAttention computes those.
    """

    lengths: tuple[int, ...]
    """Tokens of each row."""
    offsets: Tensor
    """int32 [power of two + 1] on the device: starts of rows, repeating the end."""

    @classmethod
    def from_lengths(cls, lengths: tuple[int, ...], device: torch.device) -> "RowBoundaries":
        """Rows of `lengths` tokens, one after the other."""
        offsets = [0, *accumulate(lengths)]
        offsets += [offsets[-1]] * (_power_of_two(len(lengths)) - len(lengths))
        return cls(lengths, torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True))

    @property
    def real_offsets(self) -> Tensor:
        """int32 [rows + 1]: the part of `offsets` without rows that have no tokens."""
        return self.offsets[: len(self.lengths) + 1]

    @property
    def longest(self) -> int:
        """A bound of the tokens of each row."""
        return max(_SHORTEST_BOUND, _power_of_two(max(self.lengths)))

    @property
    def suit_cudnn(self) -> bool:
        """Whether cuDNN takes at most twice the memory of their tokens."""
        return (len(self.offsets) - 1) * self.longest <= _LARGEST_PADDING * sum(self.lengths)

    @cached_property
    def numbers(self) -> Tensor:
        """int64 [tokens] on the device: the row of each token, from 0. Computed once for all blocks."""
        tokens = torch.arange(sum(self.lengths), dtype=self.offsets.dtype, device=self.offsets.device)
        return torch.searchsorted(self.offsets[1:], tokens, right=True)

    def position_ids(self) -> Tensor:
        """int64 [1, tokens] in main memory: positions, from 0 in each row."""
        return torch.cat([torch.arange(length) for length in self.lengths]).unsqueeze(0)


def _power_of_two(number: int) -> int:
    """The smallest that is not smaller than `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    rows: RowBoundaries | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention within each row. Without `rows`, the tokens are one row.

    `query` is [1, heads, tokens, head size]; `key` and `value` may have fewer heads (grouped-query attention). With a
    sliding window a token sees itself and the `sliding_window - 1` tokens before it. With a soft cap the scores become
    `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118). `s_aux` are the heads' sinks, [heads], which stay
    frozen. Returns [1, tokens, heads, head size].

    Raises ModelError for what it does not compute: a mask, several batch rows, keys from a cache, attention to later
    tokens, sinks with a soft cap, or anything else that a family passes.
    """
    unknown = sorted(name for name in others.keys() - _WITHOUT_EFFECT if others[name] is not None)
    if unknown:
        raise ModelError(f"its attention takes {', '.join(unknown)}, which this trainer does not support")
    if not getattr(module, "is_causal", True):
        raise ModelError("its tokens attend to later ones, which this trainer does not support")
    if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ModelError("attention within rows takes a single batch row, no mask and no cache")
    if rows is None:
        rows = RowBoundaries.from_lengths((query.shape[2],), query.device)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if softcap is not None and s_aux is not None:
        raise ModelError("its attention takes softcap and s_aux, which this trainer does not support together")
    if softcap is not None:
        return capped_rows(query, key, value, rows.lengths, scale, sliding_window, softcap), None
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # As for PyTorch's own attention. Norms of some families return 32 bit on a GPU.
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    has_kernel = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] == value.shape[-1] <= _LARGEST_HEAD
    if query.is_cuda and has_kernel:
        return _all_rows_at_once(query, key, value, s_aux, rows, scale, sliding_window), None
    if query.is_cuda and s_aux is None and sliding_window is None:
        return _rows_of_large_heads(query, key, value, rows, scale), None
    if cpu.fuses_attention(query.device.type):
        return causal_rows(query, key, value, s_aux, rows.lengths, scale, sliding_window), None
    return _row_by_row(query, key, value, s_aux, rows, scale, sliding_window), None


def _all_rows_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    rows: RowBoundaries,
    scale: float,
    window: int | None,
) -> Tensor:
    size = query.shape[3]
    query, key, value = (_for_kernel(tensor.squeeze(0).transpose(0, 1)) for tensor in (query, key, value))
    # The kernel counts the tokens before the current one, transformers the current one too.
    window_size = (-1 if window is None else window - 1, 0)
    if sinks is not None:
        output = rows_with_sinks(query, key, value, sinks, rows.real_offsets, rows.longest, scale, window_size)
        return output[..., :size].unsqueeze(0)
    # As varlen_attn will choose. cuDNN takes causal rows only if both arguments are the same tensor.
    chosen = varlen._select_backend(query, key, value, rows.offsets, rows.offsets, rows.longest, list(window_size))
    uses_cudnn = chosen == varlen._CUDNN_ATTENTION_BACKEND and rows.suit_cudnn
    of_queries, of_keys = (rows.offsets,) * 2 if uses_cudnn else (rows.real_offsets, rows.real_offsets)
    without_sums = varlen_attn(
        query,
        key,
        value,
        of_queries,
        of_keys,
        rows.longest,
        rows.longest,
        scale=scale,
        window_size=window_size,
        enable_gqa=True,
    )
    return cast("Tensor", without_sums)[..., :size].unsqueeze(0)


def _rows_of_large_heads(query: Tensor, key: Tensor, value: Tensor, rows: RowBoundaries, scale: float) -> Tensor:
    """Compute heads of any size, which only the memory-efficient kernel takes, and no groups of them."""
    groups, size = query.shape[1] // key.shape[1], value.shape[3]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    runs = list(_runs(rows.lengths))
    heads = (_for_kernel(tensor.squeeze(0).transpose(0, 1)).unsqueeze(0) for tensor in (query, key, value))
    parts = zip(*(tensor.split([sum(lengths) for lengths in runs], dim=1) for tensor in heads), strict=True)
    first, outputs = 0, list[Tensor]()
    for lengths, part in zip(runs, parts, strict=True):
        offsets = rows.offsets[first : first + len(lengths) + 1]
        offsets = offsets - offsets[:1] if first else offsets
        first, longest = first + len(lengths), max(lengths)
        output, *_ = torch.ops.aten._efficient_attention_forward(
            *part, None, offsets, offsets, longest, longest, 0.0, _CAUSAL, True, scale=scale
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1)[..., :size]


def _runs(lengths: Sequence[int]) -> Iterator[Sequence[int]]:
    """Split rows into runs: the kernel's backward pass takes the memory of the longest row for each, in 32 bit.

    In a run that is at most twice that of its tokens.
    """
    first = 0
    for end in range(1, len(lengths) + 1):
        run = lengths[first : end + 1]
        if end == len(lengths) or len(run) * max(run) > 2 * sum(run):
            yield lengths[first:end]
            first = end


def _for_kernel(heads: Tensor) -> Tensor:
    """[tokens, heads, head size] with zeros behind each head up to a size that a kernel takes, or as it is.

    Kernels read 16 bytes at a time, and so must each head begin: in a separate storage it does. A part of another
    tensor is copied: the backward pass would keep the whole for it.
    """
    missing = -heads.shape[2] % _HEAD_MULTIPLE
    if missing:
        return pad(heads, (0, missing))
    if heads.stride(2) == 1 and heads.untyped_storage().nbytes() == heads.nbytes:
        return heads
    return heads.clone(memory_format=torch.contiguous_format)


def _row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    rows: RowBoundaries,
    scale: float,
    window: int | None,
) -> Tensor:
    # Split, not sliced: the backward pass of each slice would write a tensor of all rows.
    parts = (tensor.split(rows.lengths, dim=2) for tensor in (query, key, value))
    outputs = [
        _one_row(one, its_key, its_value, sinks, scale, window) for one, its_key, its_value in zip(*parts, strict=True)
    ]
    # Some families view the result in another shape, as transformers' own attention lets them.
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _one_row(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int | None
) -> Tensor:
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    if query.is_cuda and groups > 1:
        # The one kernel for heads of this size takes no groups; without it, all scores would be built.
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    mask: Tensor | None = None
    if sinks is not None:
        # One more key of zeros, whose score is the sink and whose value is zero.
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu_(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril_(-window)
        mask = query.new_zeros(1, query.shape[1], tokens, tokens + 1)
        mask[..., :-1].masked_fill_(hidden, float("-inf"))
        mask[..., -1] = sinks.to(query.dtype)[:, None]
        key, value = (pad(tensor, (0, 0, 0, 1)) for tensor in (key, value))
    elif window is not None and tokens > window:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril_().triu_(1 - window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
