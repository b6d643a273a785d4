"""Plans the runs of the study, their order, and the learning rates: pure functions of the results so far."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.quality.results import Cell, Purpose, Run, Targets
from benchmarks.quality.tasks import TASKS

BASE = "base"
"""The arm that is not tuned."""
FULL = "full"
LORA = "lora"
QLORA = "nf4-dq"
ARMS: Mapping[str, str] = {
    FULL: "Full fine-tuning, 16 bit with 32-bit master weights",
    LORA: "LoRA on the base in 16 bit",
    QLORA: "QLoRA: NF4 with double quantization",
    "nf4": "QLoRA: NF4",
    "fp4-dq": "QLoRA: FP4 with double quantization",
}
"""The tuned arms, in the order of the tables."""
ADAPTER_RATES = (6e-4, 2e-3, 6e-3)
FULL_RATES = (3e-5, 1e-4, 3e-4)
TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
RANK = 16
OTHER_RANKS = (1, 4, 64)
FEWER_ROWS = (4, 2)
"""Divisors of a task's rows."""
FEWER_SEEDS = 3
"""The first so many seeds are enough where rank, targets or rows vary."""
CELLS = len(TASKS) * (
    1
    + len(ARMS) * (len(ADAPTER_RATES) + len(SEEDS))
    + FEWER_SEEDS * (len(OTHER_RANKS) + 1 + len((FULL, QLORA)) * len(FEWER_ROWS))
)
"""Of the whole study."""


def rates(arm: str) -> tuple[float, ...]:
    """The learning rates that are tried, as many for each arm."""
    return FULL_RATES if arm == FULL else ADAPTER_RATES


def chosen_rate(runs: Sequence[Run], task: str, arm: str) -> float | None:
    """The rate with the best score on the validation set, of equal ones that with the lowest loss there.

    None until all of them have been tried.
    """
    tried = {
        run.cell.learning_rate: run
        for run in runs
        if (run.cell.purpose, run.cell.task, run.cell.arm) == ("tuning", task, arm)
    }
    if set(tried) != set(rates(arm)):
        return None
    return max(tried.values(), key=lambda run: (run.score, -run.loss)).cell.learning_rate


def waiting_cells(runs: Sequence[Run], part: int = 0, parts: int = 1) -> Iterator[Cell]:
    """The cells with a learning rate and without a result, in the order of the study.

    With several parts, a process runs one of them: all cells of some pairs of task and arm, so that no part waits for
    another.
    """
    done = {run.cell for run in runs}
    for cell in planned_cells(runs):
        pair = list(TASKS).index(cell.task) + [*ARMS, BASE].index(cell.arm)
        if cell not in done and pair % parts == part:
            yield cell


def planned_cells(runs: Sequence[Run]) -> Iterator[Cell]:
    """All cells with a learning rate by these runs, in the order of the study, done or not.

    Task by task, so that each has all arms and seeds as early as possible; then ranks, targets and fewer rows.
    """
    rate_of = {(task, arm): chosen_rate(runs, task, arm) for task in TASKS for arm in ARMS}
    for task in TASKS:
        yield _cell("main", task, BASE, TUNING_SEED, 0.0, rank=0, rows=0)
        yield from (_cell("tuning", task, arm, TUNING_SEED, rate) for arm in ARMS for rate in rates(arm))
        for seed in SEEDS:
            chosen = ((arm, rate_of[task, arm]) for arm in ARMS)
            yield from (_cell("main", task, arm, seed, rate) for arm, rate in chosen if rate is not None)
    for task in TASKS:
        # Not tuned again: the rate that was chosen at the usual rank, with all targets and rows.
        rate, of_full = rate_of[task, QLORA], rate_of[task, FULL]
        for seed in SEEDS[:FEWER_SEEDS]:
            if rate is not None:
                yield from (_cell("rank", task, QLORA, seed, rate, rank=rank) for rank in OTHER_RANKS)
                yield _cell("targets", task, QLORA, seed, rate, targets="attention")
            for divisor in FEWER_ROWS:
                rows = TASKS[task].train_rows // divisor
                known = ((arm, found) for arm, found in ((FULL, of_full), (QLORA, rate)) if found is not None)
                yield from (_cell("rows", task, arm, seed, found, rows=rows) for arm, found in known)


def _cell(
    purpose: Purpose,
    task: str,
    arm: str,
    seed: int,
    learning_rate: float,
    *,
    rank: int | None = None,
    targets: Targets = "all-linear",
    rows: int | None = None,
) -> Cell:
    usual = 0 if arm == FULL else RANK
    return Cell(
        purpose,
        task,
        arm,
        seed,
        learning_rate,
        usual if rank is None else rank,
        targets,
        TASKS[task].train_rows if rows is None else rows,
    )
