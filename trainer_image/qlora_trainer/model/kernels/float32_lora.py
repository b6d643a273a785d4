"""PEFT's LoRA layers with all matmuls in 32 bit, also of an adapter that is stored in 16 bit.

Autocast, which converts for each matmul, has no 32 bit on a CPU, and PEFT alone rounds the input to the adapter's type.
Fused layers run PEFT's forward pass too: with DoRA or dropout, and whenever they have no gradients.
"""

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from qlora_trainer.model.protocols import Network


class _Float32Linear(nn.Linear):
    """A matrix A or B of LoRA, which has no bias."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.float(), self.weight.float())


def compute_lora_in_float32(model: Network) -> None:
    """Convert LoRA's matrices for each matmul, and no input. Keeps their stored type."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                matrix.__class__ = _Float32Linear
