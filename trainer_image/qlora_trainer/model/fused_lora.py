"""LoRA over a 4-bit layer as one differentiable operation, without the copies that PEFT makes of every matmul's result.

PEFT computes the base's output, copies it, scales the adapter's output into a third tensor and adds both into a fourth.
Here the adapter's matmul adds in place to the base's output, and likewise to the gradient in backward, which
dequantizes the weight again instead of keeping it. Only rounding to 16 bit differs: it happens less often.
"""

from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_trainer.core import cpu


class FusedLora(Linear4bit):
    """PEFT's layer with another forward pass for training plain LoRA without dropout, and with PEFT's for all else.

    An evaluation is PEFT's to the last bit, as everyone who loads the adapter will compute it.
    """

    recomputed = False
    """Whether backward comes right after a second forward pass: gradient checkpointing recomputes the block."""

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """The output x Wᵀ + bias + s (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv 2106.09685), in autocast's type."""
        if arguments or keywords or not self._is_plain(x):
            return cast("Tensor", super().forward(x, *arguments, **keywords))
        base, name = self.get_base_layer(), self.active_adapters[0]
        # Wider only behind what autocast computes in float32: it would multiply in 16 bit too.
        x = x.to(base.compute_dtype)
        a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
        kept = cpu.keeps_dequantized(x.device.type, recomputed=self.recomputed)
        output, inner, dense = _LoraMatmul.apply(x, base.weight, base.quant_state, a, b, self.scaling[name], kept)
        if dense is None:
            dense = _dequantized(base.weight, base.quant_state, x.dtype)
        with torch.no_grad():
            rows = output.detach().view(-1, output.shape[-1])
            _matmul_into(rows, x.reshape(-1, x.shape[-1]), dense.T, base.bias)
            rows.addmm_(inner, b.T, alpha=self.scaling[name])
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
            and x.is_floating_point()
            and torch.get_autocast_dtype(device) == self.get_base_layer().compute_dtype
        )


def fuse_lora(model: nn.Module, *, recomputed: bool) -> None:
    """Make every LoRA layer over a 4-bit layer a FusedLora; `recomputed` is its attribute, False on the meta device."""
    for module in model.modules():
        if type(module) is Linear4bit:
            layer: Any = module
            layer.__class__ = FusedLora
            layer.recomputed = recomputed and layer.get_base_layer().weight.device.type != "meta"


def _matmul_into(output: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    """Write rows · matrix + bias to `output`, [tokens, out]."""
    parts = cpu.matmul_parts(len(rows), matrix.shape[1], rows.device.type)
    for part, part_of_output in zip(rows.chunk(parts), output.chunk(parts), strict=True):
        if bias is None:
            torch.mm(part, matrix, out=part_of_output)
        else:
            torch.addmm(bias.to(rows.dtype), part, matrix, out=part_of_output)


class _LoraMatmul(torch.autograd.Function):
    """`x` is [..., in], `weight` the frozen packed one of [out, in], `a` [rank, in], `b` [out, rank].

    Returns an uninitialized output, which the caller computes; x Aᵀ, [tokens, rank], which has no gradient; and the
    dequantized weight if it is `kept` for backward. The caller computes the output because recomputing a block stops as
    soon as the last tensor that backward needs exists. The output of the block's last matmul is none of these, so that
    matmul is left out: 7 % of a step's operations with Llama's widths.

    The layer provides the quantization state: a weight that FSDP has gathered is a plain parameter without it.
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
        # Not returned as a view: OLMo clamps its queries in place, which autograd forbids for a view made here.
        return x.new_empty(*x.shape[:-1], b.shape[0]), inner, dense

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, inner, a, b, dense = context.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        inner_gradient = (gradient @ b).mul_(context.scaling)
        x_gradient = None
        if context.needs_input_grad[0]:
            if dense is None:
                dense = _dequantized(context.weight, context.state, gradient.dtype)
            x_gradient = gradient.new_empty(rows.shape)
            _matmul_into(x_gradient, gradient, dense, None)
            x_gradient = x_gradient.addmm_(inner_gradient, a).view(context.shape)
        b_gradient = (gradient.T @ inner).mul_(context.scaling)
        return x_gradient, None, None, inner_gradient.T @ rows, b_gradient, None, None


def _dequantized(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    return cast("Tensor", dequantize_4bit(weight.data.view(-1, 1), state)).to(dtype)
