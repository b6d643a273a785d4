"""Plans the QLoRAJob that publishes a sweep's best adapter (`publish: best`).

It is created once, when all cells have ended, and continues the run of the cell that is the best then.
"""

from collections.abc import Mapping, Sequence

from qlora_api.schema import replace
from qlora_api.status import MAX_SHORT_TEXT_LENGTH
from qlora_api.sweep.cells import best_job, best_job_name
from qlora_api.sweep.spec import Cell
from qlora_api.sweep.status import CellStatus, PublishedCell, QLoRASweepStatus
from qlora_operator.decisions.observed.conditions import truncate
from qlora_operator.decisions.observed.objects import Reason
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep

ENDED = frozenset({"Succeeded", "Failed", "Stopped", "Deleted"})
"""Phases of a cell that holds no place among those that run at the same time."""


def publishing_job(sweep: QLoRASweep, jobs: Mapping[str, CellJob]) -> CellJob | None:
    """The job that publishes the best adapter, if it exists."""
    return jobs.get(best_job_name(sweep.name)) if sweep.spec.publish == "best" else None


def published(sweep: QLoRASweep, lines: Sequence[CellStatus], jobs: Mapping[str, CellJob]) -> PublishedCell | None:
    """Return the state of the publishing job.

    Returns None before it exists, or without `publish: best`.
    """
    job, before = publishing_job(sweep, jobs), sweep.status.published
    if job is not None and job.continues not in jobs and not job.started and job.phase not in ENDED:
        return _without_run(sweep, job.continues)
    if job is not None:
        waits = job.waits or Reason(job.reason, "")
        return PublishedCell(
            name=job.name,
            cell=job.continues,
            phase=job.phase,
            uid=job.uid,
            gpu_seconds=job.gpu_seconds,
            lost_gpu_seconds=job.lost_gpu_seconds,
            cost=job.cost,
            adapter=job.adapter,
            sha256=job.sha256,
            reason=waits.word,
            message=truncate(waits.sentence, MAX_SHORT_TEXT_LENGTH),
        )
    if before is not None and before.uid:
        return before if before.phase in ENDED else replace(before, phase="Deleted")
    best = _best_at_the_end(sweep, lines, jobs)
    if best is not None and best not in jobs:
        return _without_run(sweep, best)
    return None


def _without_run(sweep: QLoRASweep, cell: str) -> PublishedCell:
    """Report a lost checkpoint: only the cell's deleted QLoRAJob located it."""
    return PublishedCell(name=best_job_name(sweep.name), cell=cell, phase="Deleted", uid="")


def cells_to_publish(sweep: QLoRASweep) -> list[str]:
    """Return the known cells whose QLoRAJobs the publication still needs."""
    found = sweep.status.published
    if sweep.spec.publish != "best" or (found is not None and found.phase == "Succeeded"):
        return []
    if found is not None and found.uid:
        return [found.cell]
    # No job could be created, or it could not start: the best may be another cell by now.
    return [
        line.name for line in sweep.status.cells if line.rank == 1 or (found is not None and line.name == found.cell)
    ]


def job_to_publish(
    sweep: QLoRASweep, cells: Sequence[Cell], lines: Sequence[CellStatus], jobs: Mapping[str, CellJob]
) -> Cell | None:
    """Build the job that publishes the best adapter.

    Returns None if it exists, or is not due. Raises ValueError if the current spec of the best cell cannot be read.
    """
    if published(sweep, lines, jobs) is not None:
        return None
    best = _best_at_the_end(sweep, lines, jobs)
    if best is None:
        return None
    winner = jobs[best]
    return next(best_job(sweep.name, sweep.spec, cell, winner.spec, winner.run) for cell in cells if cell.name == best)


def _best_at_the_end(sweep: QLoRASweep, lines: Sequence[CellStatus], jobs: Mapping[str, CellJob]) -> str | None:
    """Return the best cell of a sweep that publishes it, once all have ended.

    Returns None before, or if none has succeeded.
    """
    if sweep.spec.publish != "best" or any(line.phase not in ENDED for line in lines):
        return None
    if any(job.retried for job in jobs.values()):
        return None
    return next((line.name for line in lines if line.rank == 1), None)


def cells_to_clean(sweep: QLoRASweep, jobs: Mapping[str, CellJob]) -> list[CellJob]:
    """Return the cells to clean up once the best adapter is published."""
    job = publishing_job(sweep, jobs)
    if job is None or job.phase != "Succeeded" or sweep.spec.template.spec.cleanup_after_seconds is None:
        return []
    ended = ("Succeeded", "Failed")
    return [
        cell for cell in jobs.values() if cell is not job and cell.phase in ended and cell.cleanup_after_seconds is None
    ]


def waits_for_publication(sweep: QLoRASweep, status: QLoRASweepStatus) -> bool:
    """Whether a sweep with ended cells still waits to publish its best adapter."""
    if sweep.spec.publish != "best" or status.best is None:
        return False
    return status.published is None or status.published.phase not in ENDED


def not_published(status: QLoRASweepStatus) -> Reason | None:
    """Return why an ended sweep has failed although it has a best adapter.

    Returns None if the adapter is published as requested.
    """
    found = status.published
    if found is None or found.phase == "Succeeded":
        return None
    if found.phase == "Failed":
        sentence = (
            f"QLoRAJob {found.name}, which publishes the adapter of {found.cell}, has failed ({found.reason}): its "
            "condition Failed reports why, and its spec.retry.request retries it"
        )
    elif found.uid:
        sentence = (
            f"QLoRAJob {found.name}, which publishes the adapter of {found.cell}, was deleted before its end: create a "
            f"QLoRAJob with the spec of {found.cell}, the template's output and continues: {found.cell}"
        )
    else:
        sentence = (
            f"{found.cell} has the best adapter, and its QLoRAJob was deleted, so that its run cannot be taken up to "
            "publish it: the adapter is in the workspace, at status.best.adapter"
        )
    return Reason("BestNotPublished", sentence)
