"""Initializes an adapter with the error of quantization instead of with zero (LoftQ)."""

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import Linear4bit
from torch import Tensor

from qlora_trainer.model.nf4.base_weights import BaseWeights

OVERSAMPLING = 128
"""Singular values that are estimated beyond the adapter's rank, so that those within it are estimated well."""
ITERATIONS = 8
_SEED = 0


@torch.no_grad()
def initialize_loftq(model: PeftModel, weights: BaseWeights, device: torch.device) -> None:
    """Set A and B of each adapted layer so that B A is nearest to the error of its 4-bit weight; the base stays.

    With W the original weight and Q the dequantized one, the singular value decomposition W - Q = U S V, cut after
    rank r, and the adapter's scaling s: A = sqrt(S / s) V and B = U sqrt(S / s), so that Q + s B A is as near to W as
    rank r allows. One step of LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1), computed in float32, with a
    decomposition of its own (see `_largest`), which is on `device` wherever the model is. Raises StepFailure if the
    original weights have no tensor of the layer's name.
    """
    adapter = model.active_adapter
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        quantized = layer.get_base_layer().weight
        missing = weights[f"{name}.weight"].to(quantized.device, torch.float32)
        missing -= dequantize_4bit(quantized.data, quantized.quant_state)
        rank, scaling = layer.r[adapter], layer.scaling[adapter]
        left, values, right = (part.to(quantized.device) for part in _largest(missing.to(device), rank))
        root = (values / scaling).sqrt()
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        for factor in (a, b):
            # PEFT creates them in the 16 bit of the matmuls, which would round what is computed here.
            factor.data = torch.zeros_like(factor, dtype=torch.float32)
        # A layer smaller than the rank has no more values; the rest of A and B adds nothing.
        a[: len(root)] = root[:, None] * right
        b[:, : len(root)] = left * root
        if adapter in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[adapter]
            magnitude.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=scaling)


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values of a matrix, with their left vectors as columns and their right ones as rows.

    Estimated from random projections (Halko et al. 2009, arXiv 0909.4061, algorithm 5.1 after 4.4): all values of a
    layer of 4096 × 4096 take eight times as long, and more of larger ones. The error of quantization is nearly noise,
    whose values decrease slowly, the worst case: what is left of it is at most 1e-3 larger in norm than the full
    decomposition leaves. A matrix of up to `rank` + OVERSAMPLING rows or columns is decomposed exactly, up to rounding.
    The projections are always the same, and no other random number changes.
    """
    sketched = min(rank + OVERSAMPLING, *matrix.shape)
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)
        left, values, right = torch.svd_lowrank(matrix, q=sketched, niter=ITERATIONS)
    return left[:, :rank], values[:rank], right[:, :rank].mT
