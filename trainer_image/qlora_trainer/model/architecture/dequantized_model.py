"""Writes a model in bfloat16 of the 4-bit base that adapters were trained on, one tensor at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.architecture.text_part import load_text_part, without_weights
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.model.protocols import Network
from qlora_trainer.model.source.files import WEIGHTS_INDEX

DTYPE = torch.bfloat16
SHARD_BYTES = 2**30
"""Size of a file of weights, unless one tensor is larger."""


@dataclass(frozen=True)
class DequantizedBase:
    """The tensors of a 4-bit base in bfloat16, and those that it has in 32 bit."""

    base: BaseWeights

    def tensor(self, name: str) -> Tensor:
        """This tensor of the model. Raises StepFailure if the base lacks it."""
        tensor = self.base[name]
        # The base has in 32 bit what the family computes with in 32 bit.
        return tensor.to(DTYPE) if tensor.dtype == torch.float16 else tensor


def model_without_weights(model_folder: Path) -> PreTrainedModel:
    """The model to write, from the configuration in `model_folder`."""
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    # It is written in 16 bit, also if the base was published in 4.
    vars(config).pop("quantization_config", None)
    return without_weights(config, dtype=DTYPE)


def bytes_to_write(model: Network) -> int:
    """Bytes of the weights in 16 bit, without the few in 32 bit. Tied weights count once."""
    return sum(parameter.numel() * DTYPE.itemsize for parameter in model.parameters())


def load_written(folder: Path, attention: str) -> PreTrainedModel:
    """Load a model that has been written. Weights are mapped, not in memory.

    Raises StepFailure INTERNAL_ERROR if its files lack a tensor of the model or have another one.
    """
    model, report = load_text_part(folder, dtype=DTYPE, attn_implementation=attention)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):
            raise StepFailure(
                ExitCode.INTERNAL_ERROR,
                f"transformers reports {len(names)} {kind.replace('_', ' ')} of the written model, first {names[0]}: "
                "it is not published; the adapter is",
            )
    return model


def write_model(model: PreTrainedModel, source: DequantizedBase, folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write configuration and weights of the `model` into `folder`, which exists, as transformers reads them.

    Holds at most a file's tensors (`shard_bytes`, or one tensor if that is larger) and what `source` needs for one;
    what is read is mapped, not held. Returns the bytes of the weights. Raises OSError or SafetensorError if the disk is
    full.
    """
    # named_parameters has the first of tied tensors; transformers ties the others again when it loads.
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    # Gemma 4 multiplies with buffers that its files hold.
    persistent = model.state_dict()
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent and name in source.base}
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    written = sum(_write_shard(source, names, folder / file) for file, names in split.filename_to_tensors.items())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return written


def _write_shard(source: DequantizedBase, names: Sequence[str], path: Path) -> int:
    tensors = {name: source.tensor(name) for name in names}
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())
