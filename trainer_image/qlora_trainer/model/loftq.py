"""Initializes an adapter with the error of quantization instead of with zero (LoftQ)."""

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import Linear4bit

from qlora_trainer.model.base_weights import BaseWeights


@torch.no_grad()
def initialize_loftq(model: PeftModel, weights: BaseWeights) -> None:
    """Set A and B of each adapted layer so that B A is nearest to the error of its 4-bit weight; the base stays.

    With W the original weight and Q the dequantized one, the singular value decomposition W - Q = U S V, cut after
    rank r, and the adapter's scaling s: A = sqrt(S / s) V and B = U sqrt(S / s), so that Q + s B A is as near to W as
    rank r allows. One step of LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1), computed in float32 on the layer's
    device. Raises StepFailure if the original weights have no tensor of the layer's name.
    """
    adapter = model.active_adapter
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        quantized = layer.get_base_layer().weight
        missing = weights[f"{name}.weight"].to(quantized.device, torch.float32)
        missing -= dequantize_4bit(quantized.data, quantized.quant_state)
        left, values, right = torch.linalg.svd(missing, full_matrices=False)
        rank, scaling = layer.r[adapter], layer.scaling[adapter]
        root = (values[:rank] / scaling).sqrt()
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        for factor in (a, b):
            # PEFT creates them in the 16 bit of the matmuls, which would round what is computed here.
            factor.data = torch.zeros_like(factor, dtype=torch.float32)
        # A layer smaller than the rank has no more values; the rest of A and B adds nothing.
        a[: len(root)] = root[:, None] * right[:rank]
        b[:, : len(root)] = left[:, :rank] * root
        if adapter in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[adapter]
            magnitude.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=scaling)
