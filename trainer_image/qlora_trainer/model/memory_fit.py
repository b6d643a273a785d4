"""Judges whether a job fits its GPU, before any weight is fetched."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qlora_api.contract import ExitCode
from qlora_api.memory.advice import Advice, advice, budget, verdict
from qlora_api.memory.estimate import GIB, TrainingShape, estimate
from qlora_api.memory.model_shape import ModelShape, UnsupportedModelError
from qlora_api.status import MemoryStatus
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration


def read_shape(config: Path) -> ModelShape:
    """The sizes in a model's config.json. Raises StepFailure BAD_CONFIGURATION for an unsupported model."""
    try:
        return ModelShape.from_config(json.loads(config.read_bytes()))
    except UnsupportedModelError as error:
        raise bad_configuration(f"spec.model.source: {error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise bad_configuration(f"the model's {config.name} is not a JSON object ({error})") from error


def training_shape(spec: QLoRAJobSpec, target_modules: Iterable[str]) -> TrainingShape:
    """The settings of a job that decide its memory.

    `target_modules`: names of the adapted layers, exact or their last part. Raises StepFailure BAD_CONFIGURATION for a
    name that the estimate does not know.
    """
    try:
        return TrainingShape(
            rank=spec.lora.rank,
            adapter_bytes=4 if spec.lora.dtype == "float32" else 2,
            target_modules=frozenset(name.rpartition(".")[2] for name in target_modules),
            micro_batch_size=spec.training.micro_batch_size,
            sequence_length=spec.training.max_sequence_length,
            gradient_accumulation_steps=spec.training.gradient_accumulation_steps,
            optimizer=spec.training.optimizer,
            double_quantization=spec.quantization.double_quant,
            gradient_checkpointing=spec.training.gradient_checkpointing,
            dropout=spec.lora.dropout,
            adapted_layers=len(set(spec.lora.layers_to_transform)) if spec.lora.layers_to_transform else None,
            use_dora=spec.lora.use_dora,
            whole_modules=frozenset(spec.lora.modules_to_save or ()),
            gpus=spec.resources.gpu_count,
            sharding=spec.training.sharding,
        )
    except ValueError as error:
        raise bad_configuration(f"spec.lora.targetModules: {error}") from error


@dataclass(frozen=True)
class MemoryFit:
    """Whether a job fits its GPU."""

    status: MemoryStatus
    """The estimate; its verdict is `unknown` if the job does not state the GPU's size."""
    objection: str | None
    """Why the job cannot run, with the first advice; None if it can, or if that is unknown."""

    @classmethod
    def of(cls, shape: ModelShape, spec: QLoRAJobSpec, target_modules: Iterable[str]) -> "MemoryFit":
        """Judge a job. It cannot run if even the low estimate exceeds the GPU.

        Raises StepFailure BAD_CONFIGURATION for target modules that the model does not have.
        """
        training, gpu_gib = training_shape(spec, target_modules), spec.resources.gpu_memory
        memory = estimate(shape, training)
        status = MemoryStatus(
            estimate_bytes=memory.expected,
            low_bytes=memory.low,
            high_bytes=memory.high,
            budget_bytes=None if gpu_gib is None else budget(gpu_gib),
            verdict="unknown" if gpu_gib is None else verdict(memory, gpu_gib),
        )
        if gpu_gib is None or status.verdict != "exceeds":
            return cls(status, None)
        return cls(
            status,
            f"training needs about {memory.expected / GIB:.1f} GiB of GPU memory (at least {memory.low / GIB:.1f}), "
            f"but a GPU of {gpu_gib} GiB (spec.resources.gpuMemory) has {budget(gpu_gib) / GIB:.1f} to use: "
            f"{_remedy(advice(shape, training, gpu_gib))}",
        )

    def require(self) -> None:
        """Raise StepFailure DOES_NOT_FIT, with the first advice, if the job cannot run."""
        if self.objection is not None:
            raise StepFailure(ExitCode.DOES_NOT_FIT, self.objection)


def _remedy(steps: tuple[Advice, ...]) -> str:
    if not steps:
        return "use a larger GPU or a smaller model"
    first = steps[0]
    changes = " and ".join(f"spec.{change.setting}: {change.proposed}" for change in first.changes)
    remedy = f"set {changes}, which makes it {first.expected / GIB:.1f} GiB"
    if first.verdict == "fits":
        return remedy
    if steps[-1].verdict != "exceeds":
        return f"{remedy}, and more (`qlora plan` lists all), or use a larger GPU"
    return f"{remedy}; no setting is enough, so use a larger GPU or a smaller model"
