"""Judges an estimate against a card, and says which settings to change."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from qlora_api.memory.estimate import GIB, MemoryEstimate, TrainingShape, estimate
from qlora_api.memory.model_shape import ModelShape

Verdict = Literal["fits", "tight", "exceeds"]
_ADMISSION_MARGIN = 1.07
_USABLE_SHARE = 0.98
# Room for less than this share more than is expected and its margin: worth a word about what to change first.
_THIN_MARGIN = 0.05
_SHORTEST_SEQUENCE = 256
_SMALLEST_RANK = 8
# A change that saves less than this share is noise beside the estimate's own error.
_WORTHWHILE_SAVING = 0.01


def budget(card_gib: float) -> int:
    """Bytes that a process can allocate on a card of `card_gib` GiB: 0.98 of it, the rest is the driver's.

    Cards of 24, 48 and 80 GB offer 0.98 to 0.99 of their nominal GiB. On a card that pays for error correction out of
    its memory (a T4 offers 14.6 of 16) give the total that `nvidia-smi` shows. Raises ValueError unless positive.
    """
    if not (math.isfinite(card_gib) and card_gib > 0):
        raise ValueError(f"card_gib is {card_gib}: must be a positive number of GiB")
    return math.floor(_USABLE_SHARE * card_gib * GIB)


def verdict(memory: MemoryEstimate, card_gib: float) -> Verdict:
    """Judge whether a run of this estimate goes on a card of `card_gib` GiB; raises ValueError unless positive.

    `fits`: expected × 1.07, for fragmentation, is within the budget. `exceeds`: even the low bound is beyond it, so
    the run is refused. `tight`: anything between, where the run may start and the user is told.
    """
    available = budget(card_gib)
    if memory.expected * _ADMISSION_MARGIN <= available:
        return "fits"
    return "exceeds" if memory.low > available else "tight"


def room(memory: MemoryEstimate, card_gib: float) -> int:
    """Bytes of the budget that the expected peak leaves free; negative where it does not fit. Raises as `budget`."""
    return budget(card_gib) - memory.expected


def is_thin(memory: MemoryEstimate, card_gib: float) -> bool:
    """Whether a run that fits does so by less than 5 % of the card, beyond the margin for fragmentation."""
    available = budget(card_gib)
    spare = available - memory.expected * _ADMISSION_MARGIN
    return 0 <= spare < _THIN_MARGIN * available


@dataclass(frozen=True, slots=True)
class Change:
    """One setting of a QLoRAJob to change: its path under `spec`, its value now and the value proposed."""

    setting: str
    current: str
    proposed: str


@dataclass(frozen=True, slots=True)
class Advice:
    """A step that makes a run smaller, taken on top of the steps before it."""

    changes: tuple[Change, ...]
    effect: str
    """What the step costs, in one sentence."""
    training: TrainingShape
    expected: int
    """Bytes after this step and all before it."""
    verdict: Verdict


def advice(model: ModelShape, training: TrainingShape, card_gib: float) -> tuple[Advice, ...]:
    """Settings to change, one after the other, until the run fits a card of `card_gib` GiB.

    First what costs time only, then what costs precision, then what cuts the data or the adapter; each no further than
    needed, and left out where it saves less than 1 %. Empty when the run fits already. When the last step's verdict is
    not `fits`, the model needs a larger card. Raises ValueError unless `card_gib` is positive.
    """
    steps: list[Advice] = []
    for effect, candidates in _REMEDIES:
        before = estimate(model, training)
        if verdict(before, card_gib) == "fits":
            break
        proposal = _mildest_that_fits(model, candidates(training), card_gib)
        if proposal is None:
            continue
        after = estimate(model, proposal)
        judged = verdict(after, card_gib)
        if judged != "fits" and after.expected > before.expected * (1 - _WORTHWHILE_SAVING):
            continue
        steps.append(Advice(_changes(training, proposal), effect, proposal, after.expected, judged))
        training = proposal
    return tuple(steps)


def first_change(model: ModelShape, training: TrainingShape, card_gib: float) -> Advice | None:
    """The setting to change first for more room, whether the run fits or not; None if there is none that helps."""
    before = estimate(model, training)
    for effect, candidates in _REMEDIES:
        proposal = next(candidates(training), None)
        if proposal is None:
            continue
        after = estimate(model, proposal)
        if after.expected <= before.expected * (1 - _WORTHWHILE_SAVING):
            return Advice(_changes(training, proposal), effect, proposal, after.expected, verdict(after, card_gib))
    return None


def _mildest_that_fits(model: ModelShape, candidates: Iterator[TrainingShape], card_gib: float) -> TrainingShape | None:
    """The first candidate that fits, else the last one, else None."""
    candidate = None
    for candidate in candidates:
        if verdict(estimate(model, candidate), card_gib) == "fits":
            break
    return candidate


def _set(field: str, value: Any) -> Callable[[TrainingShape], Iterator[TrainingShape]]:
    def candidates(training: TrainingShape) -> Iterator[TrainingShape]:
        if getattr(training, field) != value:
            yield replace(training, **{field: value})

    return candidates


def _halve(field: str, smallest: int) -> Callable[[TrainingShape], Iterator[TrainingShape]]:
    def candidates(training: TrainingShape) -> Iterator[TrainingShape]:
        value = getattr(training, field) // 2
        while value >= smallest:
            yield replace(training, **{field: value})
            value //= 2

    return candidates


def _smaller_micro_batches(training: TrainingShape) -> Iterator[TrainingShape]:
    size = training.micro_batch_size
    for smaller in range(size - 1, 0, -1):
        if size % smaller == 0:
            steps = training.gradient_accumulation_steps * (size // smaller)
            yield replace(training, micro_batch_size=smaller, gradient_accumulation_steps=steps)


_REMEDIES: tuple[tuple[str, Callable[[TrainingShape], Iterator[TrainingShape]]], ...] = (
    ("Activations are computed twice: slower, the same result.", _set("gradient_checkpointing", True)),
    ("The batch stays the same in more, smaller parts: slower, the same result.", _smaller_micro_batches),
    ("The quantization constants are quantized too: no measurable loss.", _set("double_quantization", True)),
    ("Adam's moments are kept in 8 bit: results hardly differ.", _set("optimizer", "paged_adamw_8bit")),
    ("Longer rows are left out of the training.", _halve("sequence_length", _SHORTEST_SEQUENCE)),
    ("The adapter holds less; lower lora.alpha in proportion to keep its scale.", _halve("rank", _SMALLEST_RANK)),
    ("Adapter weights have no 32-bit copy: small updates are lost to rounding.", _set("adapter_bytes", 2)),
)
_SPEC_PATHS: Mapping[str, str] = {
    "gradient_checkpointing": "training.gradientCheckpointing",
    "micro_batch_size": "training.microBatchSize",
    "gradient_accumulation_steps": "training.gradientAccumulationSteps",
    "double_quantization": "quantization.doubleQuant",
    "optimizer": "training.optimizer",
    "sequence_length": "training.maxSequenceLength",
    "rank": "lora.rank",
    "adapter_bytes": "lora.dtype",
}


def _changes(before: TrainingShape, after: TrainingShape) -> tuple[Change, ...]:
    """The settings in which two training shapes differ, as paths and values of a QLoRAJob's spec."""
    changed = [field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)]
    return tuple(
        Change(_SPEC_PATHS[name], _spec_value(name, getattr(before, name)), _spec_value(name, getattr(after, name)))
        for name in changed
    )


def _spec_value(name: str, value: object) -> str:
    if name == "adapter_bytes":
        return "bfloat16" if value == 2 else "float32"
    return str(value).lower()
