"""Decides whether a run fits a GPU, and which settings to change if it does not."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, TypeAlias

from qlora_api.memory.estimate import GIB, MemoryEstimate
from qlora_api.memory.training_shape import TrainingShape

Estimator: TypeAlias = Callable[[TrainingShape], MemoryEstimate]
"""The memory of one model with these settings."""
Candidates: TypeAlias = Callable[[TrainingShape], Iterator[TrainingShape]]
"""Smaller settings than these, the mildest first."""
Verdict = Literal["fits", "tight", "exceeds"]
_ADMISSION_MARGIN = 1.07
_USABLE_SHARE = 0.98
# Some GPUs offer up to 0.99 of their memory: a run whose low bound is below this may fit.
_REJECTED_BEYOND = 0.985
# A run that fits with less than this share of the budget to spare is shown what to change first.
_THIN_MARGIN = 0.05
SHORTEST_SEQUENCE = 256
"""Tokens below which no sequence is advised to be cut."""
SHORTEST_ANSWER = 16
"""Tokens below which no answer is advised to be cut off."""
LARGEST_MICRO_BATCH_TOKENS = 4096
"""Tokens of a micro batch beyond which a larger one hardly trains faster."""
_SMALLEST_RANK = 8
_GPUS_OF_A_NODE = (2, 4, 8)
# A change that saves less than this share is noise compared with the estimate's error.
_WORTHWHILE_SAVING = 0.01


def budget(gpu_gib: float) -> int:
    """Return the bytes that a process can allocate on a GPU of `gpu_gib` GiB.

    That is 0.98 of it, the rest is the driver's. GPUs of 24, 48 and 80 GB offer 0.98 to 0.99 of their nominal GiB. For
    a GPU whose error correction takes memory (a T4 offers 14.6 of 16) give the total that `nvidia-smi` shows. Raises
    ValueError unless positive.
    """
    if not (math.isfinite(gpu_gib) and gpu_gib > 0):
        raise ValueError(f"gpu_gib is {gpu_gib}: must be a positive number of GiB")
    return math.floor(_USABLE_SHARE * gpu_gib * GIB)


class Peak(Protocol):
    """The peak GPU memory of a run, in bytes."""

    @property
    def expected(self) -> int:
        """The expected peak."""

    @property
    def low(self) -> int:
        """The lowest possible peak."""


def verdict(memory: Peak, gpu_gib: float) -> Verdict:
    """Compare a run of this peak with a GPU of `gpu_gib` GiB.

    `fits`: expected × 1.07, for fragmentation, is within the budget. `exceeds`: even the low bound is beyond 0.985 of
    the GPU, so the run is rejected. `tight`: anything between; the run may start, and its status
    reports that. Raises ValueError unless `gpu_gib` is positive.
    """
    available = budget(gpu_gib)
    if memory.expected * _ADMISSION_MARGIN <= available:
        return "fits"
    return "exceeds" if memory.low > _REJECTED_BEYOND * gpu_gib * GIB else "tight"


def room(memory: MemoryEstimate, gpu_gib: float) -> int:
    """Return the bytes of the budget beyond the expected peak, negative if over it."""
    return budget(gpu_gib) - memory.expected


def is_thin(memory: MemoryEstimate, gpu_gib: float) -> bool:
    """Whether a run fits, margin included, with less than 5 % of the budget to spare."""
    available = budget(gpu_gib)
    spare = available - memory.expected * _ADMISSION_MARGIN
    return 0 <= spare < _THIN_MARGIN * available


@dataclass(frozen=True, slots=True)
class Change:
    """One setting of a QLoRAJob to change: its path under `spec`, and both values."""

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


def advice(estimate: Estimator, training: TrainingShape, gpu_gib: float) -> tuple[Advice, ...]:
    """Return settings to change, in order, until the run fits a GPU of `gpu_gib` GiB.

    First those that cost time only, then precision, then those that cut the data or the adapter; each no further than
    needed, and left out where it saves less than 1 %. Empty when the run fits already. When the last step's verdict is
    not `fits`, the model needs more or larger GPUs. Raises ValueError unless `gpu_gib` is positive.
    """
    steps: list[Advice] = []
    for effect, candidates in _REMEDIES:
        before = estimate(training)
        if verdict(before, gpu_gib) == "fits":
            break
        proposal = _mildest_that_fits(estimate, _allowed(candidates, training), gpu_gib)
        if proposal is None:
            continue
        after = estimate(proposal)
        judged = verdict(after, gpu_gib)
        if judged != "fits" and after.expected > before.expected * (1 - _WORTHWHILE_SAVING):
            continue
        steps.append(Advice(_changes(training, proposal), effect, proposal, after.expected, judged))
        training = proposal
    return tuple(steps)


def more_gpus(estimate: Estimator, training: TrainingShape, gpu_gib: float) -> Advice | None:
    """Return the fewest GPUs of `gpu_gib` GiB that a sharded base fits, or None if none do."""
    for candidate in _allowed(_on_more_gpus, training):
        memory = estimate(candidate)
        if verdict(memory, gpu_gib) == "fits":
            return Advice(_changes(training, candidate), _SHARDED, candidate, memory.expected, "fits")
    return None


def first_change(estimate: Estimator, training: TrainingShape, gpu_gib: float) -> Advice | None:
    """Return the setting to change first for more room, or None if none helps."""
    before = estimate(training)
    for effect, candidates in _REMEDIES:
        proposal = next(_allowed(candidates, training), None)
        if proposal is None:
            continue
        after = estimate(proposal)
        if after.expected <= before.expected * (1 - _WORTHWHILE_SAVING):
            return Advice(_changes(training, proposal), effect, proposal, after.expected, verdict(after, gpu_gib))
    return None


def larger_micro_batch(estimate: Estimator, training: TrainingShape, gpu_gib: float) -> Advice | None:
    """Return the largest micro batches of the same batch that fit with room to spare.

    Returns None if none do. They have at most 4,096 tokens each, and divide the batch at least as evenly among the GPUs
    as the run's own. Raises ValueError unless `gpu_gib` is positive.
    """
    for larger in larger_micro_batches(training):
        memory = estimate(larger)
        if verdict(memory, gpu_gib) == "fits" and not is_thin(memory, gpu_gib):
            return Advice(_changes(training, larger), _LARGER, larger, memory.expected, "fits")
    return None


def larger_micro_batches(training: TrainingShape) -> Iterator[TrainingShape]:
    """Yield larger micro batches, the largest first, that give no GPU more sequences."""
    if "micro_batch_size" in training.fixed:
        return
    size, steps, gpus = training.micro_batch_size, training.gradient_accumulation_steps, training.gpus
    for larger in range(LARGEST_MICRO_BATCH_TOKENS // training.sequence_length, size, -1):
        fewer, left = divmod(size * steps, larger)
        if not left and math.ceil(fewer / gpus) * larger <= math.ceil(steps / gpus) * size:
            yield replace(training, micro_batch_size=larger, gradient_accumulation_steps=fewer)


def _mildest_that_fits(
    estimate: Estimator, candidates: Iterator[TrainingShape], gpu_gib: float
) -> TrainingShape | None:
    """The first candidate that fits, else the last one, else None."""
    candidate = None
    for candidate in candidates:
        if verdict(estimate(candidate), gpu_gib) == "fits":
            break
    return candidate


def _allowed(candidates: Candidates, training: TrainingShape) -> Iterator[TrainingShape]:
    """The candidates that differ, and keep the fixed fields."""
    for candidate in candidates(training):
        if candidate != training and not training.fixed.intersection(_changed_fields(training, candidate)):
            yield candidate


def _halves(value: int, smallest: int) -> Iterator[int]:
    while value // 2 >= smallest:
        value //= 2
        yield value


def _smaller_micro_batches(training: TrainingShape) -> Iterator[TrainingShape]:
    size = training.micro_batch_size
    for smaller in range(size - 1, 0, -1):
        if size % smaller == 0:
            steps = training.gradient_accumulation_steps * (size // smaller)
            yield replace(training, micro_batch_size=smaller, gradient_accumulation_steps=steps)


def _on_more_gpus(training: TrainingShape) -> Iterator[TrainingShape]:
    for gpus in _GPUS_OF_A_NODE:
        if gpus > training.gpus:
            sharded = replace(training, gpus=gpus, sharding="full")
            yield sharded
            if training.optimizer == "paged_adamw_32bit":
                yield replace(sharded, optimizer="paged_adamw_8bit")


def _shorter_answers(training: TrainingShape) -> Iterator[TrainingShape]:
    if training.answer_tokens is None:
        return
    prompt, both = training.answer_tokens
    for new in _halves(both - prompt, SHORTEST_ANSWER):
        yield replace(training, answer_tokens=(prompt, prompt + new))


_SHARDED = "Each GPU holds a part of the base: slower, with the same result."
_REMEDIES: tuple[tuple[str, Candidates], ...] = (
    (
        "Activations are computed twice: slower, with the same result.",
        lambda training: iter([replace(training, recomputed_blocks=None)]),
    ),
    ("The same batch in more, smaller micro batches: slower, with the same result.", _smaller_micro_batches),
    (_SHARDED, lambda training: iter([replace(training, sharding="full")] if training.gpus > 1 else [])),
    (
        "The quantization constants are quantized too: without measurable loss.",
        lambda training: iter([replace(training, double_quantization=True)]),
    ),
    (
        "Adam's moments are stored in 8-bit: results hardly differ.",
        lambda training: iter([replace(training, optimizer="paged_adamw_8bit")]),
    ),
    ("Longer answers are cut off, and do not pass.", _shorter_answers),
    (
        "Rows longer than this are left out.",
        lambda training: (
            replace(training, sequence_length=shorter)
            for shorter in _halves(training.sequence_length, SHORTEST_SEQUENCE)
        ),
    ),
    (
        "The adapter has less capacity; lower lora.alpha in proportion to keep its scale.",
        lambda training: (replace(training, rank=lower) for lower in _halves(training.rank, _SMALLEST_RANK)),
    ),
    (
        "Adapter weights have no 32-bit copy: small updates are lost to rounding.",
        lambda training: iter([replace(training, adapter_bytes=2)]),
    ),
)
_LARGER = "The same batch in fewer, larger micro batches: faster, with the same result."
ADAPTER_FIELDS = frozenset({"rank", "adapter_bytes"})
"""Fields that an earlier adapter to begin with decides. One in 16 bit could be trained in 32, and not the reverse."""
_SPEC_PATHS: Mapping[str, str] = {
    "recomputed_blocks": "training.gradientCheckpointing",
    "micro_batch_size": "training.microBatchSize",
    "gradient_accumulation_steps": "training.gradientAccumulationSteps",
    "double_quantization": "quantization.doubleQuant",
    "optimizer": "training.optimizer",
    "answer_tokens": "gate.score.maxNewTokens",
    "sequence_length": "training.maxSequenceLength",
    "rank": "lora.rank",
    "adapter_bytes": "lora.dtype",
    "gpus": "resources.gpus",
    "sharding": "training.sharding",
}


SHARDING_FIELDS = frozenset({"gpus", "sharding"})
"""Fields of a run that needs the whole base on each GPU."""
RUN_FIELDS = frozenset(_SPEC_PATHS) - {"answer_tokens", "recomputed_blocks"}
"""Fields that define a run: not those that leave its adapter as it is."""


def _changed_fields(before: TrainingShape, after: TrainingShape) -> list[str]:
    return [field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)]


def _changes(before: TrainingShape, after: TrainingShape) -> tuple[Change, ...]:
    """The differences of two training shapes, as paths and values of a spec."""
    follows = frozenset({"gradient_accumulation_steps"} if before.has_batch_size else ())
    return tuple(
        Change(_SPEC_PATHS[name], _spec_value(name, getattr(before, name)), _spec_value(name, getattr(after, name)))
        for name in _changed_fields(before, after)
        if name not in follows
    )


def _spec_value(name: str, value: object) -> str:
    if name == "adapter_bytes":
        return "bfloat16" if value == 2 else "float32"
    if name == "recomputed_blocks":
        return "true" if value is None else "automatic" if value else "false"
    if isinstance(value, tuple):
        prompt, both = value
        return str(both - prompt)
    return str(value).lower()
