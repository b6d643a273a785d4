"""The arms: each one's storage of the base, and its trained weights. All else is the same for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_api.spec.resolved import ResolvedLora
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.model.adapter.attach import adapter_parameters, attach_adapter
from qlora_trainer.model.architecture.decoder import block_linears
from qlora_trainer.model.architecture.text_part import load_text_part
from qlora_trainer.model.base.conversion import BaseConversion
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.families.targets import resolve_targets
from qlora_trainer.model.kernels.activations import fuse_activations
from qlora_trainer.model.kernels.attention import ATTENTION, register_attention
from qlora_trainer.model.kernels.norms import fuse_norms
from qlora_trainer.model.nf4.quantization import BASE_DTYPE

QUANTIZATIONS: Mapping[str, QuantizationSpec] = {
    "nf4-dq": QuantizationSpec(type="nf4", double_quant=True),
    "nf4": QuantizationSpec(type="nf4", double_quant=False),
    "fp4-dq": QuantizationSpec(type="fp4", double_quant=True),
}
"""Of the arms whose base is in 4-bit."""


@dataclass(frozen=True)
class Subject:
    """A model and its trained parameters: those of the adapter."""

    model: Any
    """The model that generates: the network, or the PEFT model around it."""
    network: Any
    """The causal language model of transformers, whose loss is computed."""
    parameters: Sequence[nn.Parameter]
    """The optimizer's parameters, in 32 bit."""

    def collect_gradients(self) -> None:
        """Give the parameters the gradients of the backward passes, as adapters have."""

    def apply_update(self) -> None:
        """Copy the updated parameters into the model. An adapter's are the model's."""


@dataclass(frozen=True)
class MasterWeights(Subject):
    """All weights of a model in 16 bit, updated through copies in 32 bit (Micikevicius et al. 2018, arXiv 1710.03740).

    The passes are those of the other arms, in 16 bit, and updates too small for 16 bit are not lost.
    """

    weights: Sequence[nn.Parameter]
    """Those of the model, in the order of `parameters`."""

    @classmethod
    def of(cls, model: Any) -> "MasterWeights":
        """All parameters of the model; one that is tied to another counts once."""
        weights = list(model.parameters())
        masters = [nn.Parameter(weight.detach().float()) for weight in weights]
        return cls(model, model, masters, weights)

    def collect_gradients(self) -> None:
        """The gradients of the weights, in 32 bit."""
        for master, weight in zip(self.parameters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def apply_update(self) -> None:
        """The weights are the copies, rounded to 16 bit."""
        for master, weight in zip(self.parameters, self.weights, strict=True):
            weight.copy_(master)


def load_subject(arm: str, model: Path, bases: Path, lora: ResolvedLora, seed: int) -> Subject:
    """Load the arm's model for training, with 4-bit bases kept in folder `bases`."""
    if arm == "full":
        # Not with fused norms, which have no gradient for their weights. Both compute the same function.
        return MasterWeights.of(load_16_bit(model).train())
    if arm == "lora":
        base = load_16_bit(model)
        base.requires_grad_(False)
        fuse_norms(base)
        fuse_activations(base)
    else:
        base = load_base(_base_in_4_bit(arm, model, bases), QUANTIZATIONS[arm], "cpu")
    tuned = attach_adapter(
        base,
        lora,
        resolve_targets(lora.target_modules, block_linears(base)),
        seed=seed,
        gradient_checkpointing=False,
        base_name="study",
        base_revision="study",
    )
    return Subject(tuned, tuned.get_base_model(), list(adapter_parameters(tuned).values()))


def load_16_bit(model: Path) -> Any:
    """The base in 16 bit, with the attention that keeps the rows of a sequence apart."""
    register_attention()
    return load_text_part(model, dtype=BASE_DTYPE, attn_implementation=ATTENTION, device_map={"": "cpu"})[0]


def _base_in_4_bit(arm: str, model: Path, bases: Path) -> Path:
    """The arm's base, as the prepare step makes it."""
    target, quantization = bases / arm, QUANTIZATIONS[arm]
    conversion = BaseConversion(target, model, "study", BaseLayout.from_folder(model, quantization))
    for path in sorted(model.glob("*.safetensors")):
        if path.name not in conversion.digests:
            conversion.convert(path, file_sha256(path))
    conversion.complete()
    return target


@torch.no_grad()
def store_in_16_bit(model: nn.Module) -> None:
    """Replace each 4-bit layer by the linear layer it computes: answers are faster."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Linear4bit):
                setattr(module, name, _linear(layer))


def _linear(layer: Any) -> nn.Linear:
    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(BASE_DTYPE)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain
