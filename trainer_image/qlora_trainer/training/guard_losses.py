"""Measures a finished adapter and its base by their losses on the rows of the gate's guards."""

from collections.abc import Iterator
from math import isfinite

from qlora_trainer.core.completion import GuardRecord
from qlora_trainer.core.failures import Interrupted
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.data.prepared import PreparedDataset, guard_split, open_prepared, split_file
from qlora_trainer.evaluation.held_out import mean_loss
from qlora_trainer.model.losses.batch import Batch, read_batch
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Run, report
from qlora_trainer.training.suspect_run import divergence_failure

BaseLosses = dict[str, float]
"""The base's losses by the SHA-256 of their prepared rows, for jobs that share a base in memory."""


def measure_guards(run: Run, state: RunState, adapter_sha256: str, base_losses: BaseLosses) -> tuple[GuardRecord, ...]:
    """Return the losses of the adapter, whose file has this checksum, and of its base. Adds to `base_losses`.

    Raises Interrupted when a stop is requested, StepFailure (DIVERGED) for a loss that is not finite.
    """
    job, model, measured = run.job, run.model.eval(), []
    for guard in job.spec.guards:
        split = guard_split(guard.name)
        data, rows = open_prepared(job.data_folder, split), file_sha256(split_file(job.data_folder, split))
        if rows not in base_losses:
            with model.disable_adapter():
                base_losses[rows] = mean_loss(model.get_base_model(), _batches(run, state, data, guard.name))
        loss = mean_loss(model.get_base_model(), _batches(run, state, data, guard.name))
        if not isfinite(loss):
            raise divergence_failure(run, state, f"loss {loss} on the rows of guard {guard.name}")
        measured.append(
            GuardRecord(
                name=guard.name,
                sha256=job.prepared.guards[guard.name],
                prepared=job.prepared.fingerprint,
                adapter_sha256=adapter_sha256,
                tokens=data.target_tokens,
                base_loss=base_losses[rows],
                loss=loss,
            )
        )
    return tuple(measured)


def _batches(run: Run, state: RunState, data: PreparedDataset, guard: str) -> Iterator[Batch]:
    """The sequences one by one, whatever the micro batch is."""
    for index in range(len(data)):
        if run.runtime.stop.is_requested:
            raise Interrupted(state.step, run.progress.schedule.total_steps, run.progress.checkpoint_step or 0)
        report(run, state, f"evaluating guard {guard}")
        yield read_batch(data, (index,), run.device)
