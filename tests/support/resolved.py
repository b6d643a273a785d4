"""Settings for tests of what prepare has decided: those of the QLoRA paper where a test names no others."""

from typing import Any

from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedLora, ResolvedSpec, ResolvedTraining

LORA: dict[str, Any] = {"rank": 64, "alpha": 16}
TRAINING: dict[str, Any] = {
    "microBatchSize": 1,
    "gradientAccumulationSteps": 16,
    "learningRate": 2e-4,
    "scheduler": "constant",
    "warmupSteps": 0,
    "autoMicroBatch": False,
    "maxSequenceLength": 512,
    "packing": True,
    "gradientCheckpointing": True,
    "keep": "last",
}
DECIDED: dict[str, Any] = {
    "dataset": {"source": "hf://org/rows", "eval": {"fraction": 0.1}},
    "lora": LORA,
    "training": TRAINING | {"epochs": 1, "evalEverySteps": 10},
}
"""Parts of a job that leaves nothing to prepare."""
OPEN: dict[str, Any] = {"lora": dict.fromkeys(LORA), "training": dict.fromkeys(["maxSteps", *TRAINING])}
"""Changes of a job that leave all of these to prepare."""


def resolved_lora(**settings: Any) -> ResolvedLora:
    """An adapter with these settings."""
    return ResolvedLora(**{**ResolvedLora.model_validate(LORA).model_dump(), **settings})


def resolved_training(**settings: Any) -> ResolvedTraining:
    """A run with these settings."""
    return ResolvedTraining(**{**ResolvedTraining.model_validate(TRAINING).model_dump(), **settings})


def resolved_spec(spec: QLoRAJobSpec) -> ResolvedSpec:
    """The spec with the settings that it leaves open."""
    content = spec.dump()
    return ResolvedSpec.model_validate(
        content | {"lora": LORA | content["lora"], "training": TRAINING | content["training"]}
    )
