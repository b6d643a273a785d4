"""Fits chosen settings to the memory of a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from qlora_api.automatic import Choose, Limits
from qlora_api.choice import Choice
from qlora_api.memory.advice import verdict
from qlora_api.memory.estimate import MemoryEstimate
from qlora_api.memory.training_shape import TrainingShape
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec, resolve
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.model.memory.fit import MemoryFit
from qlora_trainer.model.memory.job_memory import measured_estimate

_ENOUGH_TOKENS = 2048
"""Of a micro batch: smaller ones cost more than recomputing activations, which takes a third of the time again."""
Estimate = Callable[[ResolvedSpec, int | None], MemoryEstimate]
"""The memory of a job that recomputes so many blocks, None for all."""
Measure = Callable[[ResolvedSpec, int | None, MeasuredMemory | None], MemoryFit]
"""The same from dry runs, as far as earlier ones do not hold."""


def first_limits(spec: QLoRAJobSpec, limits: Limits, gpu_gib: float | None) -> Limits:
    """Return the limits that are tried first: with all activations kept where they may fit.

    `gpu_gib`: memory of the GPU, None if it is not known.
    """
    is_open = spec.training.gradient_checkpointing is None and spec.training.sharding == "none"
    may_keep = is_open and gpu_gib is not None and limits.group_size == 1
    return replace(limits, recomputed_blocks=0) if may_keep else limits


def limits_that_fit(
    spec: QLoRAJobSpec, choose: Choose, limits: Limits, gpu_gib: float | None, blocks: int, estimate: Estimate
) -> Limits:
    """Limit the chosen micro batch until the run fits the GPU, or it is 1. The other settings follow it.

    Before it has fewer than 2,048 tokens, as few of the model's blocks as possible are recomputed. To count them takes
    a dry run that recomputes: for 1, which is returned first.
    """

    def fits(resolved: ResolvedSpec, recomputed: int | None) -> bool:
        return gpu_gib is None or verdict(estimate(resolved, recomputed), gpu_gib) == "fits"

    while not fits(resolved := resolve(spec, choose(limits)), recomputed := limits.recomputed_blocks):
        size = resolved.training.micro_batch_size
        can_halve = spec.training.micro_batch_size is None and size > 1
        is_large = size * resolved.training.max_sequence_length >= 2 * _ENOUGH_TOKENS
        if can_halve and (recomputed is None or is_large):
            limits = replace(limits, micro_batch=size // 2)
        elif recomputed == 0 and blocks > 1:
            return replace(limits, recomputed_blocks=1)
        elif recomputed is not None:
            some = (count for count in range(recomputed, blocks) if fits(resolved, count))
            limits = replace(limits, recomputed_blocks=next(some, None))
            if limits.recomputed_blocks is None:
                return replace(limits, micro_batch=None)
        else:
            break
    return limits


@dataclass(frozen=True)
class FittedSettings:
    """A job whose settings are decided, and its memory with them."""

    spec: ResolvedSpec
    settings: tuple[Choice, ...]
    """The chosen values of open settings."""
    recomputed_blocks: int | None
    """Blocks, from the first, that the spec's gradient checkpointing recomputes; None for all."""
    memory: MemoryFit

    @property
    def recomputed_share(self) -> float:
        """The share of the blocks whose activations are recomputed."""
        if not self.spec.training.gradient_checkpointing:
            return 0.0
        measured = self.memory.measured
        return 1.0 if self.recomputed_blocks is None or measured is None else self.recomputed_blocks / measured.blocks


def fit_settings(
    spec: QLoRAJobSpec,
    choose: Choose,
    limits: Limits,
    gpu_gib: float | None,
    shape: Callable[[ResolvedSpec, int | None], TrainingShape],
    measure: Measure,
    *,
    may_keep: bool = True,
) -> FittedSettings:
    """Return the job with the chosen settings, its chosen micro batch as large as the GPU has room for.

    `measure` makes a dry run, which takes seconds: smaller micro batches are estimated from the first one. `may_keep`:
    whether activations may be kept.
    """
    limits = first_limits(spec, limits, gpu_gib) if may_keep else limits
    measured: MeasuredMemory | None = None
    while True:
        resolved = resolve(spec, chosen := choose(limits))
        memory = measure(resolved, limits.recomputed_blocks, measured)
        if memory.measured is None:
            # Nothing is known to fit.
            limits = replace(limits, recomputed_blocks=None)
            resolved = resolve(spec, chosen := choose(limits))
            break
        measured = memory.measured
        fitting = limits_that_fit(spec, choose, limits, gpu_gib, measured.blocks, _estimate_from(measured, shape))
        if fitting == limits:
            break
        limits = fitting
    return FittedSettings(resolved, chosen, limits.recomputed_blocks, memory)


def _estimate_from(measured: MeasuredMemory, shape: Callable[[ResolvedSpec, int | None], TrainingShape]) -> Estimate:
    return lambda spec, recomputed: measured_estimate(measured, shape(spec, recomputed))
