"""Fits chosen settings to the memory of a GPU."""

from collections.abc import Callable, Sequence

from qlora_api.automatic import smaller_micro_batch
from qlora_api.choice import Choice
from qlora_api.memory.advice import verdict
from qlora_api.memory.estimate import MemoryEstimate
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec, resolve


def settings_that_fit(
    spec: QLoRAJobSpec,
    settings: Sequence[Choice],
    gpu_gib: float | None,
    estimate: Callable[[ResolvedSpec], MemoryEstimate],
) -> tuple[Choice, ...]:
    """Divide the chosen micro batch until the run fits the GPU, or it is 1.

    `gpu_gib`: memory of the GPU, None if it is not known.
    """
    chosen = tuple(settings)
    if spec.training.micro_batch_size is not None or gpu_gib is None:
        return chosen
    while (resolved := resolve(spec, chosen)).training.micro_batch_size > 1:
        if verdict(estimate(resolved), gpu_gib) == "fits":
            break
        chosen = smaller_micro_batch(chosen, gpu_gib)
    return chosen
