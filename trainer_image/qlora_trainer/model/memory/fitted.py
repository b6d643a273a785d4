"""Fits chosen settings to the memory of a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from qlora_api.automatic import Choose, Limits
from qlora_api.choice import Choice
from qlora_api.kubernetes_values import amount
from qlora_api.memory.advice import verdict
from qlora_api.memory.estimate import GIB, MemoryEstimate
from qlora_api.memory.training_shape import RECOMPUTE_ALL, Recomputation, TrainingShape
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec, resolve
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.model.memory.fit import MemoryFit
from qlora_trainer.model.memory.job_memory import measured_estimate, pod_memory_for_inputs

_ENOUGH_TOKENS = 2048
"""Of a micro batch: smaller ones cost more than recomputing activations, which takes a third of the time again."""
_OFFLOADED = Recomputation(offloads=True)
_CPU_PROCESS_GIB, _CPU_FACTOR = 2, 2.5
"""Memory of a train step on a CPU beyond its model, and its share of the rest: it may compute in 32 bit."""
Estimate = Callable[[ResolvedSpec, Recomputation], MemoryEstimate]
"""The memory of a job that recomputes these blocks."""
Measure = Callable[[ResolvedSpec, Recomputation, MeasuredMemory | None], MemoryFit]
"""The same from dry runs, as far as earlier ones do not hold."""


def gib_on_cpu(memory: str | None, processes: int) -> float:
    """Return the GiB of a GPU with as much room as each process of a CPU's pod with this memory, 0 if it is not known.

    With all activations of 2,048 tokens, a step of SmolLM2-135M took 2.5 GB in bfloat16 and 4.4 GB in float32. The
    estimate is 2.1 GiB of a GPU.
    """
    return (
        0.0 if memory is None else max(0.0, (float(amount(memory)) / GIB / processes - _CPU_PROCESS_GIB) / _CPU_FACTOR)
    )


def first_limits(spec: QLoRAJobSpec, limits: Limits, gpu_gib: float | None) -> Limits:
    """Return the limits that are tried first: with all activations kept where they may fit.

    `gpu_gib`: memory of the GPU, None if it is not known.
    """
    is_open = spec.training.gradient_checkpointing is None and spec.training.sharding == "none"
    may_keep = is_open and gpu_gib is not None and limits.group_size == 1
    return replace(limits, recomputation=Recomputation(0)) if may_keep else limits


def limits_that_fit(
    spec: QLoRAJobSpec,
    choose: Choose,
    limits: Limits,
    gpu_gib: float | None,
    blocks: int,
    estimate: Estimate,
    *,
    may_offload: bool = True,
) -> Limits:
    """Limit the chosen micro batch until the run fits the GPU, or it is 1. The other settings follow it.

    Before it has fewer than 2,048 tokens, as few of the model's blocks as possible are recomputed. To count them takes
    a dry run that recomputes: for 1, which is returned first. If it does not fit with all of them, their inputs are
    held in host memory, where that has room.
    """

    def fits(resolved: ResolvedSpec, recomputation: Recomputation) -> bool:
        return gpu_gib is None or _fits(estimate(resolved, recomputation), gpu_gib)

    while not fits(resolved := resolve(spec, choose(limits)), limits.recomputation):
        recomputed, size = limits.recomputation.blocks, resolved.training.micro_batch_size
        can_halve = spec.training.micro_batch_size is None and size > 1
        is_large = size * resolved.training.max_sequence_length >= 2 * _ENOUGH_TOKENS
        if can_halve and (recomputed is None or is_large):
            limits = replace(limits, micro_batch=size // 2)
        elif recomputed == 0 and blocks > 1:
            return replace(limits, recomputation=Recomputation(1))
        elif recomputed is not None:
            some = (each for count in range(recomputed, blocks) if fits(resolved, each := Recomputation(count)))
            limits = replace(limits, recomputation=next(some, RECOMPUTE_ALL))
            if limits.recomputation.blocks is None:
                return replace(limits, micro_batch=None)
        elif may_offload and _can_offload(resolved, limits, estimate):
            limits = replace(limits, recomputation=_OFFLOADED)
        else:
            break
    return limits


def _fits(estimate: MemoryEstimate, gib: float) -> bool:
    return verdict(estimate, gib) == "fits"


def _can_offload(resolved: ResolvedSpec, limits: Limits, estimate: Estimate) -> bool:
    """Whether the pod has memory for the inputs of all blocks. It is not known unless the job or a profile sets it."""
    memory = resolved.resources.memory
    if memory is None or limits.group_size > 1 or limits.recomputation.offloads:
        return False
    both = estimate(resolved, RECOMPUTE_ALL), estimate(resolved, _OFFLOADED)
    return 0 < pod_memory_for_inputs(*both, resolved.resources.gpus) <= amount(memory)


@dataclass(frozen=True)
class FittedSettings:
    """A job whose settings are decided, and its memory with them."""

    spec: ResolvedSpec
    settings: tuple[Choice, ...]
    """The chosen values of open settings."""
    recomputation: Recomputation
    """Has effect where the spec's gradient checkpointing is on."""
    memory: MemoryFit
    recomputed_share: float
    """The share of the blocks whose activations are recomputed."""


def fit_settings(
    spec: QLoRAJobSpec,
    choose: Choose,
    limits: Limits,
    gpu_gib: float | None,
    shape: Callable[[ResolvedSpec, Recomputation], TrainingShape],
    measure: Measure,
    *,
    cpu_gib: float | None = None,
) -> FittedSettings:
    """Return the job with the chosen settings, its chosen micro batch as large as the GPU has room for.

    `measure` makes a dry run, which takes seconds: smaller micro batches are estimated from the first one. `cpu_gib`:
    room of the CPU that it is trained on, None on a GPU. There it decides whether all activations are kept, or none;
    with `gpu_gib`, which bounds the micro batch, none are.
    """
    on_gpu = cpu_gib is None
    of_cpu = cpu_gib or None if gpu_gib is None else None
    limits = first_limits(spec, limits, gpu_gib if on_gpu else of_cpu)
    measured: MeasuredMemory | None = None
    while True:
        resolved = resolve(spec, chosen := choose(limits))
        memory = measure(resolved, limits.recomputation, measured)
        if memory.measured is None:
            # Nothing is known to fit.
            limits = replace(limits, recomputation=RECOMPUTE_ALL)
            resolved = resolve(spec, chosen := choose(limits))
            break
        measured = memory.measured
        estimate = _estimate_from(measured, shape)
        if cpu_gib and limits.recomputation.blocks == 0 and not _fits(estimate(resolved, Recomputation(0)), cpu_gib):
            limits = replace(limits, recomputation=RECOMPUTE_ALL)
            continue
        blocks = measured.blocks
        fitting = limits_that_fit(spec, choose, limits, gpu_gib, blocks, estimate, may_offload=on_gpu)
        if fitting == limits:
            break
        limits = fitting
    share = shape(resolved, limits.recomputation).recomputed_share(None if measured is None else measured.blocks)
    return FittedSettings(resolved, chosen, limits.recomputation, memory, share)


def _estimate_from(measured: MeasuredMemory, shape: Callable[[ResolvedSpec, Recomputation], TrainingShape]) -> Estimate:
    return lambda spec, recomputation: measured_estimate(measured, shape(spec, recomputation))
