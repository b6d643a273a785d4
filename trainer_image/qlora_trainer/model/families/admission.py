"""Checks, by small files, that a model can be trained, before fetching weights."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from qlora_api.contract import ExitCode
from qlora_api.spec.training import LoraSpec, TrainingSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.sandbox import DryRunFailed, LimitReached, within_limits
from qlora_trainer.model.families.inspection import (
    Family,
    cannot_compare_answers,
    cannot_keep_rows_apart,
    inspect_family,
)
from qlora_trainer.model.families.rejection import ALTERNATIVE
from qlora_trainer.model.source.files import CONFIG, reject_code

logger = logging.getLogger(__name__)
_INSPECTION_SECONDS = 600
_LARGE_MODEL_PARAMETERS = 13_500_000_000
_LARGE_MODEL_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class CheckedModel:
    """A model that passed the check."""

    vocabulary: int
    """Tokens that it has embeddings for."""
    family: Family
    remarks: tuple[str, ...] = ()
    """What is done otherwise than the job asks."""

    def packs(self, training: TrainingSpec) -> bool:
        """Whether the job packs rows, and they have no effect on each other."""
        return training.packing and self.family.keeps_rows_apart(training.max_sequence_length)


def check_model(folder: Path, lora: LoraSpec, training: TrainingSpec) -> CheckedModel:
    """Check the model whose config.json and tokenizer are in `folder`.

    Raises StepFailure: UNSAFE_ARTIFACT for a model with code, BAD_CONFIGURATION for one that cannot be trained,
    or not with these settings.
    """
    reject_code(folder)
    family = _inspect_within_limits(folder, lora)
    family.require_positions(training.max_sequence_length)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = CheckedModel(config.get_text_config(decoder=True).vocab_size, family)
    if not family.keeps_rows_apart(training.max_sequence_length):
        if training.compares_answers:
            raise cannot_compare_answers(family.model_type)
        if training.micro_batch_size > 1:
            raise cannot_keep_rows_apart(family.model_type)
    remarks = tuple(_remarks(family, unpacked=training.packing and not model.packs(training)))
    for remark in remarks:
        logger.warning(remark)
    return replace(model, remarks=remarks)


def _inspect_within_limits(folder: Path, lora: LoraSpec) -> Family:
    """Inspect the family within limits: a small file may describe huge blocks."""
    what = "the inspection of the model"
    try:
        family: Family = within_limits(_inspect, (folder, lora), seconds=_INSPECTION_SECONDS, what=what)
    except LimitReached as failure:
        raise bad_configuration(
            f"{folder / CONFIG} describes no model that can be trained here: {failure}; {ALTERNATIVE}"
        ) from failure
    except DryRunFailed as failure:
        # Presumably not the model's fault: the process was killed, or this program has a defect.
        raise StepFailure(ExitCode.INTERNAL_ERROR, f"{folder / CONFIG}: {failure}") from failure
    return family


def _inspect(folder: Path, lora: LoraSpec) -> Family:
    # A process that was forked has none of its parent's threads, which PyTorch would wait for.
    torch.set_num_threads(1)
    return inspect_family(folder, lora)


def _remarks(family: Family, *, unpacked: bool) -> Iterator[str]:
    if family.without_adapter:
        counts = Counter(name.rpartition(".")[2] for name in family.without_adapter)
        adapted = _last_parts(family.target_modules)
        # With a count where others have an adapter.
        names = ", ".join(f"{name} of {counts[name]} blocks" if name in adapted else name for name in sorted(counts))
        yield f"no adapter on {names}: no gradient reaches it, or PEFT rejects it"
    if family.without_dora:
        names = ", ".join(_last_parts(family.without_dora))
        yield f"no adapter on {names}: with spec.lora.useDora, PEFT cannot distinguish these layers from routed experts"
    if unpacked:
        yield (
            f"no packing: rows in one sequence would affect each other in this {family.model_type} model; each is a "
            "separate sequence, so that short rows take more steps for the same tokens"
        )


def advise_learning_rate(parameters: int, learning_rate: float) -> None:
    """Log advice if the learning rate is high for a model of so many parameters."""
    if parameters > _LARGE_MODEL_PARAMETERS and learning_rate > _LARGE_MODEL_LEARNING_RATE:
        logger.warning("spec.training.learningRate is %g; 1e-4 is advised above 13B parameters", learning_rate)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
