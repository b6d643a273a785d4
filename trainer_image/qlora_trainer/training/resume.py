"""Finds where an attempt resumes: its checkpoint, the same in all ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.training.checkpoints.attempts import PodOfJob, only_attempt, recorded_attempt, reopened_attempt
from qlora_trainer.training.checkpoints.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from qlora_trainer.training.checkpoints.fingerprint import Fingerprint, reject_other_run
from qlora_trainer.training.distributed.ranks import Ranks


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
    main_fingerprint, _, main_name = ranks.broadcast_text("start", f"{fingerprint} {chosen}").partition(" ")
    if main_fingerprint != fingerprint:
        raise bad_configuration(
            f"rank {ranks.rank_info.rank} has another job, other data or other libraries than rank 0: start all "
            "processes with the same image, document and workspace"
        )
    if ranks.is_main or not main_name:
        return checkpoint
    return read_checkpoint(checkpoints / main_name)
