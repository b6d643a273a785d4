"""The models that benchmarks train: each has its storage of the base, and its trained weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tuning import Arm
from qlora_api.memory.training_shape import Recomputation
from qlora_api.spec.resolved import ResolvedLora, ResolvedTraining
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
from qlora_trainer.training.optimizer import make_optimizer

_QUANTIZATION = QuantizationSpec(type="nf4", double_quant=True)


@dataclass(frozen=True)
class Subject:
    """A model and its trained parameters: those of the adapter."""

    model: Any
    """The model with `get_base_model`, as the product's objectives take it."""
    parameters: Sequence[nn.Parameter]
    """The optimizer's parameters, in 32 bit."""

    @property
    def network(self) -> Any:
        """The causal language model of transformers, whose loss is computed."""
        return self.model.get_base_model()

    def optimizer(self, training: ResolvedTraining) -> torch.optim.Optimizer:
        """Make the optimizer of the parameters, as the product does."""
        return make_optimizer(self.parameters, training)

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
    gradients: Sequence[Tensor]
    """Memory for their gradients in 32 bit, which is slow to get anew at each step."""

    @classmethod
    def of(cls, model: Any) -> "MasterWeights":
        """All parameters of the model; one that is tied to another counts once."""
        weights = list(model.parameters())
        masters = [nn.Parameter(weight.detach().float()) for weight in weights]
        model.get_base_model = lambda: model
        return cls(model, masters, weights, [master.detach().clone() for master in masters])

    def optimizer(self, training: ResolvedTraining) -> torch.optim.Optimizer:
        """Make the same optimizer in its fused form, four times as fast on all weights."""
        optimizer = super().optimizer(training)
        for group in optimizer.param_groups:
            group["fused"] = True
        return optimizer

    def collect_gradients(self) -> None:
        """The gradients of the weights, in 32 bit."""
        for master, weight, gradient in zip(self.parameters, self.weights, self.gradients, strict=True):
            master.grad = None if weight.grad is None else gradient.copy_(weight.grad)
            weight.grad = None

    @torch.no_grad()
    def apply_update(self) -> None:
        """The weights are the copies, rounded to 16 bit."""
        for master, weight in zip(self.parameters, self.weights, strict=True):
            weight.copy_(master)


def load_subject(arm: Arm, model: Path, base_folder: Path, lora: ResolvedLora, seed: int) -> Subject:
    """Load the arm's model for training, with a 4-bit base kept in folder `base_folder`."""
    if arm == "full":
        # Not with fused norms, which have no gradient for their weights. Both compute the same function.
        return MasterWeights.of(_load_16_bit(model).train())
    if arm == "lora":
        base = _load_16_bit(model)
        base.requires_grad_(False)
        fuse_norms(base)
        fuse_activations(base)
    else:
        base = load_base(_base_in_4_bit(model, base_folder), _QUANTIZATION, "cpu")
    tuned = attach_adapter(
        base,
        lora,
        resolve_targets(lora.target_modules, block_linears(base)),
        seed=seed,
        recomputation=Recomputation(0),
        base_name="benchmark",
        base_revision="benchmark",
    )
    return Subject(tuned, list(adapter_parameters(tuned).values()))


def _load_16_bit(model: Path) -> Any:
    """The base in 16 bit, with the attention that keeps the rows of a sequence apart."""
    register_attention()
    return load_text_part(model, dtype=BASE_DTYPE, attn_implementation=ATTENTION, device_map={"": "cpu"})[0]


def _base_in_4_bit(model: Path, target: Path) -> Path:
    """The base, as the prepare step makes it, in folder `target`."""
    conversion = BaseConversion(target, model, "benchmark", BaseLayout.from_folder(model, _QUANTIZATION))
    for path in sorted(model.glob("*.safetensors")):
        if path.name not in conversion.digests:
            conversion.convert(path, file_sha256(path))
    conversion.complete()
    return target
