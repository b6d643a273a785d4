"""Plans the runs of the study, their order, and the learning rates: pure functions of the results so far."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.quality.results import Cell, Run
from benchmarks.quality.tasks import TASKS
from benchmarks.tuning import Arm

FULL: Arm = "full"
LORA: Arm = "lora"
QLORA: Arm = "nf4-dq"
ARMS: Mapping[Arm, str] = {
    FULL: "Full fine-tuning",
    LORA: "LoRA on the base in bf16",
    QLORA: "QLoRA: NF4 with double quantization",
}
"""In the order of the tables."""
STEPS = 400
"""Of the runs that choose the rates, and of those with all seeds."""
OTHER_STEPS = (200, 800)
TUNING_SEEDS = (101, 102)
SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
FEWER_SEEDS = SEEDS[:3]
"""Of the runs with other numbers of steps."""
LEAST_RIGHT = 0.85
ALMOST_ALL = 0.95
MOST_CHANGE, MOST_POINTS = 0.05, 0.02


@dataclass(frozen=True)
class Tuned:
    """Arms that share a learning rate."""

    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    """Those tried first, in factors of two."""


WHOLE = Tuned((FULL,), (5e-5, 1e-4, 2e-4, 4e-4))
ADAPTERS = Tuned((LORA, QLORA), (5e-4, 1e-3, 2e-3, 4e-3))
PLANNED = len(TASKS) * (
    len(ARMS) * len(WHOLE.rates) * len(TUNING_SEEDS) + len(ARMS) * (len(SEEDS) + len(OTHER_STEPS) * len(FEWER_SEEDS))
)
"""Runs of the whole study, if each task is in and no grid is extended."""


@dataclass(frozen=True)
class Convergence:
    """Full fine-tuning's end on the validation set, at its rate: the mean over the seeds of tuning."""

    right: float
    change: float
    """Of the loss between three quarters of the steps and all, as a share of the earlier."""
    points: float
    """By which the share of right answers changes in these."""

    @property
    def is_in(self) -> bool:
        """Whether the task takes part in the comparison."""
        is_steady = self.change < MOST_CHANGE or self.points < MOST_POINTS
        return self.right >= ALMOST_ALL or (self.right >= LEAST_RIGHT and is_steady)


def validation_losses(runs: Sequence[Run], task: str, tuned: Tuned) -> dict[float, float]:
    """The mean loss over arms and seeds, of the rates that all of them have tried."""
    found: dict[float, list[float]] = {}
    for run in _of_tuning(runs, task, tuned):
        found.setdefault(run.cell.learning_rate, []).append(run.loss)
    needed = len(tuned.arms) * len(TUNING_SEEDS)
    return {rate: mean(losses) for rate, losses in found.items() if len(losses) == needed}


def rates_to_try(grid: Sequence[float], losses: Mapping[float, float]) -> tuple[float, ...]:
    """Return the rates of the grid, and one more next to the best if that is at the edge of those tried."""
    tried = sorted({*grid, *losses})
    if losses.keys() >= set(grid):
        best = min(losses, key=losses.__getitem__)
        if best == tried[0]:
            return best / 2, *tried
        if best == tried[-1]:
            return *tried, best * 2
    return tuple(tried)


def best_rate(grid: Sequence[float], losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest loss, or None before all are tried."""
    done = set(rates_to_try(grid, losses)) == losses.keys()
    return min(losses, key=losses.__getitem__) if done else None


def chosen_rate(runs: Sequence[Run], task: str, tuned: Tuned) -> float | None:
    """The shared rate of the arms, or None before all are tried."""
    return best_rate(tuned.rates, validation_losses(runs, task, tuned))


def convergence(runs: Sequence[Run], task: str) -> Convergence | None:
    """Full fine-tuning's convergence, or None before its rate is chosen."""
    rate = chosen_rate(runs, task, WHOLE)
    chosen = [run for run in _of_tuning(runs, task, WHOLE) if run.cell.learning_rate == rate]
    if not chosen:
        return None
    earlier, last = mean(run.earlier_loss or 0.0 for run in chosen), mean(run.loss for run in chosen)
    right, before = mean(run.score for run in chosen), mean(run.earlier_score or 0.0 for run in chosen)
    return Convergence(right, abs(last - earlier) / earlier, abs(right - before))


def _of_tuning(runs: Sequence[Run], task: str, tuned: Tuned) -> list[Run]:
    return [run for run in runs if (run.cell.purpose, run.cell.task) == ("tuning", task) and run.cell.arm in tuned.arms]


def waiting_cells(runs: Sequence[Run], part: int = 0, parts: int = 1) -> Iterator[Cell]:
    """The cells without a result whose learning rate is known, in the order of the study.

    With several parts, a process runs one of them: all cells of some tasks, so that no part waits for another.
    """
    done = {run.cell for run in runs}
    for number, task in enumerate(TASKS):
        if number % parts == part:
            yield from (cell for cell in planned_cells(runs, task) if cell not in done)


def planned_cells(runs: Sequence[Run], task: str) -> Iterator[Cell]:
    """The task's cells whose learning rate is known, done or not, in the order of the study.

    Full fine-tuning is tuned first: a task where it does not converge costs no more. Runs with few steps come early.
    """
    yield from _tuning_cells(runs, task, WHOLE)
    found = convergence(runs, task)
    if found is None or not found.is_in:
        return
    yield from _tuning_cells(runs, task, ADAPTERS)
    whole, shared = chosen_rate(runs, task, WHOLE), chosen_rate(runs, task, ADAPTERS)
    if whole is None or shared is None:
        return
    for steps in sorted((STEPS, *OTHER_STEPS)):
        for seed in SEEDS if steps == STEPS else FEWER_SEEDS:
            for arm in ARMS:
                yield Cell("main", task, arm, seed, steps, whole if arm == FULL else shared)


def _tuning_cells(runs: Sequence[Run], task: str, tuned: Tuned) -> Iterator[Cell]:
    for rate in rates_to_try(tuned.rates, validation_losses(runs, task, tuned)):
        yield from (Cell("tuning", task, arm, seed, STEPS, rate) for seed in TUNING_SEEDS for arm in tuned.arms)
