"""LoRA over a 4-bit layer as one differentiable operation, without the copies that PEFT makes of every matmul's result.

The adapter's matmul adds in place to the base's output, and likewise to the gradient in backward, which dequantizes the
weight again instead of keeping it. Only rounding to 16 bit differs: it happens less often.

A sequence may have segments with different adapters: the base's matmul is one for all tokens, and each
adapter's matmuls are of its tokens only (as in Punica, Chen et al. 2023, arXiv 2310.18547).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_trainer.core import cpu
from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.kernels.weight_copies import WeightCopies, convert
from qlora_trainer.model.protocols import AutogradContext, Network

_NOT_APART = "one of its layers does not take the tokens of several adapters together"


@dataclass(frozen=True)
class Segment:
    """Tokens of a sequence, `start` to before `stop`, and their adapter."""

    adapter: str
    start: int
    stop: int


@dataclass
class Routing:
    """The adapter of each token in the next passes, shared by a model's layers."""

    segments: tuple[Segment, ...] = ()
    """In the order of the tokens; those in none, as padding, have no adapter. Empty: all have the active adapter."""
    tokens: int = 0
    """Of the whole sequence."""


class FusedLora(Linear4bit):
    """PEFT's layer with another forward pass for training plain LoRA."""

    recomputed = False
    """Whether backward follows a recomputed forward pass (gradient checkpointing)."""
    is_loaded = True
    """Whether its base had data when it was fused: one that will be sharded has none."""
    routing = Routing()
    copies = WeightCopies()

    def forward(self, x: Tensor, *arguments: object, **keywords: object) -> Tensor:
        """The output x Wᵀ + bias + s (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv 2106.09685), in the base's compute type.

        Raises ModelError if segments have different adapters and the layer cannot match tokens with segments.
        """
        if arguments or keywords or not self._is_plain(x):
            if self.routing.segments:
                raise ModelError(_NOT_APART)
            return cast("Tensor", super().forward(x, *arguments, **keywords))
        base, segments = self.get_base_layer(), self._segments(x)
        # Wider only behind what autocast computes in float32: it would multiply in 16 bit too.
        x = x.to(base.compute_dtype)
        weights = [weight for segment in segments for weight in self._weights(segment.adapter)]
        # Kept activations would keep the copies anyway. Of recomputed blocks they would take memory that is short.
        copies = convert(weights, x.dtype) if self.recomputed else self.copies.of(weights, x.dtype)
        parts = tuple(
            _Part.of(segment, weight.dtype, self.scaling[segment.adapter])
            for segment, weight in zip(segments, weights[::2], strict=True)
        )
        kept = cpu.keeps_dequantized(x.device.type, recomputed=self.recomputed and self.is_loaded)
        output, dense, *inners = _LoraMatmul.apply(x, base.weight, base.quant_state, parts, kept, copies, *weights)
        if dense is None:
            dense = _dequantize(base.weight, base.quant_state, x.dtype)
        with torch.no_grad():
            rows = output.detach().view(-1, output.shape[-1])
            _matmul_into(rows, x.reshape(-1, x.shape[-1]), dense.T, base.bias)
            for part, inner, b in zip(parts, inners, copies[1::2], strict=True):
                rows[part.tokens].addmm_(inner, b.T, alpha=part.later_scale)
        return cast("Tensor", output)

    def _weights(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def _segments(self, x: Tensor) -> tuple[Segment, ...]:
        """The tokens with an adapter in this layer. Jobs may adapt different layers."""
        tokens = x.numel() // x.shape[-1]
        segments = self.routing.segments or (Segment(self.active_adapters[0], 0, tokens),)
        return tuple(segment for segment in segments if segment.adapter in self.lora_A)

    def _is_plain(self, x: Tensor) -> bool:
        device, routing = x.device.type, self.routing
        if routing.segments:
            names = tuple(segment.adapter for segment in routing.segments)
            known = x.numel() // x.shape[-1] == routing.tokens
        else:
            names, known = tuple(self.active_adapters), len(self.active_adapters) == 1
        return (
            known
            and torch.is_grad_enabled()
            and not self.disable_adapters
            and not self.merged
            and x.is_floating_point()
            and (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
            == self.get_base_layer().compute_dtype
            and all(map(self._has_plain, names))
        )

    def _has_plain(self, name: str) -> bool:
        return name not in self.lora_A or (
            name not in self.lora_variant
            and not self.lora_bias[name]
            and isinstance(self.lora_dropout[name], nn.Identity)
        )


def fuse_further_lora(model: Network) -> None:
    """Fuse the layers where a further adapter is the first. Shares routing and copies."""
    first = next((module for module in model.modules() if isinstance(module, FusedLora)), None)
    if first is not None:
        fuse_lora(model, first.routing, first.copies, recomputed=first.recomputed)


def fuse_lora(
    model: Network, routing: Routing | None = None, copies: WeightCopies | None = None, *, recomputed: bool
) -> None:
    """Make LoRA layers over 4-bit layers FusedLora, with this value of `recomputed`."""
    routing = Routing() if routing is None else routing
    copies = WeightCopies() if copies is None else copies
    for module in model.modules():
        if type(module) is Linear4bit:
            layer: Any = module
            layer.__class__ = FusedLora
            layer.recomputed, layer.is_loaded = recomputed, layer.get_base_layer().weight.device.type != "meta"
            layer.routing, layer.copies = routing, copies


def mark_recomputed(block: nn.Module) -> None:
    """Mark the fused layers of a block that is recomputed in backward passes. Frees kept copies."""
    for module in block.modules():
        if isinstance(module, FusedLora):
            module.recomputed = True
            module.copies.clear()


def routing_of(model: Network) -> Routing:
    """The routing that the model's fused layers share."""
    return next(module.routing for module in model.modules() if isinstance(module, FusedLora))


def require_apart(model: Network) -> None:
    """Raise ModelError unless all adapted layers are fused, and match tokens."""
    if not all(isinstance(module, FusedLora) for module in model.modules() if isinstance(module, LoraLayer)):
        raise ModelError(_NOT_APART)


def _matmul_into(output: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    parts = cpu.matmul_parts(len(rows), matrix.shape[1], rows.device.type)
    for part, part_of_output in zip(rows.chunk(parts), output.chunk(parts), strict=True):
        if bias is None:
            torch.mm(part, matrix, out=part_of_output)
        else:
            torch.addmm(bias.to(rows.dtype), part, matrix, out=part_of_output)


@dataclass(frozen=True)
class _Part:
    """Tokens with an adapter, whose scale is `scale` times `later_scale`: one of them is 1."""

    tokens: slice
    dtype: torch.dtype
    """Of the adapter's weights, and of their gradients."""
    scale: float
    """A power of two, so a matmul can apply it before it rounds, without another operation."""
    later_scale: float
    """Applied to a rounded result."""

    @classmethod
    def of(cls, segment: Segment, dtype: torch.dtype, scale: float) -> "_Part":
        is_exact = math.frexp(scale)[0] == 0.5
        return cls(slice(segment.start, segment.stop), dtype, *((scale, 1.0) if is_exact else (1.0, scale)))


class _Context(AutogradContext, Protocol):
    weight: Tensor
    state: QuantState
    parts: Sequence[_Part]
    shape: torch.Size


class _LoraMatmul(torch.autograd.Function):
    """`x` is [..., in], `weight` the frozen packed one of [out, in]. Each part has `a` [rank, in], `b` [out, rank].

    It computes with `copies` of the adapters' weights in the type of `x`, and gives the weights their gradients.
    Returns an uninitialized output, which the caller computes; the dequantized weight if it is `kept` for backward; and
    the scaled x Aᵀ of each part, [its tokens, rank], which has no gradient. Recomputing a block stops when the last
    tensor that backward needs exists, and so leaves out the block's last matmul: 7 % of a step's operations with
    Llama's widths.
    """

    @staticmethod
    def forward(
        context: _Context,
        x: Tensor,
        weight: Tensor,
        state: QuantState,
        parts: Sequence[_Part],
        kept: bool,
        copies: Sequence[Tensor],
        *_adapters: Tensor,
    ) -> tuple[Tensor | None, ...]:
        rows = x.reshape(-1, x.shape[-1])
        inners = [_scaled(rows[part.tokens], a.T, part.scale) for part, a in zip(parts, copies[::2], strict=True)]
        dense = _dequantize(weight, state, x.dtype) if kept else None
        context.save_for_backward(rows, dense, *inners, *copies)
        context.mark_non_differentiable(*inners, *(() if dense is None else (dense,)))
        context.set_materialize_grads(False)
        context.weight, context.state, context.parts, context.shape = weight, state, parts, x.shape
        # Not returned as a view: OLMo clamps its queries in place, which autograd forbids for a view made here.
        return x.new_empty(*x.shape[:-1], state.shape[0]), dense, *inners

    @staticmethod
    @once_differentiable
    def backward(context: _Context, gradient: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, dense, *rest = context.saved_tensors
        parts, inners, copies = context.parts, rest[: len(context.parts)], rest[len(context.parts) :]
        gradient = gradient.reshape(-1, gradient.shape[-1])
        x_gradient = None
        if context.needs_input_grad[0]:
            if dense is None:
                dense = _dequantize(context.weight, context.state, gradient.dtype)
            x_gradient = gradient.new_empty(rows.shape)
            _matmul_into(x_gradient, gradient, dense, None)
        gradients = []
        for part, inner, a, b in zip(parts, inners, copies[::2], copies[1::2], strict=True):
            of_part = gradient[part.tokens]
            inner_gradient = _scaled(of_part, b, part.scale)
            b_gradient = _weight_gradient(of_part, inner, part.dtype)
            if part.later_scale != 1:
                inner_gradient.mul_(part.later_scale)
                b_gradient.mul_(part.later_scale)
            if x_gradient is not None:
                x_gradient[part.tokens].addmm_(inner_gradient, a)
            gradients += [_weight_gradient(inner_gradient, rows[part.tokens], part.dtype), b_gradient]
        if x_gradient is not None:
            x_gradient = x_gradient.view(context.shape)
        return x_gradient, None, None, None, None, None, *gradients


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`scale` times the product, in one operation."""
    return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


def _weight_gradient(outer: Tensor, inner: Tensor, dtype: torch.dtype) -> Tensor:
    """The product outerᵀ inner, [columns of outer, of inner], for a weight of this type."""
    if dtype == torch.float32 and outer.dtype != dtype and cpu.multiplies_into_float32(outer.device.type):
        return torch.mm(outer.T, inner, out_dtype=dtype)
    return outer.T @ inner


def _dequantize(weight: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    return cast("Tensor", dequantize_4bit(weight.data.view(-1, 1), state)).to(dtype)
