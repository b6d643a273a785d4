"""Plans the runs of the study, their order, and the learning rates: pure functions of the results so far."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
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
FIRST_SEEDS = SEEDS[:2]
"""Of the runs whose differences decide the number of seeds."""
FEWER_SEEDS = SEEDS[:3]
"""Of the runs with other numbers of steps."""
LEAST_SEEDS = 4
"""Of each task: a bootstrap over fewer has bounds that are too narrow."""
FIRST_PAIRS = 6
LEVELS = (0.99, 0.97)
"""Shares of a reference's score that are tested: the claim, and a level that fewer runs can show."""
# Quantiles of the normal distribution: 5 % of error on one side, and 80 % power.
_ERROR_AND_POWER = 2.49
# The bootstrap draws seeds and prompts crosswise: in simulations with 1,000 prompts and 90 % right its standard error
# was up to 1.6 times that of a mean over pairs.
_WIDER = 1.6
LEAST_RIGHT = 0.85
ALMOST_ALL = 0.95
MOST_CHANGE, MOST_POINTS = 0.05, 0.02


@dataclass(frozen=True)
class Tuned:
    """Arms that share a learning rate."""

    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    """Those tried first, in factors of two."""


WHOLE = Tuned((FULL,), (5e-5, 1e-4, 2e-4))
ADAPTERS = Tuned((LORA, QLORA), (5e-4, 1e-3, 2e-3))


def planned_runs(seeds: int) -> int:
    """Return the runs of the whole study, if each task is in and no grid is extended."""
    tuning = len(TUNING_SEEDS) * sum(len(tuned.arms) * len(tuned.rates) for tuned in (WHOLE, ADAPTERS))
    return len(TASKS) * (tuning + len(ARMS) * (seeds + len(OTHER_STEPS) * len(FEWER_SEEDS)))


@dataclass(frozen=True)
class Power:
    """The number of pairs of runs that the test needs, by the first of them."""

    deviation: float
    """Standard deviation of the difference between QLoRA's and full fine-tuning's score, within tasks."""
    score: float
    """Mean of full fine-tuning's."""
    tasks: int
    """That take part, as far as is decided."""

    def pairs(self, level: float) -> int:
        """The pairs of a task and a seed that show a share of `level` with 80 % power, if the true share is 100 %."""
        return ceil((_ERROR_AND_POWER * _WIDER * self.deviation / ((1 - level) * self.score)) ** 2)

    @property
    def seeds(self) -> int:
        """The seeds of each task that give these pairs for the claim, from `LEAST_SEEDS` to all."""
        return min(max(ceil(self.pairs(LEVELS[0]) / self.tasks), LEAST_SEEDS), len(SEEDS))


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


def power(runs: Sequence[Run]) -> Power | None:
    """Return the power by the first pairs, in the order of the runs, or None before there are enough.

    It depends on the differences' spread and not on their mean (an internal pilot: Wittes and Brittain 1990,
    doi:10.1002/sim.4780090113). Fewer pairs are enough where so few tasks take part that there are no more.
    """
    found = {task: convergence(runs, task) for task in TASKS}
    tasks = sum(each is None or each.is_in for each in found.values())
    enough = min(FIRST_PAIRS, tasks * len(FIRST_SEEDS))
    scores: dict[tuple[str, int], dict[Arm, float]] = {}
    pairs: list[tuple[str, float, float]] = []
    for run in runs:
        if (run.cell.purpose, run.cell.steps) == ("main", STEPS) and run.cell.arm in (FULL, QLORA):
            pair = scores.setdefault((run.cell.task, run.cell.seed), {})
            pair[run.cell.arm] = run.score
            if len(pair) == 2:
                pairs.append((run.cell.task, pair[QLORA] - pair[FULL], pair[FULL]))
    if not enough or len(pairs) < enough:
        return None
    first = pairs[:enough]
    of_task = {task: mean(difference for name, difference, _ in first if name == task) for task, _, _ in first}
    squares = sum((difference - of_task[task]) ** 2 for task, difference, _ in first)
    return Power(sqrt(squares / (enough - len(of_task))), mean(score for _, _, score in first), tasks)


def waiting_cells(runs: Sequence[Run], part: int = 0, parts: int = 1) -> Iterator[Cell]:
    """The cells without a result whose learning rate is known, in the order of the study.

    Each task is tuned and has its first seeds; then all have the seeds that follow from these, and then other steps.
    With several parts, a process runs one of them: all cells of some tasks. One that is ahead of the others runs other
    steps before the further seeds, and ends without these: the command is then repeated.
    """
    done = {run.cell for run in runs}
    tasks = [task for number, task in enumerate(TASKS) if number % parts == part]
    for stage in (_first_cells, _seed_cells, _other_cells):
        yield from (cell for task in tasks for cell in stage(runs, task) if cell not in done)


def _first_cells(runs: Sequence[Run], task: str) -> Iterator[Cell]:
    """Full fine-tuning is tuned first: a task where it does not converge costs no more."""
    yield from _tuning_cells(runs, task, WHOLE)
    found = convergence(runs, task)
    if found is not None and found.is_in:
        yield from _tuning_cells(runs, task, ADAPTERS)
        yield from _main_cells(runs, task, STEPS, FIRST_SEEDS)


def _seed_cells(runs: Sequence[Run], task: str) -> Iterator[Cell]:
    found = power(runs)
    if found is not None:
        yield from _main_cells(runs, task, STEPS, SEEDS[: found.seeds])


def _other_cells(runs: Sequence[Run], task: str) -> Iterator[Cell]:
    for steps in OTHER_STEPS:
        yield from _main_cells(runs, task, steps, FEWER_SEEDS)


def _main_cells(runs: Sequence[Run], task: str, steps: int, seeds: Iterable[int]) -> Iterator[Cell]:
    whole, shared = chosen_rate(runs, task, WHOLE), chosen_rate(runs, task, ADAPTERS)
    if whole is None or shared is None:
        return
    for seed in seeds:
        yield from (Cell("main", task, arm, seed, steps, whole if arm == FULL else shared) for arm in ARMS)


def _tuning_cells(runs: Sequence[Run], task: str, tuned: Tuned) -> Iterator[Cell]:
    for rate in rates_to_try(tuned.rates, validation_losses(runs, task, tuned)):
        yield from (Cell("tuning", task, arm, seed, STEPS, rate) for seed in TUNING_SEEDS for arm in tuned.arms)
