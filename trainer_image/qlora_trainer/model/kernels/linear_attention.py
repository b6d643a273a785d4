"""Replaces transformers' functions of linear attention by those that keep the rows of a sequence apart.

transformers' own carry a state and the last tokens of a convolution into the next row, and reject rows without kernels
that the trainer's image lacks. Models of a family find these functions in the module of their code.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.kernels.attention import RowBoundaries
from qlora_trainer.model.kernels.delta_rule import gated_delta_rule


def use_rows(model: nn.Module) -> None:
    """Make the code of this model's family use `rows`, where its blocks are given them. May be called again.

    Without `rows`, as in generation, it computes as before.
    """
    for code in {sys.modules[type(module).__module__] for module in model.modules()}:
        for name, replacement in _REPLACEMENTS.items():
            theirs = vars(code).get(name)
            if theirs is not None and not isinstance(theirs, replacement):
                setattr(code, name, replacement(theirs))


class _DeltaRule:
    """The gated delta rule, with the arguments of transformers' function."""

    def __init__(self, theirs: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._theirs = theirs

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        rows: RowBoundaries | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if rows is None:
            return self._theirs(query, key, value, g=g, beta=beta, **settings)
        has_state = settings.get("initial_state") is not None or settings.get("output_final_state")
        if query.shape[0] != 1 or has_state or not settings.get("use_qk_l2norm_in_kernel"):
            raise ModelError("linear attention within rows takes a single batch row, normalized keys and no cache")
        return gated_delta_rule(query, key, value, g, beta, rows.numbers), None


class _Convolution:
    """The causal convolution, with the arguments of transformers' function."""

    def __init__(self, theirs: Callable[..., Tensor]) -> None:
        self._theirs = theirs

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, *given: Any, rows: RowBoundaries | None = None, **settings: Any
    ) -> Tensor:
        if rows is None or len(rows.lengths) == 1:
            return self._theirs(hidden_states, weight, *given, **settings)
        # As many zeros behind each row as a token sees before it. For a power of two of rows: a GPU's library prepares
        # a convolution for each number of tokens.
        zeros, tokens = weight.shape[-1] - 1, hidden_states.shape[2]
        places = torch.arange(tokens, device=hidden_states.device).add_(rows.numbers, alpha=zeros)
        by_token = hidden_states.transpose(1, 2)
        apart = by_token.new_zeros(1, tokens + zeros * (len(rows.offsets) - 1), by_token.shape[2])
        apart.index_copy_(1, places, by_token)
        output = self._theirs(apart.transpose(1, 2), weight, *given, **settings)
        return output.transpose(1, 2).index_select(1, places).transpose(1, 2)


_REPLACEMENTS: dict[str, type[_DeltaRule] | type[_Convolution]] = {
    "torch_chunk_gated_delta_rule": _DeltaRule,
    "causal_conv1d_fn": _Convolution,
}
