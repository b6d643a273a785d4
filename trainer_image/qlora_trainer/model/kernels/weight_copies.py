"""An adapter's weights in the type of the matmuls, if they are stored in another.

Copies that are kept are made once for each change of the weights: every micro batch would convert the same weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class _Copy:
    parameter: nn.Parameter
    tensor: Tensor
    storage: torch.UntypedStorage
    """The parameter's when it was copied. Held, so that no other is at its address."""
    version: int

    def is_current(self, dtype: torch.dtype) -> bool:
        """Whether it has this type, and the parameter has neither been written nor moved."""
        parameter = self.parameter
        return (
            self.tensor.dtype == dtype
            and self.version == parameter._version
            and self.storage._cdata == parameter.untyped_storage()._cdata
        )


class WeightCopies:
    """The copies that a model's layers keep.

    PyTorch counts the writes to a parameter. Code that writes around it calls `torch.autograd.graph.increment_version`:
    kernels of other libraries, PyTorch's fused optimizers, and writes to `parameter.data`.
    """

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}

    def of(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
        """The values of each in this type, without gradients."""
        if not all(self._has(parameter, dtype) for parameter in parameters):
            # With all that have changed, as after an optimizer step.
            others = (copy.parameter for copy in self._copies.values())
            self._copy({id(parameter): parameter for parameter in (*parameters, *others)}.values(), dtype)
        return [self._copies[id(parameter)].tensor for parameter in parameters]

    def clear(self) -> None:
        """Free all copies."""
        self._copies.clear()

    def _has(self, parameter: nn.Parameter, dtype: torch.dtype) -> bool:
        copy = self._copies.get(id(parameter))
        return copy is not None and copy.is_current(dtype)

    def _copy(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        changed = [parameter for parameter in parameters if not self._has(parameter, dtype)]
        for parameter, tensor in zip(changed, convert(changed, dtype), strict=True):
            copy = _Copy(parameter, tensor, parameter.untyped_storage(), parameter._version)
            self._copies[id(parameter)] = copy


@torch.no_grad()
def stack_weights(weights: Sequence[tuple[nn.Parameter, nn.Parameter]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrices A [ranks, in] and B [out, ranks] of several adapters, one after the other, in this type."""
    a, b = zip(*weights, strict=True)
    ranks = [len(matrix) for matrix in a]
    stacked = torch.empty(sum(ranks), a[0].shape[1], dtype=dtype, device=a[0].device)
    made = [torch.empty_like(matrix, dtype=dtype) for matrix in b]
    # Into matrices without gaps: others would be copied one by one.
    torch._foreach_copy_([*stacked.split(ranks), *made], [*a, *b])
    return stacked, torch.cat(made, dim=1)


@torch.no_grad()
def convert(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
    """The values of each in this type, without gradients, in one operation. Those of this type are not copied."""
    made = [
        parameter.detach() if parameter.dtype == dtype else torch.empty_like(parameter, dtype=dtype)
        for parameter in parameters
    ]
    copied = [pair for pair in zip(made, parameters, strict=True) if pair[1].dtype != dtype]
    if copied:
        torch._foreach_copy_([copy for copy, _ in copied], [parameter for _, parameter in copied])
    return made
