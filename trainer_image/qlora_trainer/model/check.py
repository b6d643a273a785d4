"""Checks, by the small files of a model, that a job can train it: before any weight is fetched."""

import logging
from dataclasses import dataclass
from pathlib import Path

from qlora_api.memory.model_shape import ModelShape
from qlora_api.training import LoraSpec, TrainingSpec
from qlora_trainer.model.memory_fit import read_shape
from qlora_trainer.model.source import CONFIG, reject_code
from qlora_trainer.model.support import Family, inspect_family

logger = logging.getLogger(__name__)
_LARGE_MODEL_PARAMETERS = 13_500_000_000
_LARGE_MODEL_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class CheckedModel:
    """What is known about a model that can be trained."""

    shape: ModelShape
    family: Family

    def packs(self, training: TrainingSpec) -> bool:
        """Whether a sequence may have several rows: the job wants it, and they have no effect on each other."""
        return training.packing and self.family.keeps_rows_apart(training.max_sequence_length)


def check_model(folder: Path, lora: LoraSpec, training: TrainingSpec) -> CheckedModel:
    """Check the model whose config.json and tokenizer are in `folder`, and log advice.

    Raises StepFailure: UNSAFE_ARTIFACT for a model with its own code, BAD_CONFIGURATION for one that cannot be trained,
    or not with these settings.
    """
    reject_code(folder)
    family = inspect_family(folder, lora)
    family.require_positions(training.max_sequence_length)
    model = CheckedModel(read_shape(folder / CONFIG), family)
    if training.packing and not model.packs(training):
        logger.warning("no packing: rows in one sequence would affect each other in this %s model", family.model_type)
    _advise_learning_rate(model.shape, training.learning_rate)
    return model


def _advise_learning_rate(shape: ModelShape, learning_rate: float) -> None:
    parameters = shape.linear_parameters + shape.embedding_parameters
    if parameters > _LARGE_MODEL_PARAMETERS and learning_rate > _LARGE_MODEL_LEARNING_RATE:
        logger.warning("spec.training.learningRate is %g; 1e-4 is advised above 13B parameters", learning_rate)
