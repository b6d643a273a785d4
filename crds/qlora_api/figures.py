"""Turns the trainer's records into the figures of a status.

All functions are pure.
"""

from collections.abc import Collection

from qlora_api.artifact_status import ReportStatus
from qlora_api.contract import REPORT_FILE, ProgressRecord, ResultRecord, nine_digits
from qlora_api.duration import format_duration
from qlora_api.loss_history import with_losses
from qlora_api.schema import replace, replace_known
from qlora_api.spec.output import SERVED_TRACKERS, TrackedRun, TrackingStatus
from qlora_api.status import CheckpointStatus, EvaluationStatus, ProgressStatus, QLoRAJobStatus

_DECIMALS = 4
"""Of the figures that are only shown."""
_NOTHING_SAID = "the trainer of this run says nothing of it: it may be of an earlier release, which uploads no run"


def with_progress(status: QLoRAJobStatus, record: ProgressRecord) -> QLoRAJobStatus:
    """Add the latest progress, and keep the fields that the record lacks."""
    if record.step != "train":
        if record.step != "prepare" or not record.activity:
            return status
        return replace(status, progress=ProgressStatus(summary=record.activity, updated_at=record.time))
    progress = status.progress or ProgressStatus()
    if not record.total_steps and record.activity:
        # It waits for other nodes, and has not read yet how far the run is.
        progress = _with_time_left(progress, None)
        return replace(status, progress=replace(progress, summary=record.activity, updated_at=record.time))
    progress = replace_known(
        _with_measures(progress, record),
        learning_rate=record.learning_rate,
        tokens_per_second=record.tokens_per_second,
        micro_batch_size=record.micro_batch_size,
        epoch=round(record.epoch, _DECIMALS),
        updated_at=record.time,
    )
    progress = _with_steps(progress, record.training_step, record.total_steps)
    history = with_losses(status.history, record.training_step, record.loss, record.eval_loss)
    status = replace(status, progress=_with_time_left(progress, record.remaining_seconds), history=history)
    if record.checkpoint_step is None or record.checkpoint_time is None:
        return status
    return replace(status, checkpoint=CheckpointStatus(step=record.checkpoint_step, saved_at=record.checkpoint_time))


def _with_measures(progress: ProgressStatus, record: ProgressRecord | ResultRecord) -> ProgressStatus:
    """Add the record's measures, those of an objective that compares answers too."""
    return replace_known(
        progress,
        loss=_rounded(record.loss),
        eval_loss=None if record.eval_loss is None else nine_digits(record.eval_loss),
        peak_memory_bytes=record.peak_memory_bytes,
        goodput=record.goodput,
        evaluations=_evaluations(record),
        reward_margin=_rounded(record.reward_margin),
        accuracy=_rounded(record.accuracy),
        eval_accuracy=_rounded(record.eval_accuracy),
    )


def _evaluations(record: ProgressRecord | ResultRecord) -> tuple[EvaluationStatus, ...] | None:
    """Those at the rungs of the job's sweep."""
    if record.evaluations is None:
        return None
    return tuple(EvaluationStatus(step=step, eval_loss=nine_digits(loss)) for step, loss in record.evaluations)


def with_known_facts(status: QLoRAJobStatus, record: ResultRecord) -> QLoRAJobStatus:
    """Add a step's report on memory, data, model and gate.

    A failed step may have one too.
    """
    return replace_known(
        status,
        memory=record.memory,
        dataset=record.dataset,
        base=record.base,
        settings=record.settings or None,
        gate=record.gate,
        model_revision=record.model_revision,
    )


def with_publication(status: QLoRAJobStatus, record: ResultRecord, report_to: Collection[str]) -> QLoRAJobStatus:
    """Add publish's results, trackers included.

    `report_to`: the trackers that the job names.
    """
    report = None
    if record.adapter is not None and record.report_sha256 is not None:
        report = ReportStatus(uri=f"{record.adapter.uri}/{REPORT_FILE}", sha256=record.report_sha256)
    return replace(status, report=report, tracking=_tracking(status, record, report_to))


def _tracking(status: QLoRAJobStatus, record: ResultRecord, report_to: Collection[str]) -> TrackingStatus | None:
    """Return the upload's result for each server of the job and its profile, or None.

    A trainer of an earlier release reports nothing about a server that it does not support.
    """
    servers = status.resolved.profile.tracking if status.resolved is not None else None
    silent: dict[str, TrackedRun] = {
        name: TrackedRun(message=_NOTHING_SAID)
        for name in SERVED_TRACKERS
        if name in report_to
        and getattr(servers, name, None) is not None
        and getattr(record.tracking, name, None) is None
    }
    return replace(record.tracking or TrackingStatus(), **silent) if silent else record.tracking


def with_training_facts(status: QLoRAJobStatus, record: ResultRecord) -> QLoRAJobStatus:
    """Add the final figures of training, which may be missing from the log."""
    progress, step = _with_measures(status.progress or ProgressStatus(), record), record.training_step
    if step:
        progress = _with_steps(progress, step, record.total_steps or step, ended=record.outcome == "succeeded")
        status = replace(status, history=with_losses(status.history, step, record.loss, record.eval_loss))
    outcome = record.message if (record.step, record.outcome) == ("train", "succeeded") else progress.outcome
    status = replace(status, progress=_with_time_left(replace(progress, outcome=outcome), None))
    if status.memory is not None and record.peak_memory_bytes is not None:
        status = replace(status, memory=replace(status.memory, peak_bytes=record.peak_memory_bytes))
    return with_saved_step(status, record)


def with_saved_step(status: QLoRAJobStatus, record: ResultRecord) -> QLoRAJobStatus:
    """Add the checkpoint that train saves before it reports success or interruption."""
    step = record.training_step
    if record.step != "train" or record.outcome == "failed" or not step:
        return status
    if status.checkpoint is not None and status.checkpoint.step == step:
        return status
    return replace(status, checkpoint=CheckpointStatus(step=step, saved_at=record.time))


def without_remaining(status: QLoRAJobStatus) -> QLoRAJobStatus:
    """The status without the remaining time, for a job that does not run."""
    progress = status.progress
    if progress is None or (not progress.remaining and progress.remaining_seconds is None):
        return status
    return replace(status, progress=_with_time_left(progress, None))


def _with_time_left(progress: ProgressStatus, seconds: float | None) -> ProgressStatus:
    """Set the time left for users and for programs, or neither without one."""
    if seconds is None:
        return replace(progress, remaining="", remaining_seconds=None)
    return replace(progress, remaining=format_duration(seconds), remaining_seconds=int(seconds))


def _with_steps(progress: ProgressStatus, step: int, total: int, *, ended: bool = False) -> ProgressStatus:
    """Set the progress of a run; one that was stopped early is complete."""
    if ended and step < total:
        return replace(progress, step=step, total_steps=total, percent=100, summary=f"stopped early {step}/{total}")
    percent = min(100, 100 * step // total) if total else 0
    return replace(progress, step=step, total_steps=total, percent=percent, summary=f"{percent}% {step}/{total}")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DECIMALS)


def short_loss(loss: float | None) -> float | None:
    """Round the loss to five significant digits for users, and keep None."""
    return None if loss is None else float(f"{loss:.5g}")
