"""Rejects a job whose workspace holds the run of other settings, model or data, before anything is trained."""

from collections.abc import Collection
from pathlib import Path

from qlora_api.choice import Choice
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.training.checkpoints.checkpoint import newest_fingerprint
from qlora_trainer.training.checkpoints.fingerprint import Fingerprint, differences, settings_differences, settings_of


def begun_settings(checkpoints: Path, settings: Fingerprint, left_open: Collection[str]) -> tuple[Choice, ...]:
    """Return the newest checkpoint's values of settings that the job leaves open: a begun run keeps them.

    Raises StepFailure if it is of other settings than are set. Cheap, so early.
    """
    checkpoint = newest_fingerprint(checkpoints)
    if checkpoint is None:
        return ()
    reject_other_run(settings_differences(checkpoint[1], settings, left_open), checkpoint[0])
    return settings_of(checkpoint[1], left_open, "as the run has begun")


def reject_changed_run(checkpoints: Path, wanted: Fingerprint) -> None:
    """Raise StepFailure if the newest checkpoint is of another run. Cheap, so early."""
    checkpoint = newest_fingerprint(checkpoints)
    if checkpoint is not None:
        reject_other_run(differences(checkpoint[1], wanted), checkpoint[0])


def reject_other_run(different: str, checkpoint: Path) -> None:
    """Raise StepFailure with the differences of the checkpoint's run, if there are any."""
    if different:
        raise bad_configuration(
            f"{checkpoint} belongs to another run: {different}; set the earlier values to resume it, or use another "
            "workspace; `qlora run --restart` discards that run and starts over; to train its adapter for more steps "
            "or with other settings, name it in spec.lora.from"
        )
