"""The 4-bit base of a tiny model, as prepare makes it."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.model.architecture.text_part import parts_beside_text
from qlora_trainer.model.base.artifact import BaseManifest, read_manifest
from qlora_trainer.model.base.conversion import BaseConversion
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.experts.compute import expert_modules
from qlora_trainer.model.experts.stack import ExpertStack, expert_stacks
from qlora_trainer.model.nf4.quantization import quantize


def convert(model: Path, target: Path, quantization: QuantizationSpec) -> str:
    """Make the base of a model's folder in `target`, and return its sum."""
    conversion = BaseConversion(target, model, "tiny", BaseLayout.from_folder(model, quantization))
    for path in sorted(model.glob("*.safetensors")):
        conversion.convert(path, file_sha256(path))
    return conversion.complete().sha256


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors, with 4-bit constants but no JSON descriptions."""
    found = dict(model.named_parameters())
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            found |= {f"{name}.{key}": value for key, value in layer.weight.quant_state.as_dict(packed=True).items()}
    return found


def require_equal(ours_loaded: nn.Module, theirs_loaded: nn.Module) -> None:
    """Check that both models' tensors are equal, to the bit. The second has no tower."""
    ours, theirs = state(ours_loaded), state(theirs_loaded)
    beside = tuple(f"{name}." for name in parts_beside_text(ours_loaded))
    assert {name for name in ours if not name.startswith(beside)} == theirs.keys()
    for name, tensor in theirs.items():
        found, wanted = ours[name].data, tensor.data
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        # As bytes: packed weights that are read as another type may be no numbers.
        assert torch.equal(found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), name


_NF4 = QuantizationSpec()


def expert_weights(whole: nn.Module) -> dict[str, Tensor]:
    """The weights of all experts of each block of transformers' model, by their names."""
    return {
        f"{name}.{kind}": parameter.detach()
        for name, experts in expert_modules(whole)
        for kind, parameter in experts.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def require_quantized_experts(base: nn.Module, whole: nn.Module) -> None:
    """Check that a 4-bit base has transformers' experts, quantized matrix by matrix."""
    stacks = {name: stack for name, stack in expert_stacks(base) if isinstance(stack, ExpertStack)}
    originals = expert_weights(whole)
    assert originals
    assert stacks.keys() == originals.keys()
    assert not stacks.keys() & {name for name, _ in base.named_parameters()}
    for name, original in originals.items():
        expected = ExpertStack(stacks[name].shape, stacks[name].pieces, _NF4, "cpu")
        for expert, matrices in enumerate(original):
            for piece, matrix in enumerate(matrices.chunk(stacks[name].pieces)):
                expected.put(expert, piece, quantize(matrix, _NF4))
        assert all(map(torch.equal, stacks[name].buffers(), expected.buffers()))


def settings(quantization: QuantizationSpec = _NF4, **more: Any) -> BitsAndBytesConfig:
    """The quantization settings for transformers."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **more,
    )


def quantized(model: Path, folder: Path, config: BitsAndBytesConfig, **saving: Any) -> Path:
    """Quantize and save a model with its tokenizer by transformers alone, as users do."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    loaded = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    loaded.save_pretrained(folder, **saving)
    return folder


def manifest_of(context: StepContext, record: PrepareRecord) -> BaseManifest:
    """The manifest of the base that prepare has left."""
    manifest = read_manifest(context.workspace.root / record.base_path)
    assert manifest is not None
    return manifest


def require_made_of(context: StepContext, record: PrepareRecord, weights: bytes) -> None:
    """The base was made of a deleted model.safetensors with this content."""
    assert manifest_of(context, record).sources == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert not [*context.workspace.models.rglob("*.safetensors")]


def large_weights(model: Path) -> dict[str, Tensor]:
    """The weights of a tiny model, with 20 MB that it does not need."""
    return {**load_file(model / "model.safetensors"), "w": torch.arange(20 * 10**6, dtype=torch.uint8)}
