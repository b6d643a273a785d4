"""Decides a sweep's next actions and status from the current state of its cells."""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime

from qlora_api.contract import SWEEP_REPORT, ExitCode
from qlora_api.figures import short_loss
from qlora_api.forecast import sum_of_costs
from qlora_api.schema import replace
from qlora_api.status import MAX_SHORT_TEXT_LENGTH
from qlora_api.sweep.halving import HalvingSpec
from qlora_api.sweep.spec import Cell, pods
from qlora_api.sweep.status import (
    BestCell,
    CellStatus,
    PublishedCell,
    QLoRASweepStatus,
    SweepPhase,
    SweepPodStatus,
    SweepUsage,
)
from qlora_operator.decisions.observed.conditions import ConditionType, Value, truncate, with_condition
from qlora_operator.decisions.observed.objects import Reason, format_time
from qlora_operator.decisions.sweeps.best_cell import (
    ENDED,
    cells_to_clean,
    job_to_publish,
    not_published,
    publishing_job,
    waits_for_publication,
)
from qlora_operator.decisions.sweeps.halving import NOT_AMONG_BEST, is_to_be_stopped, judged, lost_rung, why_stopped
from qlora_operator.decisions.sweeps.reasons import reason_of_all, reason_of_the_best, reason_to_continue
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep, StoredSweep

_FAILED_WITH_CURVES = (ExitCode.GATE_FAILED.reason, ExitCode.DIVERGED.reason)


@dataclass(frozen=True, slots=True)
class CreateCell:
    """Create the QLoRAJob of the cell, after the sweep's claim if it has one."""

    cell: Cell
    cells_in_pod: int = 1
    """How many cells one pod trains, this one among them."""


@dataclass(frozen=True, slots=True)
class SetSuspend:
    """Suspend a cell, or resume one that the sweep has suspended."""

    cell: CellJob
    suspend: bool


@dataclass(frozen=True, slots=True)
class StopCell:
    """Suspend a cell for good, because it has lost a rung of spec.halving."""

    cell: CellJob
    why: str


@dataclass(frozen=True, slots=True)
class SetCleanup:
    """Set the template's clean-up on a cell."""

    cell: CellJob
    seconds: int


Action = CreateCell | SetSuspend | StopCell | SetCleanup


def table(sweep: QLoRASweep, cells: Sequence[Cell], jobs: Mapping[str, CellJob]) -> tuple[CellStatus, ...]:
    """Build a line for each cell, from its QLoRAJob or else the stored line.

    Each has the verdicts of all rungs that the cell has reached.
    """
    before, halving = {line.name: line for line in sweep.status.cells}, sweep.spec.halving
    found = [_line(cell, jobs.get(cell.name), before.get(cell.name)) for cell in cells]
    lines = [_with_reason(line, jobs.get(line.name), halving) for line in judged(found, jobs, halving)]
    return _ranked(lines, by_score=sweep.spec.best == "score") if sweep.spec.select == "best" else tuple(lines)


def _line(cell: Cell, job: CellJob | None, before: CellStatus | None) -> CellStatus:
    overrides = truncate(cell.overrides.text(), MAX_SHORT_TEXT_LENGTH)
    if job is not None:
        waits = job.waits or Reason(job.reason, "")
        return CellStatus(
            name=cell.name,
            overrides=overrides,
            phase="Stopped" if job.rests else job.phase,
            uid=job.uid,
            progress=job.progress,
            loss=job.loss,
            eval_loss=job.eval_loss,
            score=job.score,
            gpu_seconds=job.gpu_seconds,
            lost_gpu_seconds=job.lost_gpu_seconds,
            cost=job.cost,
            adapter=job.adapter,
            sha256=job.sha256,
            reason=waits.word,
            message=truncate(waits.sentence, MAX_SHORT_TEXT_LENGTH),
            rungs=before.rungs if before is not None else None,
        )
    if before is None or not before.uid:
        return CellStatus(name=cell.name, overrides=overrides)
    # An ended cell keeps its line: its adapter still exists.
    return before if before.phase in ENDED else replace(before, phase="Deleted", progress="", reason="", message="")


def _with_reason(line: CellStatus, job: CellJob | None, halving: HalvingSpec | None) -> CellStatus:
    """Add why the cell was stopped, or is being, unless its user has resumed it since."""
    if job is None or not (job.rests or is_to_be_stopped(line, job) or (job.stopped_by_sweep and job.suspend)):
        return line
    return replace(line, reason=NOT_AMONG_BEST, message=truncate(why_stopped(line, halving), MAX_SHORT_TEXT_LENGTH))


def _ranked(lines: Sequence[CellStatus], *, by_score: bool) -> tuple[CellStatus, ...]:
    """Rank the cells that have succeeded, equal ones in their order."""

    def key(line: CellStatus) -> tuple[float, float]:
        loss = math.inf if line.eval_loss is None else line.eval_loss
        return (-(line.score or 0.0), loss) if by_score else (loss, 0.0)

    done = [line for line in lines if line.phase == "Succeeded" and line.adapter]
    done = [line for line in done if (line.score if by_score else line.eval_loss) is not None]
    places = {line.name: place for place, line in enumerate(sorted(done, key=key), 1)}
    return tuple(replace(line, rank=places.get(line.name)) for line in lines)


def plan(
    sweep: QLoRASweep,
    cells: Sequence[Cell],
    jobs: Mapping[str, CellJob],
    objection: Reason | None,
) -> Iterator[Action]:
    """Plan the actions. A deleted cell, in the stored table, is not created again.

    Raises ValueError if the spec of the best cell, whose adapter the sweep publishes, cannot be read.
    """
    alive = [job for cell in cells if (job := jobs.get(cell.name)) is not None and not _has_ended(job)]
    publishing = publishing_job(sweep, jobs)
    lost = {line.name: line for line in sweep.status.cells if lost_rung(line) is not None}
    losers = [job for job in alive if job.name in lost and is_to_be_stopped(lost[job.name], job)]
    yield from (StopCell(job, why_stopped(lost[job.name], sweep.spec.halving)) for job in losers)
    others = [job for job in alive if job not in losers]
    others += [publishing] if publishing is not None and not _has_ended(publishing) else []
    seconds = sweep.spec.template.spec.cleanup_after_seconds
    if seconds is not None:
        yield from (SetCleanup(job, seconds) for job in cells_to_clean(sweep, jobs))
    if sweep.spec.suspend:
        yield from (SetSuspend(job, True) for job in others if not job.suspend)
        return
    # Also one that its user has resumed since: with the mark, a suspension of the user's would be taken back later.
    yield from (SetSuspend(job, False) for job in others if job.suspended_by_sweep)
    if objection is not None:
        return
    created = {line.name for line in sweep.status.cells if line.uid} | jobs.keys()
    yield from _cells_to_create(sweep, cells, created, {job.name for job in alive})
    if (best := job_to_publish(sweep, cells, table(sweep, cells, jobs), jobs)) is not None:
        yield CreateCell(best)


def _cells_to_create(
    sweep: QLoRASweep, cells: Sequence[Cell], created: Set[str], alive: Set[str]
) -> Iterator[CreateCell]:
    """Return the missing cells of running pods, and all of more pods up to the limit."""
    places = sweep.spec.parallelism
    fresh: list[list[CreateCell]] = []
    for pod in pods(sweep.spec, cells):
        missing = [CreateCell(cell, len(pod)) for cell in pod if cell.name not in created]
        if any(cell.name in alive for cell in pod):
            places -= 1
            yield from missing
        elif missing:
            fresh.append(missing)
    for missing in fresh[: max(0, places)]:
        yield from missing


def next_status(
    sweep: QLoRASweep,
    lines: tuple[CellStatus, ...],
    objection: Reason | None,
    blocked: Reason | None,
    now: datetime,
    published: PublishedCell | None = None,
    pods: tuple[SweepPodStatus, ...] = (),
) -> QLoRASweepStatus:
    """Compute the next status, equal to the stored one if nothing has changed.

    `objection`: why no cell may be created. `blocked`: why the planned actions could not be done.
    """
    ended = sum(line.phase in ENDED for line in lines)
    succeeded = sum(line.phase == "Succeeded" for line in lines)
    stopped = sum(line.phase == "Stopped" for line in lines)
    pending = sum(not line.uid for line in lines)
    best = next((line for line in lines if line.rank == 1), None)
    before = sweep.status
    status = replace(
        before,
        observed_generation=sweep.generation,
        start_time=before.start_time or format_time(now),
        summary=f"{ended}/{len(lines)}" if lines else "",
        succeeded=succeeded,
        failed=ended - succeeded - stopped,
        stopped=stopped,
        running=len(lines) - ended - pending,
        pending=pending,
        best=_best(best),
        published=published,
        cells=lines,
        pods=pods,
        usage=_usage((*lines, *([published] if published is not None else [])), pods),
        claim_name=sweep.claim_name,
        report=f"pvc://{sweep.claim_name}/{sweep.shared_folder}/{SWEEP_REPORT}"
        if any(map(_is_in_report, lines))
        else before.report,
    )
    all_ended = bool(lines) and ended == len(lines)
    publishes = all_ended and waits_for_publication(sweep, status)
    finished = all_ended and not publishes
    completed = (before.completion_time or format_time(now)) if finished else None
    status = replace(status, completion_time=completed)
    if finished:
        missing = not_published(status) if succeeded else None
        reason = missing or (reason_of_all if sweep.spec.select == "all" else reason_of_the_best)(status)
        phase: SweepPhase = "Succeeded" if reason.word == "Succeeded" else "Failed"
        return _with_conditions(sweep, status, phase, reason, now)
    cells_rest = all(line.phase == "Suspended" or not line.uid or line.phase in ENDED for line in lines)
    best_rests = published is None or published.phase == "Suspended" or published.phase in ENDED
    pods_rest = all(not (pod.cells and pod.step.job_uid) or pod.reason == "Suspended" for pod in pods)
    suspended = sweep.spec.suspend and cells_rest and best_rests and pods_rest
    phase = "Suspended" if suspended else "Pending" if pending == len(lines) else "Running"
    held_back = blocked or (objection if pending or (publishes and published is None) else None)
    return _with_conditions(sweep, status, phase, reason_to_continue(sweep, status, phase, held_back), now)


def invalid(sweep: QLoRASweep, reason: Reason, now: datetime) -> QLoRASweepStatus:
    """End a sweep whose template, which never changes, cannot make its cells."""
    status = replace(
        sweep.status,
        observed_generation=sweep.generation,
        start_time=sweep.status.start_time or format_time(now),
        completion_time=sweep.status.completion_time or format_time(now),
    )
    return _with_conditions(sweep, status, "Failed", reason, now)


def held_up(sweep: QLoRASweep | StoredSweep, reason: Reason, now: datetime) -> QLoRASweepStatus:
    """Return the status of a sweep with unknown cells, unless it has ended."""
    before, phase = sweep.status, sweep.status.phase or "Pending"
    if phase in ("Succeeded", "Failed"):
        return before
    started = before.start_time or format_time(now)
    status = replace(before, observed_generation=sweep.generation, start_time=started)
    return _with_conditions(sweep, status, phase, reason, now)


def _usage(jobs: Sequence[CellStatus | PublishedCell], pods: Sequence[SweepPodStatus]) -> SweepUsage | None:
    """Sum the usage of cells, the publication, and pods whose cells are gone."""
    own = [pod.usage for pod in pods if pod.usage is not None]
    seconds = sum(job.gpu_seconds for job in (*jobs, *own))
    if not seconds:
        return None
    used = [job.cost for job in (*jobs, *own) if job.gpu_seconds]
    return SweepUsage(
        gpu_seconds=seconds,
        lost_gpu_seconds=sum(job.lost_gpu_seconds for job in jobs) + sum(each.lost_gpu_seconds.total for each in own),
        # A price that one profile lacks, or got later, would make the sum of the others too low.
        cost=None if None in used else sum_of_costs(used),
    )


def _is_in_report(line: CellStatus) -> bool:
    """Whether the cell's pod has left its curves on the sweep's page.

    Of those that fail, not each has any to leave.
    """
    return line.phase in ("Succeeded", "Stopped") or (line.phase == "Failed" and line.reason in _FAILED_WITH_CURVES)


def _has_ended(job: CellJob) -> bool:
    return (job.phase in ENDED and not job.retried) or job.rests


def _best(line: CellStatus | None) -> BestCell | None:
    if line is None:
        return None
    return BestCell(
        cell=line.name,
        overrides=line.overrides,
        eval_loss=short_loss(line.eval_loss),
        score=line.score,
        adapter=line.adapter,
        sha256=line.sha256,
    )


def _with_conditions(
    sweep: QLoRASweep | StoredSweep, status: QLoRASweepStatus, phase: SweepPhase, reason: Reason, now: datetime
) -> QLoRASweepStatus:
    """Return the status with that phase and the conditions that it summarizes.

    They follow kstatus, as for a job.
    """
    failed, ended = phase == "Failed", phase in ("Failed", "Succeeded")
    accepted, suspending = phase != "Pending", isinstance(sweep, QLoRASweep) and sweep.spec.suspend
    undecided: Value = "True" if phase == "Succeeded" else "False" if failed else "Unknown"
    values: tuple[tuple[ConditionType, Value, Reason], ...] = (
        ("Succeeded", undecided, reason),
        ("Failed", "True" if failed else "False", reason if failed else Reason("NotFailed", "")),
        (
            "Suspended",
            "True" if phase == "Suspended" else "False",
            reason if (suspending or phase == "Suspended") and not ended else Reason("NotSuspended", ""),
        ),
        (
            "Reconciling",
            "False" if accepted else "True",
            Reason("Started", "the sweep has been started") if accepted else reason,
        ),
        ("Stalled", "True" if failed else "False", reason if failed else Reason("NotStalled", "")),
    )
    for kind, value, why in values:
        status = with_condition(status, kind, value, why, generation=sweep.generation, now=now)
    return replace(status, phase=phase)
