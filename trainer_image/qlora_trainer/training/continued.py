"""Continues another job's run: copies its newest checkpoint before a GPU is used."""

import logging
import os
from collections.abc import Collection
from pathlib import Path

from qlora_api.choice import Choice
from qlora_api.contract import WorkspaceLayout
from qlora_api.schema import replace
from qlora_trainer.core.failures import StepFailure, bad_configuration, unreachable
from qlora_trainer.core.file_names import HISTORY_FILE
from qlora_trainer.core.filesystem import atomic_file, bytes_below, require_space
from qlora_trainer.core.paths import confine, require_regular
from qlora_trainer.training.checkpoints.attempts import ATTEMPTS_FILE, Attempt, ended_attempts, write_attempts
from qlora_trainer.training.checkpoints.checkpoint import (
    copy_checkpoint,
    newest_fingerprint,
    newest_intact,
    numbered_checkpoints,
)
from qlora_trainer.training.checkpoints.fingerprint import Fingerprint, differences, settings_differences, settings_of
from qlora_trainer.training.prepared_job import PreparedJob

_BLOCK_BYTES = 2**20
logger = logging.getLogger(__name__)


def require_something_to_continue(source: Path, name: str) -> None:
    """Raise StepFailure unless the other job's folder has a checkpoint: cheap."""
    if not source.is_dir():
        raise unreachable(f"the workspace of {name} (spec.continues) is not mounted at {source}")
    if not numbered_checkpoints(_layout(source).checkpoints):
        raise _nothing_to_continue(name)


def continued_settings(
    source: Path, name: str, settings: Fingerprint, left_open: Collection[str]
) -> tuple[Choice, ...]:
    """Return the other run's values of settings that the job leaves open.

    Raises StepFailure if that run has others of those that the job sets: cheap, so early.
    """
    checkpoint = newest_fingerprint(_layout(source).checkpoints)
    if checkpoint is None:
        return ()
    _require_same(settings_differences(checkpoint[1], settings, left_open), name)
    return settings_of(checkpoint[1], left_open, f"as in {name}")


def continue_run(source: Path, name: str, job: PreparedJob) -> int | None:
    """Copy the newest intact checkpoint below `source`, with the metrics and attempts that led to it.

    Returns its step, or None if the job has a checkpoint to resume from, or is trained: then the other job may be gone.
    Raises StepFailure (BAD_CONFIGURATION) if its run is another one, naming what differs, or has no checkpoint.
    """
    workspace = job.workspace
    if newest_intact(workspace.checkpoints) is not None or job.read_train_record() is not None:
        return None
    other = _layout(source)
    checkpoint = newest_intact(other.checkpoints)
    if checkpoint is None:
        raise _nothing_to_continue(name)
    _require_same(differences(checkpoint.state.fingerprint, job.fingerprint), name)
    # The metrics up to the checkpoint: later steps are repeated.
    history, path = 0, other.report / HISTORY_FILE
    if path.exists():
        require_regular(path, other.root, HISTORY_FILE)
        history = min(checkpoint.state.history_bytes, path.stat().st_size)
    require_space(workspace.root, bytes_below(checkpoint.path) + history, f"the checkpoint of {name}")
    if history:
        with path.open("rb") as file, atomic_file(workspace.report / HISTORY_FILE) as copy:
            while history and (block := file.read(min(history, _BLOCK_BYTES))):
                copy.write(block)
                history -= len(block)
    if not (workspace.records / ATTEMPTS_FILE).exists():
        # Of no Job of this QLoRAJob: they count in the goodput, and not as attempts that got nowhere.
        earlier, path = list[Attempt](), confine(other.records, other.root) / ATTEMPTS_FILE
        if os.path.lexists(path):
            require_regular(path, other.root, ATTEMPTS_FILE)
            earlier = ended_attempts(path.parent)
        write_attempts(workspace.records, [replace(attempt, job_attempt=0) for attempt in earlier])
    # Last: with a checkpoint, everything that belongs to it is here.
    copy_checkpoint(checkpoint, workspace.checkpoints)
    logger.info("took up %s at step %d", name, checkpoint.step)
    return checkpoint.step


def _layout(source: Path) -> WorkspaceLayout:
    """The other workspace, none of whose folders is a link that leads out of it."""
    confine(source / "checkpoints", source)
    return WorkspaceLayout(source)


def _require_same(different: str, name: str) -> None:
    if different:
        raise bad_configuration(
            f"this job does not match the run of {name} (spec.continues): {different}; set the same values, or use "
            "spec.lora.from to train its adapter with other settings, data or length"
        )


def _nothing_to_continue(name: str) -> StepFailure:
    return bad_configuration(
        f"the workspace of {name} (spec.continues) has no checkpoint to continue from: that job was interrupted "
        "before the first one, has been cleaned up, or its checkpoints are damaged (see the log); create this job "
        "again without continues, or with the other's adapter in spec.lora.from"
    )
