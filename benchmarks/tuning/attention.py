"""Attention of short rows on a CPU by plain matmuls: the same function as the product's, three times faster there.

The product's kernel works in blocks of 64 tokens, and the rows of these benchmarks have 15 to 30.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qlora_trainer.model.kernels import attention


@lru_cache(maxsize=4096)
def _places(lengths: tuple[int, ...]) -> Tensor:
    """int64 [tokens]: the place of each token once all rows have the length of the longest."""
    longest = max(lengths)
    return torch.cat([torch.arange(length) + row * longest for row, length in enumerate(lengths)])


def short_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    lengths: tuple[int, ...],
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Compute what `attention_cpu.causal_rows` computes, in 32 bit."""
    if window is not None or sinks is not None:
        raise ValueError("a window or sinks: the benchmarks' model has none")
    rows, longest, places = len(lengths), max(lengths), _places(lengths)
    shared = query.shape[1] // key.shape[1]

    def padded(states: Tensor) -> Tensor:
        whole = states.new_zeros((rows * longest, states.shape[1], states.shape[3]), dtype=torch.float32)
        return whole.index_copy(0, places, states[0].transpose(0, 1).float()).view(rows, longest, *whole.shape[1:])

    with torch.autocast("cpu", enabled=False):
        queries = padded(query).unflatten(2, (key.shape[1], shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        keys, values = (padded(states).transpose(1, 2) for states in (key, value))
        factor = query.shape[3] ** -0.5 if scale is None else scale
        scores = (queries * factor @ keys.transpose(2, 3)).unflatten(2, (shared, longest))
        hidden = torch.ones(longest, longest, dtype=torch.bool).triu_(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).flatten(2, 3)
        output = (weights @ values).unflatten(2, (shared, longest)).permute(0, 3, 1, 2, 4)
        flat = output.reshape(rows * longest, query.shape[1], value.shape[3]).index_select(0, places)
    return flat.to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype).unsqueeze(0)


def use_short_rows() -> None:
    """Use it in all models of this process."""
    attention.causal_rows = short_rows  # type: ignore[attr-defined]
