"""LoRA over a 4-bit layer as one differentiable operation, without the copies that PEFT makes of every matmul's result.

The adapter's matmul adds in place to the base's output, and likewise to the gradient in backward, which dequantizes the
weight again instead of keeping it. Only rounding to 16 bit differs: it happens less often.

A sequence may have segments with different adapters: the base's matmul is one for all tokens, and each
adapter's matmuls are of its tokens only (as in Punica, Chen et al. 2023, arXiv 2310.18547).
"""

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
    routing = Routing()

    def forward(self, x: Tensor, *arguments: object, **keywords: object) -> Tensor:
        """The output x Wᵀ + bias + s (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv 2106.09685), in the base's compute type.

        Raises ModelError if segments have different adapters and the layer cannot match tokens with segments.
        """
        if arguments or keywords or not self._is_plain(x):
            if self.routing.segments:
                raise ModelError(_NOT_APART)
            return cast("Tensor", super().forward(x, *arguments, **keywords))
        base, parts = self.get_base_layer(), self._parts(x)
        # Wider only behind what autocast computes in float32: it would multiply in 16 bit too.
        x = x.to(base.compute_dtype)
        weights = [
            layer.weight.to(x.dtype)
            for part in parts
            for layer in (self.lora_A[part.adapter], self.lora_B[part.adapter])
        ]
        scaled = tuple((slice(part.start, part.stop), self.scaling[part.adapter]) for part in parts)
        kept = cpu.keeps_dequantized(x.device.type, recomputed=self.recomputed)
        output, dense, *inners = _LoraMatmul.apply(x, base.weight, base.quant_state, scaled, kept, *weights)
        if dense is None:
            dense = _dequantize(base.weight, base.quant_state, x.dtype)
        with torch.no_grad():
            rows = output.detach().view(-1, output.shape[-1])
            _matmul_into(rows, x.reshape(-1, x.shape[-1]), dense.T, base.bias)
            for (tokens, scaling), inner, b in zip(scaled, inners, weights[1::2], strict=True):
                rows[tokens].addmm_(inner, b.T, alpha=scaling)
        return cast("Tensor", output)

    def _parts(self, x: Tensor) -> tuple[Segment, ...]:
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
    """Fuse the layers where a further adapter is the first. Shares the routing."""
    first = next((module for module in model.modules() if isinstance(module, FusedLora)), None)
    if first is not None:
        fuse_lora(model, first.routing, recomputed=first.recomputed)


def fuse_lora(model: Network, routing: Routing | None = None, *, recomputed: bool) -> None:
    """Make LoRA layers over 4-bit layers FusedLora, with this value of `recomputed`."""
    routing = Routing() if routing is None else routing
    for module in model.modules():
        if type(module) is Linear4bit:
            layer: Any = module
            layer.__class__ = FusedLora
            layer.recomputed = recomputed and layer.get_base_layer().weight.device.type != "meta"
            layer.routing = routing


def mark_recomputed(block: nn.Module) -> None:
    """Mark the fused layers of a block that is recomputed in backward passes."""
    for module in block.modules():
        if isinstance(module, FusedLora):
            module.recomputed = module.get_base_layer().weight.device.type != "meta"


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


_Parts = Sequence[tuple[slice, float]]
"""Tokens with an adapter, and its scale."""


class _Context(AutogradContext, Protocol):
    weight: Tensor
    state: QuantState
    parts: _Parts
    shape: torch.Size


class _LoraMatmul(torch.autograd.Function):
    """`x` is [..., in], `weight` the frozen packed one of [out, in]. Each part has `a` [rank, in], `b` [out, rank].

    Returns an uninitialized output, which the caller computes; the dequantized weight if it is `kept` for backward; and
    x Aᵀ of each part, [its tokens, rank], which has no gradient. Recomputing a block stops when the last tensor that
    backward needs exists, and so leaves out the block's last matmul: 7 % of a step's operations with Llama's widths.
    """

    @staticmethod
    def forward(
        context: _Context,
        x: Tensor,
        weight: Tensor,
        state: QuantState,
        parts: _Parts,
        kept: bool,
        *adapters: Tensor,
    ) -> tuple[Tensor | None, ...]:
        rows = x.reshape(-1, x.shape[-1])
        inners = [rows[tokens] @ a.T for (tokens, _), a in zip(parts, adapters[::2], strict=True)]
        dense = _dequantize(weight, state, x.dtype) if kept else None
        context.save_for_backward(rows, dense, *inners, *adapters)
        context.mark_non_differentiable(*inners, *(() if dense is None else (dense,)))
        context.set_materialize_grads(False)
        context.weight, context.state, context.parts, context.shape = weight, state, parts, x.shape
        # Not returned as a view: OLMo clamps its queries in place, which autograd forbids for a view made here.
        return x.new_empty(*x.shape[:-1], state.shape[0]), dense, *inners

    @staticmethod
    @once_differentiable
    def backward(context: _Context, gradient: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, dense, *rest = context.saved_tensors
        parts, inners, adapters = context.parts, rest[: len(context.parts)], rest[len(context.parts) :]
        gradient = gradient.reshape(-1, gradient.shape[-1])
        x_gradient = None
        if context.needs_input_grad[0]:
            if dense is None:
                dense = _dequantize(context.weight, context.state, gradient.dtype)
            x_gradient = gradient.new_empty(rows.shape)
            _matmul_into(x_gradient, gradient, dense, None)
        gradients = []
        for (tokens, scaling), inner, a, b in zip(parts, inners, adapters[::2], adapters[1::2], strict=True):
            inner_gradient = (gradient[tokens] @ b).mul_(scaling)
            if x_gradient is not None:
                x_gradient[tokens].addmm_(inner_gradient, a)
            gradients += [inner_gradient.T @ rows[tokens], (gradient[tokens].T @ inner).mul_(scaling)]
        if x_gradient is not None:
            x_gradient = x_gradient.view(context.shape)
        return x_gradient, None, None, None, None, *gradients


def _dequantize(weight: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    return cast("Tensor", dequantize_4bit(weight.data.view(-1, 1), state)).to(dtype)
