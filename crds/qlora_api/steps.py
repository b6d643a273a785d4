"""Counts the optimizer steps of a run, and remarks on few steps and evaluations.

Trainer and command line share it.
"""

from collections.abc import Iterator
from math import ceil

from qlora_api.spec.resolved import ResolvedTraining

FEW_STEPS, VERY_FEW_STEPS = 100, 20
STEPS, EVALUATIONS = "the run makes ", "spec.training.evalEverySteps"
"""The beginnings of the remarks."""
_MANY_EPOCHS = 10


def optimizer_steps(sequences: int, sequences_per_step: int, epochs: int | None, max_steps: int | None) -> int:
    """Count the optimizer steps; each epoch of `sequences` ends with a smaller one."""
    return max_steps or (epochs or 1) * ceil(sequences / sequences_per_step)


def remarks_on_steps(training: ResolvedTraining, steps: int, sequences: int, gpus: int) -> tuple[str, ...]:
    """Return remarks on few optimizer steps and evaluations. The arguments are those of `few_steps_remark`."""
    found = (few_steps_remark(training, steps, sequences, gpus), too_few_evaluations(training, steps))
    return tuple(remark for remark in found if remark is not None)


def few_steps_remark(training: ResolvedTraining, steps: int, sequences: int, gpus: int) -> str | None:
    """Return a remark on a run of fewer than 100 steps, or None.

    `steps`: of the whole run; `sequences`: of one epoch; `gpus`: those that share the micro batches of a step.
    """
    if steps >= FEW_STEPS:
        return None
    if training.max_steps is not None:
        reason, remedy = f"maxSteps: {training.max_steps}", f"maxSteps: {FEW_STEPS} or more makes enough"
    else:
        passes = training.epochs or 1
        reason = f"{passes} epoch{'s' * (passes != 1)} × {sequences} sequences / {batch_text(training)}"
        remedy = ", ".join(_changes(training, sequences, gpus))
    effect = "most adapters learn next to nothing" if steps < VERY_FEW_STEPS else "many adapters learn too little"
    # Another run: this one may have begun, and keeps its settings then.
    return f"{STEPS}{steps} optimizer step{'s' * (steps != 1)} ({reason}), so that {effect}: a run with {remedy}"


def batch_text(training: ResolvedTraining) -> str:
    """Format the sequences of a step, by the settings that they follow from."""
    if training.batch_size is not None:
        return f"batchSize {training.batch_size}"
    accumulation = training.gradient_accumulation_steps
    return f"(microBatchSize {training.micro_batch_size} × gradientAccumulationSteps {accumulation})"


def _changes(training: ResolvedTraining, sequences: int, gpus: int) -> Iterator[str]:
    """Yield settings that lead to enough steps, each with the steps of all so far."""
    epochs, batch_size = training.epochs or 1, training.batch_size
    name, size, accumulation = "batchSize", 1, batch_size or 1
    if batch_size is None:
        size, accumulation = training.micro_batch_size, training.gradient_accumulation_steps
        name = "gradientAccumulationSteps"

    def of_epoch(micro_batches: int) -> int:
        return ceil(sequences / (size * micro_batches))

    # Each GPU keeps the same share of a step's micro batches.
    smaller = [n for n in range(accumulation, gpus - 1, -1) if accumulation % n == 0 and n % gpus == 0]
    fewer = next((n for n in smaller if epochs * of_epoch(n) >= FEW_STEPS), smaller[-1] if smaller else accumulation)
    changed = fewer < accumulation
    if changed:
        yield f"{name}: {fewer} makes {epochs * of_epoch(fewer)}"
    # The epochs of a mix differ: by their mean, the run may seem to have enough.
    more = max(ceil(FEW_STEPS / of_epoch(fewer)), epochs + (not changed))
    if more > epochs:
        rows = ", or add rows" if more > _MANY_EPOCHS else ""
        yield f"epochs: {more} {'then' if changed else 'makes'} {more * of_epoch(fewer)}{rows}"


def too_few_evaluations(training: ResolvedTraining, total_steps: int) -> str | None:
    """A remark for the user on a run of `total_steps` steps whose settings need more evaluations, or None.

    The run is evaluated at its start and its end in any case. The remark begins with the name of the setting.
    """
    every, stopping = training.eval_every_steps, training.early_stopping
    if every is None:
        return None
    between, without_effect = (total_steps - 1) // every, []
    if training.keep == "best" and not between:
        without_effect.append("keep: best has only the last adapter to choose from")
    if stopping is not None and between < stopping.patience:
        without_effect.append(f"earlyStopping with patience {stopping.patience} ends nothing early")
    if not without_effect:
        return None
    found = f"{between or 'no'} evaluation{'' if between == 1 else 's'}"
    return (
        f"{EVALUATIONS} is {every} and the run has {total_steps} steps, with {found} between its start and its end: "
        f"{' and '.join(without_effect)}; a run with a lower evalEverySteps has more"
    )
