"""Trains a step of tiny models on the device, and compares it with a CPU in float32: does this image train here?

The models have random weights, and need no network. Each kind has kernels that the other lacks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig
from transformers.utils.logging import disable_progress_bar

from qlora_api.memory.training_shape import RECOMPUTE_ALL
from qlora_api.spec.resolved import ResolvedLora, ResolvedTraining
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.context import Device
from qlora_trainer.core.cpu import ComputeType
from qlora_trainer.core.environment import available_cpus
from qlora_trainer.data.prepared import PackedSequence
from qlora_trainer.model.adapter.attach import adapter_parameters, attach_adapter
from qlora_trainer.model.architecture.decoder import block_linears
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.families.targets import resolve_targets
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.nf4.computation import computing
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from qlora_trainer.training.distributed.device import own_compute_type, use_device
from qlora_trainer.training.optimizer import make_optimizer

_VOCABULARY, _ROWS = 512, (300, 40, 172)
_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
_KINDS: dict[str, PretrainedConfig] = {
    "dense": LlamaConfig(**_SIZES),
    "mixture of experts": Qwen3MoeConfig(
        **_SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, decoder_sparse_step=1
    ),
}
_OPTIMIZERS = ("paged_adamw_32bit", "paged_adamw_8bit")
_LORA = ResolvedLora(rank=8, alpha=16, target_modules=("all-linear",))
_RATE = 1e-2
_TOLERANCE = 2e-2
"""Relative: several times the effect of rounding to bfloat16."""


@dataclass(frozen=True)
class Step:
    """The figures of an optimizer step."""

    loss: float
    """Before it, in nats per token."""
    gradient_norm: float
    after: float
    """The loss after it."""

    def agrees(self, other: "Step") -> bool:
        """Whether both are the same, up to rounding."""
        pairs = ((self.loss, other.loss), (self.gradient_norm, other.gradient_norm), (self.after, other.after))
        return all(isclose(one, two, rel_tol=_TOLERANCE) for one, two in pairs)

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, then {self.after:.4f}, gradient norm {self.gradient_norm:.4f}"


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
        if self.passed:
            return f"passed  {self.name}: {self.found}"
        return f"FAILED  {self.name}: {self.found}. A CPU in float32 has {self.expected}"


def checks(device: Device) -> Iterator[Check]:
    """Make the checks, one after the other. Raises StepFailure if the device cannot be used."""
    use_device(device, available_cpus(), 0)
    disable_progress_bar()
    with TemporaryDirectory(prefix="qlora-selftest-") as folder:
        for kind, config in _KINDS.items():
            model = Path(folder) / kind
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=BASE_DTYPE).save_pretrained(model)
            for optimizer in _OPTIMIZERS:
                found = _train_step(model, device, optimizer, own_compute_type(device))
                yield Check(f"{kind}, {optimizer}", found, _train_step(model, "cpu", optimizer, "float32"))


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
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    with torch.no_grad():
        return Step(float(first), float(norm), float(_loss(base, batch)))


def _loss(base: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with computing(base, batch.input_ids.device.type):
        return batch_loss(base, batch) / len(batch.targets)


def _batch(device: torch.device) -> Batch:
    tokens = torch.randint(_VOCABULARY, (sum(_ROWS),), generator=torch.Generator().manual_seed(0))
    return Batch.from_sequences([PackedSequence(tokens, tokens.clone(), _ROWS)], device)
