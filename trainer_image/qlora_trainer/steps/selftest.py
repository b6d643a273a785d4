"""Trains a step of tiny models on the device, and compares it with a CPU in float32: does this image train here?

The models have random weights, and need no network. Each kind has kernels that the others lack.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)
from transformers.utils.logging import disable_progress_bar

from qlora_api.memory.training_shape import RECOMPUTE_ALL
from qlora_api.spec.resolved import ResolvedLora, ResolvedTraining
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.context import Device
from qlora_trainer.core.cpu import ComputeType
from qlora_trainer.core.environment import available_cpus
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.data.prepared import PackedSequence
from qlora_trainer.model.adapter.attach import adapter_parameters, attach_adapter
from qlora_trainer.model.architecture.decoder import block_linears
from qlora_trainer.model.base.conversion import BaseConversion
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.families.targets import resolve_targets
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.nf4.computation import computing
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from qlora_trainer.model.source.files import CONFIG, WEIGHTS
from qlora_trainer.training.distributed.device import own_compute_type, use_device
from qlora_trainer.training.optimizer import make_optimizer

_VOCABULARY, _ROWS = 512, (300, 40, 172)
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    # Larger than of most families: attention matters.
    "initializer_range": 0.05,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_WINDOW = 64
_FIRST, _SECOND = "paged_adamw_32bit", "paged_adamw_8bit"
_KINDS: dict[str, tuple[PretrainedConfig, tuple[str, ...]]] = {
    "dense": (LlamaConfig(**_SIZES), (_FIRST, _SECOND)),
    "sliding window": (MistralConfig(**_SIZES, sliding_window=_WINDOW), (_FIRST,)),
    "heads of 512": (LlamaConfig(**_SIZES | {"head_dim": 512}), (_FIRST,)),
    "linear attention": (Qwen3_5TextConfig(**_SIZES, **_LINEAR), (_FIRST,)),
    "mixture of experts": (Qwen3MoeConfig(**_SIZES, **_EXPERTS, num_experts=8), (_FIRST,)),
    "attention sinks, experts in MXFP4": (
        GptOssConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=2, sliding_window=_WINDOW),
        (_FIRST,),
    ),
}
"""Each with the optimizers that are tried."""
_LORA = ResolvedLora(rank=8, alpha=16, target_modules=("all-linear",))
_RATE = 1e-2
_LOSS_TOLERANCE, _GRADIENT_TOLERANCE = 1e-2, 0.2
"""Relative: more than the effect of rounding to bfloat16, which sends some tokens to other experts."""
_SINK = 3.0
"""Added to the sinks, so that they take a share of attention that shows."""


@dataclass(frozen=True)
class Step:
    """The figures of an optimizer step."""

    loss: float
    """Before it, in nats per token."""
    after: float
    """The loss after it."""
    gradient: Tensor
    """Of all parameters, in main memory."""

    def agrees(self, other: "Step") -> bool:
        """Whether both are the same, up to rounding."""
        losses = ((self.loss, other.loss), (self.after, other.after))
        return self.distance(other) < _GRADIENT_TOLERANCE and all(
            isclose(one, two, rel_tol=_LOSS_TOLERANCE) for one, two in losses
        )

    def distance(self, other: "Step") -> float:
        """Return how far this gradient is from another, relative to that one's norm."""
        return float((self.gradient - other.gradient).norm() / other.gradient.norm())

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, then {self.after:.4f}"


@dataclass(frozen=True)
class Check:
    """A kind of model with an optimizer: its step, and the reference."""

    name: str
    found: Step
    expected: Step

    @property
    def passed(self) -> bool:
        """Whether the step lowers the loss, and is that of the reference."""
        return self.found.after < self.found.loss and self.found.agrees(self.expected)

    def __str__(self) -> str:
        found = f"{self.name}: {self.found}, gradient {self.found.distance(self.expected):.1%} off"
        return f"passed  {found}" if self.passed else f"FAILED  {found}. A CPU in float32 has {self.expected}"


def checks(device: Device) -> Iterator[Check]:
    """Make the checks, one after the other. Raises StepFailure if the device cannot be used."""
    use_device(device, available_cpus(), 0)
    disable_progress_bar()
    with TemporaryDirectory(prefix="qlora-selftest-") as folder:
        for kind, (config, optimizers) in _KINDS.items():
            base = Path(folder) / kind
            _make_base(config, base)
            for optimizer in optimizers:
                found = _train_step(base, device, optimizer, own_compute_type(device))
                yield Check(f"{kind}, {optimizer}", found, _train_step(base, "cpu", optimizer, "float32"))


def _make_base(config: PretrainedConfig, folder: Path) -> None:
    """Make the 4-bit base of a random model, as prepare does."""
    with TemporaryDirectory(prefix="qlora-selftest-") as scratch:
        model = Path(scratch)
        torch.manual_seed(0)
        random = AutoModelForCausalLM.from_config(config, dtype=BASE_DTYPE)
        for name, parameter in random.named_parameters():
            if name.endswith("sinks"):
                parameter.data += _SINK
        random.save_pretrained(model)
        if config.model_type == "gpt_oss":
            draw_experts_in_mxfp4(model)
        conversion = BaseConversion(folder, model, "selftest", BaseLayout.from_folder(model, QuantizationSpec()))
        conversion.convert(model / WEIGHTS, file_sha256(model / WEIGHTS))
        conversion.complete()


def draw_experts_in_mxfp4(folder: Path) -> None:
    """Replace the experts of a saved gpt-oss by random ones, as large as those of a random model, as published."""
    weights, settings, drawn = folder / WEIGHTS, folder / CONFIG, torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in load_file(weights).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        groups = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*groups, 16), generator=drawn).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 124, groups, generator=drawn).to(torch.uint8)
    save_file(tensors, weights, metadata={"format": "pt"})
    published = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"quantization_config": published}))


def _train_step(folder: Path, device: Device, optimizer_name: str, compute_type: ComputeType) -> Step:
    base = load_base(folder, QuantizationSpec(), device, compute_type=compute_type)
    model = attach_adapter(
        base,
        _LORA,
        resolve_targets(_LORA.target_modules, block_linears(base)),
        seed=0,
        recomputation=RECOMPUTE_ALL,
        base_name="selftest",
        base_revision="selftest",
    )
    parameters = list(adapter_parameters(model).values())
    training = ResolvedTraining(
        optimizer=optimizer_name,
        learning_rate=_RATE,
        max_steps=1,
        scheduler="constant",
        warmup_steps=0,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        auto_micro_batch=False,
        max_sequence_length=sum(_ROWS),
    )
    optimizer, batch = make_optimizer(parameters, training), _batch(torch.device(device))
    first = _loss(base, batch)
    first.backward()
    gradient = torch.cat([part.flatten() for parameter in parameters if (part := parameter.grad) is not None]).cpu()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    with torch.no_grad():
        return Step(float(first), float(_loss(base, batch)), gradient)


def _loss(base: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with computing(base, batch.input_ids.device.type):
        return batch_loss(base, batch) / len(batch.targets)


def _batch(device: torch.device) -> Batch:
    tokens = torch.randint(_VOCABULARY, (sum(_ROWS),), generator=torch.Generator().manual_seed(0))
    return Batch.from_sequences([PackedSequence(tokens, tokens.clone(), _ROWS)], device)
