"""Inputs of attention and the tokens that each may see."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HEADS, KEY_HEADS, SIZE = 4, 2, 16
LENGTHS = (300, 5, 700)
"""The longest row is three blocks of queries, the last of them not full."""
MODULE: Any = SimpleNamespace(head_dim=SIZE, num_key_value_groups=HEADS // KEY_HEADS, training=True, is_causal=True)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, large enough for a cap to change them."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((1, heads, sum(LENGTHS), SIZE), generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def visible(window: int | None) -> Tensor:
    """The mask of all rows: a token sees the earlier ones of its row and window."""
    positions = torch.arange(sum(LENGTHS))
    row = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    distance = positions[:, None] - positions[None, :]
    seen = (row[:, None] == row[None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)
