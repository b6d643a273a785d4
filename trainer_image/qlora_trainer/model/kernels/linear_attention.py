"""Replaces transformers' function of linear attention by one that keeps the rows of a sequence apart.

transformers' own carries a state into the next row, and rejects rows without kernels that the trainer's image lacks.
Models of a family find the function in the module of their code.
"""

import sys
from collections.abc import Callable
from typing import Any

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


_REPLACEMENTS: dict[str, type[_DeltaRule]] = {
    "torch_chunk_gated_delta_rule": _DeltaRule,
}
