"""Merges an adapter into the 4-bit weights that it was trained on: a plain model in bfloat16, one tensor at a time.

The original weights differ from these by the quantization error. 4-bit again would round off most of the training.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from qlora_api.spec.resolved import ResolvedLora
from qlora_trainer.model.architecture.text_part import without_weights
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.model.protocols import Network
from qlora_trainer.model.source.files import WEIGHTS_INDEX

SHARD_BYTES = 2**30
"""Size of a file of weights, unless one tensor is larger."""
BYTES_PER_ENTRY = 8
"""Working memory of a merge per entry of a layer: 16 bit, 32 bit, the result."""
_MERGED_DTYPE = torch.bfloat16


def merged_weight(base: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """The weight [outputs, inputs] of a layer together with its adapter, in bfloat16.

    With W the dequantized weight `base`, s the scaling, A [rank, inputs] and B [outputs, rank]: W + s B A, computed in
    float32 and rounded once (LoRA, arXiv 2106.09685). With DoRA's magnitude m [outputs] each of its rows is scaled to
    the length m (arXiv 2402.09353, equation 5).
    """
    merged = base.to(torch.float32).addmm_(b.to(torch.float32), a.to(torch.float32), alpha=scaling)
    if magnitude is not None:
        merged *= (magnitude.to(torch.float32) / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
    return merged.to(_MERGED_DTYPE)


def adapter_scaling(lora: ResolvedLora) -> float:
    """B A's factor: alpha / rank, or / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)


@dataclass(frozen=True)
class MergeSource:
    """The source of a merged model."""

    base: BaseWeights
    """The 4-bit base."""
    adapter_file: Path
    lora: ResolvedLora

    def tensor(self, name: str) -> Tensor:
        """This tensor of the merged model. Raises StepFailure if the base lacks it."""
        layer = name.removesuffix(".weight")
        with safe_open(self.adapter_file, framework="pt") as adapter:
            trained = set(adapter.keys())
            prefix = f"base_model.model.{layer}"
            if f"{prefix}.weight" in trained:
                return adapter.get_tensor(f"{prefix}.weight").to(_MERGED_DTYPE)
            if not (name.endswith(".weight") and f"{prefix}.lora_A.weight" in trained):
                tensor = self.base[name]
                return tensor.to(_MERGED_DTYPE) if tensor.is_floating_point() else tensor
            magnitude = f"{prefix}.lora_magnitude_vector"
            return merged_weight(
                self.base[name],
                adapter.get_tensor(f"{prefix}.lora_A.weight"),
                adapter.get_tensor(f"{prefix}.lora_B.weight"),
                adapter_scaling(self.lora),
                adapter.get_tensor(magnitude) if magnitude in trained else None,
            )


def merged_model(model_folder: Path) -> PreTrainedModel:
    """The merged model without weights, from the configuration in `model_folder`."""
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    # The merged model is in 16 bit, also if the base was published in 4.
    vars(config).pop("quantization_config", None)
    return without_weights(config, dtype=_MERGED_DTYPE)


def merged_bytes(model: Network) -> int:
    """Bytes of the weights of a `merged_model`. Tied weights count once."""
    return sum(parameter.numel() * _MERGED_DTYPE.itemsize for parameter in model.parameters())


def write_merged(model: PreTrainedModel, source: MergeSource, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write configuration and weights of the merged `model` into `folder`, which exists, as transformers reads them.

    Holds at most a file's tensors (`shard_bytes`, or one tensor if that is larger) and `BYTES_PER_ENTRY` bytes for each
    entry of the largest layer; what is read is mapped, not held. Raises OSError or SafetensorError if the disk is full.
    """
    # named_parameters has the first of tied tensors; transformers ties the others again when it loads.
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    # Gemma 4 multiplies with buffers that its files hold.
    persistent = model.state_dict()
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent and name in source.base}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file({name: source.tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
