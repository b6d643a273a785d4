"""The spec of a job with the choices of prepare: every setting of the run is a value."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import model_validator

from qlora_api.choice import Choice
from qlora_api.schema import Decides
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.training import LoraSpec, TrainingSpec

HELD_OUT = "dataset.eval.fraction"
_STANDS_FOR = {
    "training.gradientAccumulationSteps": "training.batchSize",
    "training.learningRate": "training.learningRateMultiplier",
}
"""Settings whose choice follows from another setting, which a job cannot set beside them."""
_OPEN = {
    "lora": ("rank", "alpha"),
    "training": (
        "epochs",
        "microBatchSize",
        "gradientAccumulationSteps",
        "learningRate",
        "scheduler",
        "warmupSteps",
        "autoMicroBatch",
        "maxSequenceLength",
        "packing",
        "gradientCheckpointing",
        "evalEverySteps",
        "keep",
    ),
}
"""Settings that a job may leave to prepare, by their part of the spec."""


class ResolvedLora(LoraSpec):
    """An adapter whose size is decided."""

    rank: int
    alpha: int


class ResolvedTraining(TrainingSpec):
    """A run whose settings are decided."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    scheduler: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    auto_micro_batch: Annotated[bool, Decides.NOT_THE_ADAPTER]
    max_sequence_length: Annotated[int, Decides.PREPARED_DATA]
    packing: Annotated[bool, Decides.PREPARED_DATA] = True
    gradient_checkpointing: Annotated[bool, Decides.NOT_THE_ADAPTER] = True
    keep: Literal["last", "best"] = "last"

    @model_validator(mode="after")
    def _only_one_of_each(self) -> Self:
        # It has what the job asks for and what follows.
        return self


class ResolvedSpec(QLoRAJobSpec):
    """A job whose settings are decided."""

    lora: ResolvedLora
    training: ResolvedTraining


def open_settings(spec: QLoRAJobSpec) -> frozenset[str]:
    """Return the paths of the settings that the spec leaves to prepare."""
    content = spec.dump()
    paths = {f"{part}.{name}" for part, names in _OPEN.items() for name in names if name not in content[part]}
    if spec.training.max_steps is not None:
        paths.discard("training.epochs")
    return frozenset(paths if spec.dataset.eval is not None else {*paths, HELD_OUT})


def decided_lora(lora: LoraSpec, rank: int, alpha: int) -> ResolvedLora:
    """Return the adapter with this rank and alpha where it leaves them open."""
    return ResolvedLora.model_validate({"rank": rank, "alpha": alpha} | lora.dump())


def resolve(spec: QLoRAJobSpec, choices: Iterable[Choice]) -> ResolvedSpec:
    """Return the spec with the choices for all that it leaves open. Raises ValueError if one is missing."""
    return ResolvedSpec.model_validate(_filled(spec, choices))


def fill(spec: QLoRAJobSpec, choices: Iterable[Choice]) -> QLoRAJobSpec:
    """Return the spec with the choices for some of what it leaves open, in place of what they follow from."""
    chosen = tuple(choices)
    content = _filled(spec, chosen)
    for each in chosen:
        part, _, name = _STANDS_FOR.get(each.setting, "").partition(".")
        content.get(part, {}).pop(name, None)
    return QLoRAJobSpec.model_validate(content)


def _filled(spec: QLoRAJobSpec, choices: Iterable[Choice]) -> dict[str, Any]:
    content, left_open = spec.dump(), open_settings(spec)
    for each in choices:
        if each.setting not in left_open:
            continue
        part, _, name = each.setting.partition(".")
        if each.setting == HELD_OUT:
            content["dataset"]["eval"] = {"fraction": each.parsed}
        else:
            content[part][name] = each.parsed
    return content
