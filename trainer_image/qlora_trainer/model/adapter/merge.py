"""Merges an adapter into the 4-bit weights that it was trained on: a plain model in bfloat16, one tensor at a time.

The original weights differ from these by the quantization error. 4-bit again would round off most of the training.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_api.spec.resolved import ResolvedLora
from qlora_trainer.model.architecture.dequantized_model import DTYPE, DequantizedBase

BYTES_PER_ENTRY = 8
"""Working memory of a merge per entry of a layer: 16 bit, 32 bit, the result."""


def merged_weight(base: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """The weight [outputs, inputs] of a layer together with its adapter, in bfloat16.

    With W the dequantized weight `base`, s the scaling, A [rank, inputs] and B [outputs, rank]: W + s B A, computed in
    float32 and rounded once (LoRA, arXiv 2106.09685). With DoRA's magnitude m [outputs] each of its rows is scaled to
    the length m (arXiv 2402.09353, equation 5).
    """
    merged = base.to(torch.float32).addmm_(b.to(torch.float32), a.to(torch.float32), alpha=scaling)
    if magnitude is not None:
        merged *= (magnitude.to(torch.float32) / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
    return merged.to(DTYPE)


def adapter_scaling(lora: ResolvedLora) -> float:
    """B A's factor: alpha / rank, or / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)


@dataclass(frozen=True)
class MergeSource(DequantizedBase):
    """The tensors of a merged model."""

    adapter_file: Path
    lora: ResolvedLora

    def tensor(self, name: str) -> Tensor:
        """This tensor of the merged model. Raises StepFailure if the base lacks it."""
        layer = name.removesuffix(".weight")
        with safe_open(self.adapter_file, framework="pt") as adapter:
            trained = set(adapter.keys())
            prefix = f"base_model.model.{layer}"
            if f"{prefix}.weight" in trained:
                return adapter.get_tensor(f"{prefix}.weight").to(DTYPE)
            if not (name.endswith(".weight") and f"{prefix}.lora_A.weight" in trained):
                return super().tensor(name)
            magnitude = f"{prefix}.lora_magnitude_vector"
            return merged_weight(
                self.base[name],
                adapter.get_tensor(f"{prefix}.lora_A.weight"),
                adapter.get_tensor(f"{prefix}.lora_B.weight"),
                adapter_scaling(self.lora),
                adapter.get_tensor(magnitude) if magnitude in trained else None,
            )
