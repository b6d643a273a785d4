"""Normalization in 16 bit with statistics in 32 bit, in one differentiable operation.

Autocast on a GPU computes PyTorch's normalizations in float32 and returns float32: every layer behind one would be
given float32 too. And transformers computes a root mean square in six operations, whose results are kept for backward.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm, rms_norm

from qlora_trainer.core import cpu
from qlora_trainer.model.protocols import AutogradContext

_ROWS = 16
# In float32, two correct ways to compute the same differ by a few roundings of 2^-24.
_TOLERANCE = 2.0**-20


_as_in_training = ContextVar("as_in_training", default=False)


@contextmanager
def normalizing(*, as_in_training: bool) -> Iterator[None]:
    """Let passes without gradients normalize as those with them do, if asked."""
    before = _as_in_training.set(as_in_training)
    try:
        yield
    finally:
        _as_in_training.reset(before)


def fuse_norms(model: nn.Module) -> None:
    """Make every normalization that is recognized one operation, whose result has the type of the weights.

    `nn.LayerNorm` is recognized by its forward pass, a root mean square (Zhang and Sennrich 2019, arXiv 1910.07467) by
    its results for random numbers: x / rms(x), times its weight or times one plus its weight (Gemma). Parameters and
    their names do not change.
    """
    module: Any
    for module in model.modules():
        if type(module).forward is nn.LayerNorm.forward:
            fused: type[nn.Module] = _LayerNorm
        elif (found := _as_root_mean_square(module)) is not None:
            fused, (module.added_to_weight, module.epsilon) = _RootMeanSquare, found
        else:
            continue
        module.__class__ = type(f"Fused{type(module).__name__}", (fused, type(module)), {})


class _LayerNorm(nn.LayerNorm):
    """Computed in the type of its weights, with the kernel's statistics in 32 bit."""

    def forward(self, x: Tensor) -> Tensor:
        """The normalized `x`, in the type of the weights."""
        with torch.autocast(x.device.type, enabled=False):
            x = x if self.weight is None else x.to(self.weight.dtype)
            return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class _RootMeanSquare(nn.Module):
    """x / rms(x) · (c + weight), with c 0 or 1.

    Without gradients it is the family's, bit-equal, unless `normalizing` asks for that of training.
    """

    weight: Tensor
    added_to_weight: int
    epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """The normalized `x`, in its type."""
        if not (torch.is_grad_enabled() or _as_in_training.get()) or x.dtype != self.weight.dtype:
            return cast("Tensor", super().forward(x)).to(x.dtype)
        if cpu.fuses_norms(x.device.type):
            return cast("Tensor", _Normalize.apply(x, self.weight.float() + self.added_to_weight, self.epsilon))
        with torch.autocast(x.device.type, enabled=False):
            if not self.added_to_weight:
                return rms_norm(x, self.weight.shape, self.weight, self.epsilon)
            # One plus a small weight is not rounded to 16 bit, which would lose most of the weight's digits.
            normalized = rms_norm(x, self.weight.shape, None, self.epsilon)
            return torch.addcmul(normalized, normalized, self.weight)


class _Normalize(torch.autograd.Function):
    """x / rms(x) · factor, for a frozen float32 `factor`. Keeps x and 1 number a row."""

    @staticmethod
    def forward(context: AutogradContext, x: Tensor, factor: Tensor, epsilon: float) -> Tensor:
        values = x.to(torch.float32, copy=True)
        squares = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        context.save_for_backward(x, factor, inverse)
        return values.mul_(inverse).mul_(factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(context: AutogradContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, inverse = context.saved_tensors
        normalized = x.to(torch.float32, copy=True).mul_(inverse)
        result = gradient.to(torch.float32, copy=True).mul_(factor)
        along = torch.linalg.vecdot(normalized, result).unsqueeze(-1).div_(x.shape[-1])
        return result.addcmul_(normalized, along, value=-1).mul_(inverse).to(x.dtype), None, None


def _as_root_mean_square(module: nn.Module) -> tuple[int, float] | None:
    """The constant added to the weight, and epsilon, of a root mean square."""
    # A second argument, such as the gate of a Mamba block, would be lost.
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if list(shapes) != ["weight"] or len(shapes["weight"]) != 1 or next(module.buffers(), None) is not None:
        return None
    # With random weights: the module's may have no data.
    trial: Any = copy.deepcopy(module).to_empty(device="cpu").float().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    trial.weight.normal_(generator=generator)
    # With small rows, where epsilon counts.
    sizes = torch.logspace(-5, 1, _ROWS, device="cpu").unsqueeze(1)
    x = sizes * torch.randn((_ROWS, *shapes["weight"]), generator=generator, device="cpu")
    try:
        found = trial(x)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (x.shape, x.dtype):
        return None
    for epsilon in (value for value in vars(module).values() if isinstance(value, float)):
        for added in (0, 1):
            expected = rms_norm(x, trial.weight.shape, trial.weight + added, epsilon)
            if torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                return added, epsilon
    return None
