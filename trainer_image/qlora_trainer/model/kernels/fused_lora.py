"""LoRA over a 4-bit layer as one differentiable operation, without the copies that PEFT makes of every matmul's result.

The adapter's matmul adds in place to the base's output, and likewise to the gradient in backward, which dequantizes the
weight again instead of keeping it. Only rounding to 16 bit differs: it happens less often.

A sequence may have segments with different adapters: the base's matmul is one for all tokens. On a CPU each adapter's
matmuls are of its tokens only (as in Punica, Chen et al. 2023, arXiv 2310.18547). On a GPU, which idles while the host
launches many small ones, the tokens of several are multiplied by their stacked matrices, and a mask drops the products
with other adapters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_trainer.core import cpu
from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.kernels.weight_copies import WeightCopies, convert, stack_weights
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
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    """Of segments whose adapters are stacked, by segments, ranks and scales."""

    def clear(self) -> None:
        """Give all tokens the active adapter."""
        self.segments = ()
        self.masks.clear()

    def mask(
        self, segments: Sequence[Segment], ranks: Sequence[int], scales: Sequence[float], device: torch.device
    ) -> Tensor:
        """The scale of each stacked rank for each token, float32 [tokens from first to last, ranks]; 0 for others'."""
        key = (tuple(segments), tuple(ranks), tuple(scales))
        if key not in self.masks:
            first = segments[0].start
            made = torch.zeros(segments[-1].stop - first, sum(ranks), device=device)
            for segment, scale, columns in zip(segments, scales, made.split(list(ranks), dim=1), strict=True):
                columns[segment.start - first : segment.stop - first] = scale
            self.masks[key] = made
        return self.masks[key]


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
        stacks = self._stacks(segments, x.device.type)
        parts = [self._part(stack, x.device) for stack in stacks]
        copies = [copy for stack in stacks for copy in self._copies(stack, x.dtype)]
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

    def _stacks(self, segments: Sequence[Segment], device_type: str) -> list[list[Segment]]:
        """Group the segments, in order, by the stack of their adapters."""
        stacks, ranks = list[list[Segment]](), 0
        for segment in segments:
            ranks += self.r[segment.adapter]
            if not stacks or ranks > cpu.stacked_ranks(device_type):
                stacks.append([])
                ranks = self.r[segment.adapter]
            stacks[-1].append(segment)
        return stacks

    def _part(self, stack: Sequence[Segment], device: torch.device) -> "_Part":
        tokens, names = slice(stack[0].start, stack[-1].stop), [segment.adapter for segment in stack]
        ranks, scales = [self.r[name] for name in names], [self.scaling[name] for name in names]
        members = [
            _Member(
                slice(segment.start - tokens.start, segment.stop - tokens.start),
                slice(end - rank, end),
                self._weights(segment.adapter)[0].dtype,
            )
            for segment, rank, end in zip(stack, ranks, accumulate(ranks), strict=True)
        ]
        if len(stack) > 1:
            return _Part(tokens, members, mask=self.routing.mask(stack, ranks, scales, device))
        is_exact = math.frexp(scales[0])[0] == 0.5
        return _Part(tokens, members, *((scales[0], 1.0) if is_exact else (1.0, scales[0])))

    def _copies(self, stack: Sequence[Segment], dtype: torch.dtype) -> Sequence[Tensor]:
        """The matrices A and B of a stack in this type."""
        weights = [self._weights(segment.adapter) for segment in stack]
        if len(stack) > 1:
            return stack_weights(weights, dtype)
        # Kept activations would keep the copies anyway. Of recomputed blocks they would take memory that is short.
        return convert(weights[0], dtype) if self.recomputed else self.copies.of(weights[0], dtype)

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
    """Tokens with an adapter, or with one of several whose matrices are stacked.

    The scale of an adapter is the product of `scale`, `later_scale` and `mask`. All but one of them are 1.
    """

    tokens: slice
    members: Sequence["_Member"]
    scale: float = 1.0
    """A power of two, so a matmul can apply it before it rounds, without another operation."""
    later_scale: float = 1.0
    """Applied to a rounded result."""
    mask: Tensor | None = None
    """Of stacked adapters, [tokens, ranks]."""

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """The product, [tokens, ranks], with `scale` and `mask`."""
        made = left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=self.scale)
        return made if self.mask is None else made.mul_(self.mask)


@dataclass(frozen=True)
class _Member:
    """An adapter of a part."""

    tokens: slice
    """Of the part's."""
    ranks: slice
    """Of the part's."""
    dtype: torch.dtype
    """Of the weights, and of their gradients."""

    def weight_gradients(
        self, x: Tensor, inner: Tensor, inner_gradient: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of A [rank, in] and B [out, rank], given the part's tensors.

        They are sums over tokens: those of other adapters would pass on a NaN even if multiplied by 0.
        """
        own = self.tokens, self.ranks
        return self._product(inner_gradient[own], x[self.tokens]), self._product(gradient[self.tokens], inner[own])

    def _product(self, outer: Tensor, inner: Tensor) -> Tensor:
        """The product outerᵀ inner."""
        if self.dtype == torch.float32 != outer.dtype and cpu.multiplies_into_float32(outer.device.type):
            return torch.mm(outer.T, inner, out_dtype=self.dtype)
        return outer.T @ inner


class _Context(AutogradContext, Protocol):
    weight: Tensor
    state: QuantState
    parts: Sequence[_Part]
    shape: torch.Size


class _LoraMatmul(torch.autograd.Function):
    """`x` is [..., in], `weight` the frozen packed one of [out, in]. Each part has `a` [ranks, in], `b` [out, ranks].

    It computes with `copies` of the adapters' weights in the type of `x`, and gives the weights their gradients.
    Returns an uninitialized output, which the caller computes; the dequantized weight if it is `kept` for backward; and
    the scaled x Aᵀ of each part, [its tokens, ranks], which has no gradient. Recomputing a block stops when the last
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
        inners = [part.inner(rows[part.tokens], a.T) for part, a in zip(parts, copies[::2], strict=True)]
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
        gradients = list[Tensor]()
        for part, inner, a, b in zip(parts, inners, copies[::2], copies[1::2], strict=True):
            x, of_part = rows[part.tokens], gradient[part.tokens]
            inner_gradient = part.inner(of_part, b)
            if part.later_scale != 1:
                inner_gradient.mul_(part.later_scale)
            if x_gradient is not None:
                x_gradient[part.tokens].addmm_(inner_gradient, a)
            for member in part.members:
                a_gradient, b_gradient = member.weight_gradients(x, inner, inner_gradient, of_part)
                if part.later_scale != 1:
                    b_gradient.mul_(part.later_scale)
                gradients += (a_gradient, b_gradient)
        if x_gradient is not None:
            x_gradient = x_gradient.view(context.shape)
        return x_gradient, None, None, None, None, None, *gradients


def _dequantize(weight: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    return cast("Tensor", dequantize_4bit(weight.data.view(-1, 1), state)).to(dtype)
