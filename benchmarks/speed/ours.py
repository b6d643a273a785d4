"""Runs this trainer: its prepare step, then its train step under the instrument."""

from benchmarks.speed.instrument import Instrument
from benchmarks.speed.settings import (
    ALPHA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MAX_LENGTH,
    RANK,
    SEED,
    SEQUENCES_PER_STEP,
    Inputs,
)
from benchmarks.trainer import prepared_context, train_here
from qlora_trainer.core.context import StepContext


def train(inputs: Inputs, instrument: Instrument) -> tuple[list[int], list[int]]:
    """Train; returns the tokens and the rows of each step.

    Other settings have the schema's default: packing, paged 32-bit AdamW, no dropout.
    """
    training = {
        "maxSteps": instrument.total_steps,
        "microBatchSize": 1,
        "gradientAccumulationSteps": SEQUENCES_PER_STEP,
        "maxSequenceLength": MAX_LENGTH,
        "learningRate": LEARNING_RATE,
        "maxGradNorm": MAX_GRAD_NORM,
        "gradientCheckpointing": inputs.recomputes,
        # As the others: every token is trained on, and no sample generated.
        "trainOn": "all",
        "samples": 0,
        "seed": SEED,
    }
    context = prepared_context(inputs.folder, inputs.model, training, {"rank": RANK, "alpha": ALPHA})
    instrument.install()
    train_here(context)
    return useful(context)


def useful(context: StepContext) -> tuple[list[int], list[int]]:
    """Return the tokens and the rows of each step of a prepared job."""
    from qlora_trainer.core.completion import PrepareRecord, read_completion
    from qlora_trainer.data.prepared import PreparedDataset
    from qlora_trainer.training.schedule import Schedule

    prepared = read_completion(context.workspace.completion("prepare"), PrepareRecord)
    if prepared is None:
        raise AssertionError("prepare leaves its record")
    data = PreparedDataset.open(context.workspace.root / prepared.data_path, "train")
    plan = Schedule.from_training(len(data), prepared.resolve(context.spec).training, data.epoch_offsets)
    tokens, rows = [], []
    for step in range(plan.total_steps):
        sequences = [data[index] for indices in plan.micro_batches(step) for index in indices]
        tokens.append(sum(len(sequence.input_ids) for sequence in sequences))
        rows.append(sum(len(sequence.row_lengths) for sequence in sequences))
    return tokens, rows
