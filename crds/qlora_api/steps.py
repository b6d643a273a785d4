"""Counts the optimizer steps of a run, and remarks on few.

Trainer and command line share it.
"""

from collections.abc import Iterator
from math import ceil

FEW_STEPS, VERY_FEW_STEPS = 100, 20
STEPS = "the run makes "
"""The beginning of each remark."""
_MANY_EPOCHS = 10


def optimizer_steps(sequences: int, sequences_per_step: int, epochs: int | None, max_steps: int | None) -> int:
    """Count the optimizer steps; each epoch of `sequences` ends with a smaller one."""
    return max_steps or (epochs or 1) * ceil(sequences / sequences_per_step)


def few_steps_remark(
    steps: int,
    sequences: int,
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    epochs: int | None,
    max_steps: int | None,
    gpus: int = 1,
) -> str | None:
    """Return a remark on a run of fewer than 100 steps, or None.

    `steps`: of the whole run; `sequences`: of one epoch; `gpus`: those that share the micro batches of a step.
    """
    if steps >= FEW_STEPS:
        return None
    if max_steps is not None:
        reason, remedy = f"maxSteps: {max_steps}", f"raise maxSteps to {FEW_STEPS} or more"
    else:
        passes = epochs or 1
        reason = (
            f"{passes} epoch{'s' * (passes != 1)} × {sequences} sequences / "
            f"(microBatchSize {micro_batch_size} × gradientAccumulationSteps {gradient_accumulation_steps})"
        )
        remedy = ", ".join(_changes(sequences, micro_batch_size, gradient_accumulation_steps, passes, gpus))
    effect = "an adapter learns next to nothing" if steps < VERY_FEW_STEPS else "many adapters learn too little"
    return f"{STEPS}{steps} optimizer step{'s' * (steps != 1)} ({reason}), so that {effect}: {remedy}"


def _changes(sequences: int, micro_batch_size: int, accumulation: int, epochs: int, gpus: int) -> Iterator[str]:
    """Yield settings that lead to enough steps, each with the steps of all so far."""

    def of_epoch(micro_batches: int) -> int:
        return ceil(sequences / (micro_batch_size * micro_batches))

    # Each GPU keeps the same share of a step's micro batches.
    smaller = [n for n in range(accumulation, gpus - 1, -1) if accumulation % n == 0 and n % gpus == 0]
    fewer = next((n for n in smaller if epochs * of_epoch(n) >= FEW_STEPS), smaller[-1] if smaller else accumulation)
    changed = fewer < accumulation
    if changed:
        yield f"gradientAccumulationSteps: {fewer} makes {epochs * of_epoch(fewer)}"
    # The epochs of a mix differ: by their mean, the run may seem to have enough.
    more = max(ceil(FEW_STEPS / of_epoch(fewer)), epochs + (not changed))
    if more > epochs:
        rows = ", or add rows" if more > _MANY_EPOCHS else ""
        yield f"epochs: {more} {'then' if changed else 'makes'} {more * of_epoch(fewer)}{rows}"
