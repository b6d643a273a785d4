"""Decides which cells stop after a rung of spec.halving.

Source: asynchronous successive halving, arXiv 1810.05934, in its stopping form: each cell is compared once at each
rung, as soon as its loss there is known, with the losses known by then. No cell waits for the others, and a stopped
cell is not promoted later.
"""

from collections.abc import Mapping, Sequence

from qlora_api.schema import replace
from qlora_api.sweep.halving import HalvingSpec
from qlora_api.sweep.status import CellStatus, RungStatus
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep

NOT_AMONG_BEST = "NotAmongBest"
_ENDED = frozenset({"Succeeded", "Failed", "Deleted"})


def judged(
    lines: Sequence[CellStatus], jobs: Mapping[str, CellJob], halving: HalvingSpec | None
) -> tuple[CellStatus, ...]:
    """Add a verdict for each rung whose loss has become known, and keep earlier ones.

    Losses that become known at the same time are all compared before the first verdict. Those of cells that have
    failed, were stopped or are gone count: they have reached the rung. One that has lost a rung does not count at later
    ones, however far it ran before the next pass.
    """
    if halving is None:
        return tuple(lines)
    for step in halving.rungs():
        lines = _judged_at(step, lines, jobs, halving)
    return tuple(lines)


def has_new_verdict(sweep: QLoRASweep, lines: Sequence[CellStatus]) -> bool:
    """Whether a cell has a new verdict, which is stored before any action.

    Other losses may be known by the next pass, which must not decide otherwise.
    """
    before = {line.name: line.rungs for line in sweep.status.cells}
    return any(line.rungs is not None and line.rungs != before.get(line.name) for line in lines)


def lost_rung(line: CellStatus) -> RungStatus | None:
    """Return the first rung that stops the cell, or None if it continues."""
    return next((rung for rung in line.rungs or () if not rung.goes_on), None)


def is_to_be_stopped(line: CellStatus, job: CellJob) -> bool:
    """Whether the cell runs although it lost a rung, and no user has resumed it since."""
    rung = lost_rung(line)
    if rung is None or job.stopped_by_sweep or job.trained or job.phase in _ENDED:
        return False
    # At its last step it has been trained to its end, though that may not be known yet.
    return not job.total_steps or rung.step < job.total_steps


def why_stopped(line: CellStatus, halving: HalvingSpec | None) -> str:
    """Return the message for users, empty if the cell has lost no rung."""
    rung = lost_rung(line)
    if rung is None or halving is None:
        return ""
    kept = halving.kept(rung.cells)
    best = "the best goes on" if kept == 1 else f"the best {kept} go on"
    return f"stopped at step {rung.step}: {_ordinal(rung.rank)} of {rung.cells}, {best}"


def _judged_at(
    step: int, lines: Sequence[CellStatus], jobs: Mapping[str, CellJob], halving: HalvingSpec
) -> Sequence[CellStatus]:
    before = {line.name: rung.eval_loss for line in lines for rung in line.rungs or () if rung.step == step}
    found = {job.name: loss for job in jobs.values() for reached, loss in job.evaluations if reached == step}
    # Of equal losses the first cell's is the lower, as in the choice of the best.
    rivals = [line for line in lines if line.name in before or lost_rung(line) is None]
    losses = {line.name: loss for line in rivals if (loss := before.get(line.name, found.get(line.name))) is not None}
    order = sorted(losses, key=lambda name: losses[name])

    def with_verdict(line: CellStatus) -> CellStatus:
        if line.name in before or line.name not in losses:
            return line
        rank = order.index(line.name) + 1
        verdict = RungStatus(
            step=step,
            eval_loss=losses[line.name],
            rank=rank,
            cells=len(order),
            goes_on=rank <= halving.kept(len(order)),
        )
        return replace(line, rungs=(*(line.rungs or ()), verdict))

    return [with_verdict(line) for line in lines]


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
