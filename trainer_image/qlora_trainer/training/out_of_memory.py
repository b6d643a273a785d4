"""Explains a GPU that is out of memory: its use, and the first change to make."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from qlora_api.contract import ExitCode
from qlora_api.memory.estimate import GIB, MemoryEstimate
from qlora_api.memory.training_shape import Recomputation
from qlora_api.schema import replace
from qlora_api.spec.resolved import ResolvedSpec, ResolvedTraining
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import StepFailure, is_out_of_gpu_memory
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.model.memory.fit import training_shape
from qlora_trainer.model.memory.job_memory import measured_estimate
from qlora_trainer.training.distributed.device import peak_memory_bytes

# The shares that the message lists, and the estimate's components in each; each component is in one of them.
_SHARES = {
    "base model": ("base_weights", "unquantized_weights"),
    "blocks of other GPUs": ("gathered_blocks",),
    "adapter and its gradients": ("adapters", "gradients"),
    "optimizer": ("optimizer",),
    "activations": ("checkpoints", "layer_working_set"),
    "logits": ("logits",),
    "scored answers": ("answers",),
    "CUDA": ("context",),
}


@contextmanager
def explain_shortage(
    spec: ResolvedSpec,
    target_modules: Iterable[str],
    device: Device,
    micro_batch_size: Callable[[], int],
    recomputation: Callable[[], Recomputation],
    measured: MeasuredMemory | None = None,
) -> Iterator[None]:
    """Turn an out-of-memory error into a StepFailure (GPU_OUT_OF_MEMORY) with the first change to make.

    `micro_batch_size` and `recomputation` are called when it happens: the run may have lowered or
    raised them. The estimate is from `measured`.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_gpu_memory(error):
            raise
        size, planned = micro_batch_size(), spec.training
        # The same sequences per step, in these micro batches.
        steps = -(-planned.micro_batch_size * planned.gradient_accumulation_steps // size)
        recomputing = recomputation()
        planned = replace(
            planned,
            micro_batch_size=size,
            gradient_accumulation_steps=steps,
            gradient_checkpointing=recomputing.blocks != 0,
        )
        shape = training_shape(replace(spec, training=planned), target_modules, recomputing)
        estimated = "there is no estimate"
        if measured is not None:
            estimated = f"the estimate is {_by_share(measured_estimate(measured, shape))}"
        raise StepFailure(
            ExitCode.GPU_OUT_OF_MEMORY,
            f"the GPU is out of memory at a measured peak of {peak_memory_bytes(device) / GIB:.1f} GiB with "
            f"microBatchSize {size}; {estimated}: {smaller(planned)}; checkpoints are kept",
        ) from error


def _by_share(memory: MemoryEstimate) -> str:
    sizes = {component.name: component.size for component in memory.components() if component.at_peak}
    shares = {label: sum(sizes.get(name, 0) for name in names) for label, names in _SHARES.items()}
    listed = ", ".join(f"{label} {size / GIB:.1f}" for label, size in shares.items() if size)
    return f"{memory.expected / GIB:.1f} GiB ({listed})"


def smaller(training: ResolvedTraining) -> str:
    """The first change: micro batches, gradient checkpointing, then the sequences."""
    if training.micro_batch_size > 1:
        size, half = training.micro_batch_size, training.micro_batch_size // 2
        steps = f" and gradientAccumulationSteps to {training.gradient_accumulation_steps * 2}"
        if training.batch_size is not None:
            half, steps = next(each for each in range(half, 0, -1) if size % each == 0), ""
        automatic = "" if training.auto_micro_batch else ", or spec.training.autoMicroBatch to true"
        return f"set spec.training.microBatchSize to {half}{steps}{automatic}"
    if not training.gradient_checkpointing:
        return "set spec.training.gradientCheckpointing to true"
    shorter = max(16, training.max_sequence_length // 2)
    return f"set spec.training.maxSequenceLength to {shorter}, or use a GPU with more memory"
