"""Checks a model by its config.json alone, as prepare does, to plan a job. Loads no torch itself."""

import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_api.memory.model_shape import mixes_experts
from qlora_api.memory.one_row import ONE_ROW_MODEL_TYPES
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.training import LoraSpec
from qlora_trainer.model.families.admission import inspect_model, require_settings
from qlora_trainer.model.families.family import Family, Traits
from qlora_trainer.model.memory.dry_run import measure_within_limits
from qlora_trainer.model.memory.fit import type_of_model
from qlora_trainer.model.memory.job_memory import Measure

_CONFIG = "config.json"


def check_config(config: Path, spec: QLoRAJobSpec) -> Traits:
    """Return the traits of a job's model. Raises StepFailure as prepare does."""
    traits = find_traits(config, spec.lora)
    require_settings(traits, config, spec)
    return traits


def find_traits(config: Path, lora: LoraSpec) -> Traits:
    """Return the traits of the model with this config.json, from an inspection.

    Without the trainer, from the list of the families that were inspected. Raises StepFailure as prepare does.
    """
    if importlib.util.find_spec("torch") is None:
        model_type = type_of_model(config)
        experts = mixes_experts(json.loads(config.read_bytes()))
        return Traits(model_type=model_type, one_row=model_type in ONE_ROW_MODEL_TYPES, mixture_of_experts=experts)
    if config.name == _CONFIG:
        return inspect_model(config.parent, lora)
    with TemporaryDirectory() as folder:
        return inspect_model(Path(shutil.copyfile(config, Path(folder) / _CONFIG)).parent, lora)


def measure_with(traits: Traits) -> Measure:
    """Return the dry run of a model that was inspected."""
    return partial(measure_within_limits, family=traits if isinstance(traits, Family) else None)
