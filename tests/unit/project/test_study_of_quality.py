"""The study of quality: its rows repeat, runs follow from results, and verdicts from right answers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from benchmarks.quality.analysis import Interval, compared, drawn_means, share, verdict
from benchmarks.quality.plan import (
    ADAPTERS,
    ARMS,
    FIRST_SEEDS,
    FULL,
    LEAST_SEEDS,
    LORA,
    QLORA,
    SEEDS,
    STEPS,
    WHOLE,
    Power,
    best_rate,
    chosen_rate,
    convergence,
    planned_runs,
    power,
    rates_to_try,
    waiting_cells,
)
from benchmarks.quality.results import Cell, Run
from benchmarks.quality.summary import NOTHING, claim_table, curves_figure, shares, tables
from benchmarks.quality.tasks import HELD_OUT_ROWS, TASKS, VALIDATION_ROWS, Task, plain, sets_of

GRID = (1.0, 2.0, 4.0)
NINE_OF_TEN = "1111111110"
RUN = Run(
    Cell("main", "arithmetic", FULL, 1, STEPS, 1e-4),
    "1110",
    "11",
    0.1,
    None,
    None,
    (0.5,),
    1.0,
    1.0,
    1.0,
    None,
    None,
    "x",
)


def tuned(cells: Iterable[Cell], *, right: str = "1111", earlier: float = 0.101, points: float = 1.0) -> list[Run]:
    """Runs whose loss on the validation set is least at rates of 1e-4 and 1e-3."""
    found = []
    for cell in cells:
        best = 1e-4 if cell.arm == FULL else 1e-3
        loss = 0.1 * max(cell.learning_rate / best, best / cell.learning_rate)
        found.append(
            replace(RUN, cell=cell, right=right, loss=loss, earlier_loss=earlier * loss / 0.1, earlier_score=points)
        )
    return found


def study(*, right: str = "1111", excluded: Sequence[str] = ()) -> list[Run]:
    """All runs, in their order; one that tunes the rate has answers `right`, but few right ones in tasks `excluded`."""
    runs: list[Run] = []
    while waiting := list(waiting_cells(runs)):
        for cell in waiting:
            validation = "1110" if cell.task in excluded else right
            runs += tuned([cell], right=validation if cell.purpose == "tuning" else answers(cell))
    return runs


def answers(cell: Cell) -> str:
    """Of twenty answers full fine-tuning has 19 right, LoRA one less and QLoRA two less, and each seed others."""
    wrong = {FULL: 1, LORA: 2, QLORA: 3}[cell.arm]
    return "".join("0" if (place - cell.seed) % 20 < wrong else "1" for place in range(20))


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_rows_are_the_same_in_every_run_and_no_prompt_is_in_two_sets(task: Task) -> None:
    sets = sets_of.__wrapped__(task)

    assert sets == sets_of(task)
    assert (len(sets.held_out), len(sets.validation)) == (HELD_OUT_ROWS, VALIDATION_ROWS)
    prompts = [plain(row.prompt) for part in (sets.held_out, sets.validation, sets.pool) for row in part]
    assert len(set(prompts)) == len(prompts)
    first, second = (sets.train(task.train_rows, seed) for seed in (1, 2))
    assert len(set(first)) == task.train_rows
    assert first != second


def test_a_prompt_with_other_punctuation_is_the_same_prompt() -> None:
    assert plain("'A bore, at  best...'") == plain("a bore at best!")
    assert plain("a b") != plain("ab")


@pytest.mark.parametrize(
    ("losses", "to_try", "best"),
    [
        ({}, GRID, None),
        ({1.0: 0.1, 2.0: 0.2}, GRID, None),
        ({1.0: 0.2, 2.0: 0.1, 4.0: 0.3}, GRID, 2.0),
        ({1.0: 0.1, 2.0: 0.2, 4.0: 0.3}, (0.5, *GRID), None),
        ({0.5: 0.2, 1.0: 0.1, 2.0: 0.2, 4.0: 0.3}, (0.5, *GRID), 1.0),
        ({1.0: 0.3, 2.0: 0.2, 4.0: 0.1}, (*GRID, 8.0), None),
        ({1.0: 0.3, 2.0: 0.2, 4.0: 0.1, 8.0: 0.05}, (*GRID, 8.0, 16.0), None),
    ],
)
def test_a_grid_is_extended_until_the_best_rate_has_worse_ones_on_both_sides(
    losses: dict[float, float], to_try: tuple[float, ...], best: float | None
) -> None:
    assert rates_to_try(GRID, losses) == to_try
    assert best_rate(GRID, losses) == best


def test_adapters_share_the_rate_with_the_lowest_mean_loss_over_both_and_their_seeds() -> None:
    cells = [
        Cell("tuning", "arithmetic", arm, seed, STEPS, rate)
        for rate in ADAPTERS.rates
        for seed in (101, 102)
        for arm in ADAPTERS.arms
    ]
    runs = tuned(cells)
    # LoRA alone prefers the next rate, by less than QLoRA loses there.
    moved = [replace(r, loss=0.05) if (r.cell.arm, r.cell.learning_rate) == (LORA, 2e-3) else r for r in runs]

    assert chosen_rate(moved, "arithmetic", ADAPTERS) == 1e-3
    assert chosen_rate(moved[:-1], "arithmetic", ADAPTERS) is None


@pytest.mark.parametrize(
    ("right", "earlier", "points", "takes_part"),
    [
        (NINE_OF_TEN, 0.104, 0.7, True),
        ("1110", 0.104, 0.75, False),
        (NINE_OF_TEN, 0.106, 0.7, False),
        (NINE_OF_TEN, 0.2, 0.89, True),
        ("1111", 0.2, 0.7, True),
    ],
)
def test_a_task_takes_part_only_if_full_fine_tuning_has_converged(
    right: str, earlier: float, points: float, takes_part: bool
) -> None:
    cells = (cell for cell in waiting_cells([]) if cell.task == "arithmetic")
    runs = tuned(cells, right=right, earlier=earlier, points=points)

    found = convergence(runs, "arithmetic")
    assert found is not None
    assert found.is_in == takes_part
    assert any(cell.arm == LORA for cell in waiting_cells(runs)) == takes_part


def test_a_task_is_tuned_and_has_its_first_seeds_before_all_have_the_seeds_that_follow_and_other_steps() -> None:
    runs = study()
    cells = [run.cell for run in runs]
    of_task = [cell for cell in cells if cell.task == "arithmetic"]
    main = [cell for cell in of_task if cell.purpose == "main"]

    kinds = list(dict.fromkeys((cell.purpose, cell.arm == FULL) for cell in of_task))
    assert kinds == [("tuning", True), ("tuning", False), ("main", True), ("main", False)]
    pairs = list(dict.fromkeys((cell.task, cell.seed) for cell in cells if cell.purpose == "main"))
    assert pairs[: 2 * len(TASKS)] == [(task, seed) for task in TASKS for seed in FIRST_SEEDS]
    assert list(dict.fromkeys(cell.steps for cell in main)) == [400, 200, 800]
    # The differences between the seeds are the same, and a task has no fewer seeds than these.
    assert {cell.seed for cell in main if cell.steps == STEPS} == set(SEEDS[:LEAST_SEEDS])
    assert len(cells) == planned_runs(LEAST_SEEDS)
    assert {cell.learning_rate for cell in main if cell.arm != FULL} == {1e-3}


def test_parts_share_the_tasks_and_no_part_waits_for_another() -> None:
    runs = [run for run in study() if run.cell.task == "arithmetic"]
    first, second = (list(dict.fromkeys(cell.task for cell in waiting_cells(runs, part, 2))) for part in (0, 1))

    assert (first, second) == (["questions"], ["extraction", "sentiment"])


def test_a_share_has_bounds_over_seeds_and_prompts_that_pairs_make_narrow() -> None:
    by_task = compared([run for run in study() if run.cell.task == "arithmetic"], STEPS)
    means = drawn_means(by_task, resamples=300)

    found = share(means, QLORA, FULL)
    assert found.value == pytest.approx(17 / 19)
    assert 0.75 < found.low < found.value < found.high < 1.0
    assert share(means, FULL, FULL) == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "verdicts"),
    [
        (0.991, 1.01, ("met", "met")),
        (0.975, 1.0, ("not decided", "met")),
        (0.972, 0.985, ("**missed**", "met")),
        (0.96, 0.98, ("**missed**", "not decided")),
        (0.9, 0.95, ("**missed**", "**missed**")),
    ],
)
def test_a_level_is_met_by_the_lower_bound_and_missed_by_the_upper(
    low: float, high: float, verdicts: tuple[str, str]
) -> None:
    assert (verdict(Interval(0.97, low, high), 0.99), verdict(Interval(0.97, low, high), 0.97)) == verdicts


def test_the_first_six_pairs_decide_how_many_the_test_needs() -> None:
    # 17 pairs for a mean over pairs, and 1.6 times the standard error in the bootstrap.
    assert Power(deviation=0.015, score=0.93, tasks=4).pairs(0.99) == 42
    assert [Power(deviation, 0.93, tasks=4).seeds for deviation in (0.0, 0.008, 0.009, 0.02)] == [4, 4, 4, 8]
    assert Power(0.008, 0.93, tasks=2).seeds == 6
    # Differences of 0 and 1, three of each task: tasks differ, but within them the seeds do not.
    differing = [
        replace(RUN, cell=replace(RUN.cell, task=task, arm=arm, seed=seed), right="1" if arm == FULL else right)
        for task, right in (("arithmetic", "1"), ("extraction", "0"))
        for seed in SEEDS[:3]
        for arm in (FULL, QLORA)
    ]
    assert power(differing) == Power(0.0, 1.0, tasks=4)
    assert power(differing[:-1]) is None


def test_the_tables_begin_without_a_result_and_end_with_verdicts_and_a_figure() -> None:
    assert (tables([]), claim_table([]), curves_figure([])) == (NOTHING, NOTHING, None)
    runs = study()

    shown = tables(runs)
    assert "4 of 4 tasks, 4 seeds" in shown
    assert "| QLoRA, of full fine-tuning | 89.5 % (85.1 to 93.7) | **missed** | **missed** |" in claim_table(runs)
    assert b"Optimizer steps" in (curves_figure(runs) or b"")
    assert set(shares(runs, 200)) == set(shares(runs, 800))
    assert Run.load(json.dumps(RUN.dump())) == RUN


def test_two_tasks_that_take_part_have_seeds_that_follow_from_four_pairs() -> None:
    runs = study(excluded=("arithmetic", "extraction"))

    found = power(runs)
    assert found is not None
    assert found.tasks == 2
    assert {run.cell.seed for run in runs if run.cell.purpose == "main"} == set(SEEDS[: found.seeds])


def test_a_task_that_does_not_converge_is_shown_and_not_compared() -> None:
    runs = study(excluded=("arithmetic",))

    assert "| `arithmetic` | 0.0001 | 75.0 % | 1.0 %, 25.0 points | **no** | – |" in tables(runs)
    assert "3 of 4 tasks" in claim_table(runs)
    assert {run.cell.arm for run in runs if run.cell.task == "arithmetic"} == set(WHOLE.arms) < set(ARMS)
