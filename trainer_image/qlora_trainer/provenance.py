"""Checks that what training left is of this job and of its last step: a record can be stale, copied or forged."""

from typing import get_args

from qlora_trainer.core.completion import PrepareRecord, TrainRecord
from qlora_trainer.core.context import Device, StepContext
from qlora_trainer.core.failures import unsafe_artefact
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.training.fingerprint import digest, run_fingerprint
from qlora_trainer.training.schedule import Plan


def require_own_training(context: StepContext, prepared: PrepareRecord, trained: TrainRecord) -> None:
    """Raise StepFailure (UNSAFE_ARTEFACT) unless the record of training is of this spec, data and number of steps."""
    path = context.workspace.completion("train")
    # Publish runs without a GPU and need not know what training ran on.
    fingerprints = {
        digest(run_fingerprint(context.spec, prepared, device, trained.ranks)) for device in get_args(Device)
    }
    if trained.fingerprint not in fingerprints:
        raise unsafe_artefact(
            f"{path} is of another run: model, data, settings or versions differ from this job's, so its adapter "
            "is not published; create the job again, with one version of the trainer from its start to its end"
        )
    sequences = len(PreparedDataset.open(context.workspace.root / prepared.data_path, "train"))
    planned = Plan.of(sequences, context.spec.training).total_steps
    if trained.training_step != planned:
        raise unsafe_artefact(
            f"{path} says {trained.training_step} optimizer steps, but this job has {planned}: an adapter that is not "
            "trained to the end is not published; delete the file and run the train step again"
        )
