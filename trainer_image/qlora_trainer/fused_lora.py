"""LoRA over a 4-bit layer as one differentiable operation, without the copies that PEFT makes of every product.

PEFT computes the base's product, copies it, scales the adapter's product into a third tensor and adds both into a
fourth. Here the adapter's product is added where the base's lies, and so are their gradients in backward, which
dequantizes the weight again instead of keeping it. Only rounding differs: to 16 bit, it happens less often.
"""

from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class FusedLora(Linear4bit):
    """PEFT's layer with another forward pass for training plain LoRA without dropout; for all else PEFT's own.

    An evaluation is PEFT's own to the last bit, as whoever loads the adapter will compute it.
    """

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """x Wᵀ + bias + s (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv 2106.09685), in autocast's type."""
        if arguments or keywords or not self._is_plain(x):
            return cast("Tensor", super().forward(x, *arguments, **keywords))
        base, name = self.get_base_layer(), self.active_adapters[0]
        a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
        output, inner = _Product.apply(x, base.weight, base.quant_state, a, b, self.scaling[name])
        with torch.no_grad():
            product = output.detach().view(-1, output.shape[-1])
            _fill(product, x.reshape(-1, x.shape[-1]), base)
            product.addmm_(inner, b.T, alpha=self.scaling[name])
        return cast("Tensor", output)

    def _is_plain(self, x: Tensor) -> bool:
        device, name = x.device.type, self.active_adapters[0] if len(self.active_adapters) == 1 else None
        return (
            torch.is_grad_enabled()
            and name in self.lora_A
            and not self.disable_adapters
            and not self.merged
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and isinstance(self.lora_dropout[name], nn.Identity)
            and torch.is_autocast_enabled(device)
            and x.dtype == torch.get_autocast_dtype(device) == self.get_base_layer().compute_dtype
        )


def fuse_lora(model: nn.Module) -> None:
    """Use it in every LoRA layer over a 4-bit one."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = FusedLora


def _fill(product: Tensor, rows: Tensor, base: Any) -> None:
    """Put rows Wᵀ + bias into `product`, [tokens, out]."""
    dense = _dequantized(base.weight, base.quant_state, rows.dtype).T
    if base.bias is None:
        torch.mm(rows, dense, out=product)
    else:
        torch.addmm(base.bias.to(rows.dtype), rows, dense, out=product)


class _Product(torch.autograd.Function):
    """`x` is [..., in], `weight` the frozen packed one of [out, in], `a` [rank, in], `b` [out, rank].

    Returns room for the product, and x Aᵀ, [tokens, rank], which has no gradient. The caller fills the room. For when
    a checkpoint computes a block again, it stops as soon as the last tensor that backward needs is there, which the
    block's last product is not: 7 % of a step's operations with Llama's widths.

    How the weight is packed is asked of the layer: a weight that FSDP has gathered is a plain parameter.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, state: Any, a: Tensor, b: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.T
        context.save_for_backward(rows, inner, a, b)
        context.mark_non_differentiable(inner)
        context.set_materialize_grads(False)
        context.weight, context.state, context.scaling, context.shape = weight, state, scaling, x.shape
        # Not returned as a view: OLMo clamps its queries where they lie, which autograd forbids for a view made here.
        return x.new_empty(*x.shape[:-1], b.shape[0]), inner

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, _of_inner: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, a, b = context.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        inner_gradient = (gradient @ b).mul_(context.scaling)
        x_gradient = None
        if context.needs_input_grad[0]:
            x_gradient = gradient @ _dequantized(context.weight, context.state, gradient.dtype)
            x_gradient = x_gradient.addmm_(inner_gradient, a).view(context.shape)
        b_gradient = (gradient.T @ inner).mul_(context.scaling)
        return x_gradient, None, None, inner_gradient.T @ rows, b_gradient, None


def _dequantized(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    return cast("Tensor", dequantize_4bit(weight.data.view(-1, 1), state)).to(dtype)
