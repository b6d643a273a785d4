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

    recomputed = False
    """Whether backward comes right after a second forward pass, in which a checkpoint computes the block again."""

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """X Wᵀ + bias + s (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv 2106.09685), in autocast's type."""
        if arguments or keywords or not self._is_plain(x):
            return cast("Tensor", super().forward(x, *arguments, **keywords))
        base, name = self.get_base_layer(), self.active_adapters[0]
        a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
        # Until backward, a moment later, a CPU has room for what a block's weights take in 16 bit; 1.6 GB at 65B.
        kept = self.recomputed and x.device.type == "cpu"
        output, inner, dense = _Product.apply(x, base.weight, base.quant_state, a, b, self.scaling[name], kept)
        if dense is None:
            dense = _dequantized(base.weight, base.quant_state, x.dtype)
        with torch.no_grad():
            product = output.detach().view(-1, output.shape[-1])
            _fill(product, x.reshape(-1, x.shape[-1]), dense.T, base.bias)
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


def fuse_lora(model: nn.Module, *, recomputed: bool) -> None:
    """Use it in every LoRA layer over a 4-bit one, with `recomputed` as FusedLora has it, but on the meta device."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = FusedLora
            module.recomputed = recomputed and module.get_base_layer().weight.device.type != "meta"


def _fill(product: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    """Put rows · matrix + bias into `product`, [tokens, out]."""
    for part, part_of_product in zip(_parts(rows, matrix), _parts(product, matrix), strict=True):
        if bias is None:
            torch.mm(part, matrix, out=part_of_product)
        else:
            torch.addmm(bias.to(rows.dtype), part, matrix, out=part_of_product)


def _parts(rows: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
    """The rows, in parts that are multiplied by the matrix one after the other.

    Given 1024 rows, oneDNN leaves all but one thread idle for matrices of 513 to 1024 columns, as models have that are
    small enough for a CPU (1.2 instead of 1.9 TFLOP/s on two cores); given half of the rows it does not.
    """
    halved = rows.device.type == "cpu" and 512 < matrix.shape[1] <= 1024 and 768 <= len(rows) <= 1024
    return rows.chunk(2) if halved else (rows,)


class _Product(torch.autograd.Function):
    """`x` is [..., in], `weight` the frozen packed one of [out, in], `a` [rank, in], `b` [out, rank].

    Returns room for the product, and x Aᵀ, [tokens, rank], which has no gradient. The caller fills the room. For when
    a checkpoint computes a block again, it stops as soon as the last tensor that backward needs is there, which the
    block's last product is not: 7 % of a step's operations with Llama's widths. Third comes the dequantized weight if
    it is `kept` for backward.

    How the weight is packed is asked of the layer: a weight that FSDP has gathered is a plain parameter.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, state: Any, a: Tensor, b: Tensor, scaling: float, kept: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.T
        dense = _dequantized(weight, state, x.dtype) if kept else None
        context.save_for_backward(rows, inner, a, b, dense)
        context.mark_non_differentiable(*(tensor for tensor in (inner, dense) if tensor is not None))
        context.set_materialize_grads(False)
        context.weight, context.state, context.scaling, context.shape = weight, state, scaling, x.shape
        # Not returned as a view: OLMo clamps its queries where they lie, which autograd forbids for a view made here.
        return x.new_empty(*x.shape[:-1], b.shape[0]), inner, dense

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, *_of_others: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, inner, a, b, dense = context.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        inner_gradient = (gradient @ b).mul_(context.scaling)
        x_gradient = None
        if context.needs_input_grad[0]:
            if dense is None:
                dense = _dequantized(context.weight, context.state, gradient.dtype)
            x_gradient = gradient.new_empty(rows.shape)
            _fill(x_gradient, gradient, dense, None)
            x_gradient = x_gradient.addmm_(inner_gradient, a).view(context.shape)
        b_gradient = (gradient.T @ inner).mul_(context.scaling)
        return x_gradient, None, None, inner_gradient.T @ rows, b_gradient, None, None


def _dequantized(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    return cast("Tensor", dequantize_4bit(weight.data.view(-1, 1), state)).to(dtype)
