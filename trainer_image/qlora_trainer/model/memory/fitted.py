"""Fits chosen settings to the memory of a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

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


def first_limits(spec: QLoRAJobSpec, limits: Limits, gpu_gib: float | None) -> Limits:
    """Return the limits that are tried first: with all activations kept where they may fit.

    `gpu_gib`: memory of the GPU, None if it is not known.
    """
    is_open = spec.training.gradient_checkpointing is None and spec.training.sharding == "none"
    may_keep = is_open and gpu_gib is not None and limits.group_size == 1
    return replace(limits, keeps_activations=True) if may_keep else limits


def limits_that_fit(
    spec: QLoRAJobSpec,
    choose: Choose,
    limits: Limits,
    gpu_gib: float | None,
    estimate: Callable[[ResolvedSpec], MemoryEstimate],
) -> Limits:
    """Limit the chosen micro batch until the run fits the GPU, or it is 1. The other settings follow it.

    Before it has fewer than 2,048 tokens, activations are recomputed, which takes another dry run.
    """
    given = limits
    while gpu_gib is not None:
        training = (resolved := resolve(spec, choose(limits))).training
        if verdict(estimate(resolved), gpu_gib) == "fits":
            break
        size = training.micro_batch_size
        can_halve = spec.training.micro_batch_size is None and size > 1
        is_large = size * training.max_sequence_length >= 2 * _ENOUGH_TOKENS
        if limits.keeps_activations and not (can_halve and is_large):
            return replace(given, keeps_activations=False)
        if not can_halve:
            break
        limits = replace(limits, micro_batch=size // 2)
    return limits


@dataclass(frozen=True)
class FittedSettings:
    """A job whose settings are decided, and its memory with them."""

    spec: ResolvedSpec
    settings: tuple[Choice, ...]
    """The chosen values of open settings."""
    memory: MemoryFit


def fit_settings(
    spec: QLoRAJobSpec,
    choose: Choose,
    limits: Limits,
    gpu_gib: float | None,
    shape: Callable[[ResolvedSpec], TrainingShape],
    measure: Callable[[ResolvedSpec], MemoryFit],
    *,
    may_keep: bool = True,
) -> FittedSettings:
    """Return the job with the chosen settings, its chosen micro batch as large as the GPU has room for.

    `measure` makes a dry run, which takes seconds: smaller micro batches are estimated from the first one. `may_keep`:
    whether all activations may be kept.
    """
    limits = first_limits(spec, limits, gpu_gib) if may_keep else limits
    while True:
        resolved = resolve(spec, chosen := choose(limits))
        memory = measure(resolved)
        if memory.measured is None:
            break
        estimate = partial(_estimate, memory.measured, shape)
        fitting = limits_that_fit(spec, choose, limits, gpu_gib, estimate)
        if fitting == limits:
            break
        limits = fitting
    return FittedSettings(resolved, chosen, memory)


def _estimate(
    measured: MeasuredMemory, shape: Callable[[ResolvedSpec], TrainingShape], spec: ResolvedSpec
) -> MemoryEstimate:
    return measured_estimate(measured, shape(spec))
