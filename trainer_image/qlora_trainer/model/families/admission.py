"""Checks, by small files, that a model can be trained, before fetching weights. Loads no torch itself."""

import importlib
import json
import logging
from pathlib import Path

from qlora_api.contract import ExitCode
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.sandbox import DryRunFailed, LimitReached, within_limits
from qlora_trainer.model.families.family import ALTERNATIVE, Family, Traits
from qlora_trainer.model.source.quantization import require_agreement, source_quantization

logger = logging.getLogger(__name__)
_CONFIG = "config.json"
_INSPECTION_SECONDS = 600
# By its name: importers of this module do not load torch.
_INSPECTION = "qlora_trainer.model.families.inspection"


def check_model(folder: Path, spec: QLoRAJobSpec) -> Family:
    """Check the model whose config.json and tokenizer are in `folder`.

    Raises StepFailure: UNSAFE_ARTIFACT for a model with code, BAD_CONFIGURATION for one that cannot be trained,
    or not with these settings.
    """
    family = inspect_model(folder, spec.lora)
    require_settings(family, folder / _CONFIG, spec)
    for remark in family.remarks(spec.training):
        logger.warning(remark)
    return family


def require_settings(traits: Traits, config: Path, spec: QLoRAJobSpec) -> None:
    """Raise StepFailure if the model with this config.json cannot be trained so."""
    require_agreement(source_quantization(json.loads(config.read_bytes()), str(config)), spec.quantization)
    traits.require(spec.training, spec.output)


def inspect_model(folder: Path, lora: LoraSpec) -> Family:
    """Inspect the family within limits: a small file may describe huge blocks."""
    what = "the inspection of the model"
    try:
        family: Family = within_limits(_inspect, (folder, lora), seconds=_INSPECTION_SECONDS, what=what)
    except LimitReached as failure:
        raise bad_configuration(
            f"{folder / _CONFIG} describes no model that can be trained here: {failure}; {ALTERNATIVE}"
        ) from failure
    except DryRunFailed as failure:
        # Presumably not the model's fault: the process was killed, or this program has a defect.
        raise StepFailure(ExitCode.INTERNAL_ERROR, f"{folder / _CONFIG}: {failure}") from failure
    return family


def _inspect(folder: Path, lora: LoraSpec) -> Family:
    # A process that was forked has none of its parent's threads, which PyTorch would wait for.
    importlib.import_module("torch").set_num_threads(1)
    family: Family = importlib.import_module(_INSPECTION).inspect_published(folder, lora)
    return family
