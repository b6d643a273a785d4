"""Resumes an attempt: agrees on a checkpoint with all ranks, and restores the run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from qlora_api.contract import WorkspaceLayout
from qlora_api.printable import first_line
from qlora_trainer.core.failures import bad_configuration, damaged
from qlora_trainer.model.adapter.attach import restore_adapter
from qlora_trainer.training.checkpoints.attempts import PodOfJob, only_attempt, recorded_attempt, reopened_attempt
from qlora_trainer.training.checkpoints.best_adapter import best_of
from qlora_trainer.training.checkpoints.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from qlora_trainer.training.checkpoints.fingerprint import Fingerprint, reject_other_run
from qlora_trainer.training.distributed.device import processor
from qlora_trainer.training.distributed.ranks import Ranks
from qlora_trainer.training.optimizer import restore_optimizer
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Run

logger = logging.getLogger(__name__)


@contextmanager
def resumed_attempt(
    workspace: WorkspaceLayout,
    fingerprint: Fingerprint,
    pod: PodOfJob,
    now: Callable[[], datetime],
) -> Iterator[Checkpoint | None]:
    """Run the body as the workspace's only attempt, with the checkpoint that it resumes from, or None.

    Raises StepFailure: UNREACHABLE while another attempt runs, BAD_CONFIGURATION if the checkpoint is of another run,
    RETRIES_EXHAUSTED after too many attempts that were killed at this checkpoint.
    """
    with only_attempt(workspace.records):
        checkpoint = newest_checkpoint(workspace.checkpoints)
        if checkpoint is not None:
            reject_other_run(checkpoint.state.fingerprint, fingerprint, checkpoint.path)
        from_step = 0 if checkpoint is None else checkpoint.step
        with recorded_attempt(workspace.records, from_step, pod, now):
            yield checkpoint


@contextmanager
def reopened(workspace: WorkspaceLayout, pod_uid: str, now: Callable[[], datetime]) -> Iterator[None]:
    """Run the body as what is left of this pod's attempt, which has ended, and alone in the workspace.

    Raises StepFailure (UNREACHABLE) while another attempt runs.
    """
    with only_attempt(workspace.records), reopened_attempt(workspace.records, pod_uid, now):
        yield


def agreed_checkpoint(
    ranks: Ranks, fingerprint: str, checkpoint: Checkpoint | None, checkpoints: Path
) -> Checkpoint | None:
    """The checkpoint that the main process has chosen. It passes it as `checkpoint`, and others read it.

    Raises StepFailure (BAD_CONFIGURATION) if this rank's fingerprint differs: it would compute another run.
    """
    chosen = "" if checkpoint is None else checkpoint.path.name
    main_fingerprint, _, main_name = ranks.from_main("start", f"{fingerprint} {chosen}").partition(" ")
    if main_fingerprint != fingerprint:
        raise bad_configuration(
            f"rank {ranks.rank_info.rank} has another job, other data or other libraries than rank 0: start all "
            "processes with the same image, document and workspace"
        )
    if ranks.main or not main_name:
        return checkpoint
    return read_checkpoint(checkpoints / main_name)


def restore(run: Run, checkpoint: Checkpoint) -> RunState:
    """Put the model, the optimizer and the schedule into the state that the checkpoint saved, which is returned.

    There is no random state to restore: each step has a seed. Raises StepFailure if it is of another adapter.
    """
    try:
        restore_adapter(run.model, checkpoint.tensors("adapter"))
        restore_optimizer(run.optimizer, run.parameters, checkpoint.tensors("optimizer"))
        run.objective.restore(checkpoint.tensors("objective") if checkpoint.has("objective") else {})
    except KeyError as error:
        raise damaged(
            f"{checkpoint.path} does not fit the job ({first_line(error)}): delete that folder, and the job resumes "
            "from the checkpoint before it, or from its first step"
        ) from error
    before, here = checkpoint.state.processor, processor(run.context.device)
    if before != here:
        logger.warning(
            "%s was made on %s, this is %s: the adapter may differ in its last digits", checkpoint.path, before, here
        )
    run.checkpoint_step, run.checkpoint_time = checkpoint.step, checkpoint.state.saved_at
    run.best = best_of(checkpoint)
    state = checkpoint.state.run
    if state.micro_batch_size is not None:
        run.schedule = run.schedule.with_micro_batch_size(state.micro_batch_size)
    return state
