"""Shows the course of a job: events, checkpoints and the file of results, from its status alone."""

import csv
import hashlib
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

from qlora_door.job import CHECKPOINT_PREFIX, PREFIX, Job, seconds

_RESULT_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_SHOWN = ("Prepared", "Succeeded", "Failed", "Suspended")


class Losses(NamedTuple):
    """Losses of one optimizer step; None if they were not measured."""

    step: int
    train_loss: float | None
    valid_loss: float | None


def losses_of(job: Job) -> list[Losses]:
    """Return the points of the job's history, by step."""
    rows = csv.DictReader((job.status.history or "").splitlines())
    return [Losses(int(row["step"]), _number(row["train_loss"]), _number(row["valid_loss"])) for row in rows]


def _number(text: str) -> float | None:
    return float(text) if text else None


def results_of(job: Job) -> str:
    """Return the file of results, in the columns of OpenAI's. Accuracies are not measured."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_RESULT_COLUMNS)
    table.writerows((each.step, _text(each.train_loss), "", _text(each.valid_loss), "") for each in losses_of(job))
    return text.getvalue()


def _text(loss: float | None) -> str:
    return "" if loss is None else str(loss)


def events_of(job: Job) -> list[dict[str, Any]]:
    """Return the job's events, the newest first."""
    found = [_event(job, job.created_at, "info", f"Created fine-tuning job: {job.name}")]
    for condition in job.status.conditions:
        if condition.type in _SHOWN and condition.status == "True" and condition.message:
            level = "error" if condition.type == "Failed" else "info"
            found.append(_event(job, seconds(condition.last_transition_time) or 0, level, condition.message))
    found += _metrics(job)
    # By time, as they were found within a second: ids are no order.
    return [event for _, event in sorted(enumerate(found), key=lambda each: (each[1]["created_at"], each[0]))][::-1]


def _metrics(job: Job) -> Iterator[dict[str, Any]]:
    points, total = losses_of(job), job.status.progress.total_steps if job.status.progress else 0
    began, ended = _span(job)
    last = points[-1].step if points else 0
    for point in points:
        # The history has no times: steps take about the same.
        time = round(began + (ended - began) * point.step / max(last, 1))
        values = [f"training loss={point.train_loss:.2f}"] if point.train_loss is not None else []
        values += [f"validation loss={point.valid_loss:.2f}"] if point.valid_loss is not None else []
        data = {"step": point.step, "total_steps": total, **point._asdict()}
        message = f"Step {point.step}/{total}: {', '.join(values)}"
        yield _event(job, time, "info", message, {name: each for name, each in data.items() if each is not None})


def _span(job: Job) -> tuple[int, int]:
    """When the first and the last step of the history ended, about."""
    prepared = next((each for each in job.status.conditions if each.type == "Prepared"), None)
    began = seconds(prepared.last_transition_time) if prepared else None
    progress = job.status.progress
    ended = seconds(progress.updated_at if progress else None) or seconds(job.status.completion_time)
    began = began or job.created_at
    return began, max(began, ended or began)


def _event(job: Job, time: int, level: str, message: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    # Stable while the job runs: neither time nor total of a step are.
    known = f"{job.name} {data['step'] if data else f'{time} {message}'}"
    return {
        "id": f"ftevent-{hashlib.sha256(known.encode()).hexdigest()[:24]}",
        "object": "fine_tuning.job.event",
        "created_at": time,
        "level": level,
        "message": message,
        "type": "metrics" if data else "message",
        "data": data or {},
    }


def checkpoints_of(job: Job) -> list[dict[str, Any]]:
    """Return the one checkpoint that is a usable model: the finished adapter."""
    model, progress = job.fine_tuned_model, job.status.progress
    if model is None or progress is None:
        return []
    adapter = job.status.adapter
    step = (adapter.step if adapter else None) or progress.step
    metrics = {"step": float(step), "train_loss": progress.loss, "full_valid_loss": progress.eval_loss}
    checkpoint = {
        "id": CHECKPOINT_PREFIX + job.name.removeprefix(PREFIX),
        "object": "fine_tuning.job.checkpoint",
        "created_at": job.finished_at or job.created_at,
        "fine_tuning_job_id": job.name,
        "fine_tuned_model_checkpoint": model,
        "step_number": step,
        "metrics": {name: value for name, value in metrics.items() if value is not None},
    }
    return [checkpoint]
