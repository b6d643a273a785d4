"""Judges before any weight is fetched whether a job fits its card."""

import json
from collections.abc import Iterable
from pathlib import Path

from qlora_api.contract import ExitCode
from qlora_api.memory.advice import Advice, advice, budget, verdict
from qlora_api.memory.estimate import GIB, TrainingShape, estimate
from qlora_api.memory.model_shape import ModelShape, UnsupportedModelError
from qlora_api.status import MemoryStatus
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration


def read_shape(config: Path) -> ModelShape:
    """The sizes in a model's config.json. Raises StepFailure BAD_CONFIGURATION for a model that is not supported."""
    try:
        return ModelShape.from_config(json.loads(config.read_bytes()))
    except UnsupportedModelError as error:
        raise bad_configuration(f"spec.model.source: {error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise bad_configuration(f"the model's {config.name} is not a JSON object ({error})") from error


def training_shape(spec: QLoRAJobSpec, target_modules: Iterable[str]) -> TrainingShape:
    """What of a job decides its memory. `target_modules`: names of the adapted layers, exact or their last part."""
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
            gpus=spec.resources.gpus,
            sharding=spec.training.sharding,
        )
    except ValueError as error:
        raise bad_configuration(f"spec.lora.targetModules: {error}") from error


def memory_status(shape: ModelShape, training: TrainingShape, card_gib: int | None) -> MemoryStatus:
    """The estimate for a status; its verdict is `unknown` without the card's size."""
    memory = estimate(shape, training)
    return MemoryStatus(
        estimate_bytes=memory.expected,
        low_bytes=memory.low,
        high_bytes=memory.high,
        budget_bytes=None if card_gib is None else budget(card_gib),
        verdict="unknown" if card_gib is None else verdict(memory, card_gib),
    )


def require_fit(status: MemoryStatus, shape: ModelShape, training: TrainingShape, card_gib: int | None) -> None:
    """Raise StepFailure DOES_NOT_FIT, with the first advice, if even the low estimate exceeds the card."""
    if status.verdict != "exceeds" or card_gib is None or status.budget_bytes is None:
        return
    steps = advice(shape, training, card_gib)
    raise StepFailure(
        ExitCode.DOES_NOT_FIT,
        f"training needs about {status.estimate_bytes / GIB:.1f} GiB of GPU memory (at least "
        f"{status.low_bytes / GIB:.1f}), but a card of {card_gib} GiB (spec.resources.gpuMemory) has "
        f"{status.budget_bytes / GIB:.1f} to use: {_remedy(steps)}",
    )


def _remedy(steps: tuple[Advice, ...]) -> str:
    if not steps:
        return "use a larger card or a smaller model"
    first = steps[0]
    changes = " and ".join(f"spec.{change.setting}: {change.proposed}" for change in first.changes)
    remedy = f"set {changes}, which makes it {first.expected / GIB:.1f} GiB"
    if first.verdict == "fits":
        return remedy
    if steps[-1].verdict != "exceeds":
        return f"{remedy}, and more (`qlora plan` lists all), or use a larger card"
    return f"{remedy}; no setting is enough, so use a larger card or a smaller model"
