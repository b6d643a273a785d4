"""The study of quality: its rows repeat, runs follow from results, and verdicts from right answers."""

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest

from benchmarks.quality.analysis import Interval, Power, compared, drawn_means, power, share, verdict
from benchmarks.quality.plan import (
    ADAPTERS,
    ARMS,
    FULL,
    LORA,
    PLANNED,
    QLORA,
    SEEDS,
    STEPS,
    WHOLE,
    best_rate,
    chosen_rate,
    convergence,
    planned_cells,
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


def done(task: str, *, right: str = "1111") -> list[Run]:
    """All runs of a task, in their order; a run that tunes the rate has these answers, and a main run other ones."""
    runs: list[Run] = []
    while waiting := [cell for cell in planned_cells(runs, task) if cell not in {run.cell for run in runs}]:
        for cell in waiting:
            runs += tuned([cell], right=right if cell.purpose == "tuning" else answers(cell))
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
    runs = tuned(list(planned_cells([], "arithmetic")), right=right, earlier=earlier, points=points)

    found = convergence(runs, "arithmetic")
    assert found is not None
    assert found.is_in == takes_part
    assert any(cell.arm == LORA for cell in planned_cells(runs, "arithmetic")) == takes_part


def test_a_task_is_tuned_first_and_then_has_all_seeds_with_few_steps_early() -> None:
    cells = [run.cell for run in done("arithmetic")]

    assert len(cells) == PLANNED / len(TASKS)
    kinds = list(dict.fromkeys((cell.purpose, cell.steps, cell.arm == FULL) for cell in cells))
    assert kinds[:2] == [("tuning", 400, True), ("tuning", 400, False)]
    main = [cell for cell in cells if cell.purpose == "main"]
    assert list(dict.fromkeys(cell.steps for cell in main)) == [200, 400, 800]
    assert {cell.seed for cell in main if cell.steps == STEPS} == set(SEEDS)
    assert {cell.learning_rate for cell in main if cell.arm != FULL} == {1e-3}


def test_parts_share_the_tasks_and_no_part_waits_for_another() -> None:
    runs = done("arithmetic")
    first, second = (list(dict.fromkeys(cell.task for cell in waiting_cells(runs, part, 2))) for part in (0, 1))

    assert (first, second) == (["questions"], ["extraction", "sentiment"])


def test_a_share_has_bounds_over_seeds_and_prompts_that_pairs_make_narrow() -> None:
    by_task = compared(done("arithmetic"), STEPS)
    means = drawn_means(by_task, resamples=300)

    found = share(means, QLORA, FULL)
    assert found.value == pytest.approx(17 / 19)
    assert 0.8 < found.low < found.value < found.high < 1.0
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


def test_the_first_six_pairs_tell_how_many_the_test_needs() -> None:
    assert Power(deviation=0.015, score=0.93).pairs(0.99) == 17
    assert Power(deviation=0.025, score=0.93).pairs(0.99) == 45
    # Differences of 0 and 1, three of each task: tasks differ, but within them the seeds do not.
    differing = [
        replace(RUN, cell=replace(RUN.cell, task=task, arm=arm, seed=seed), right="1" if arm == FULL else right)
        for task, right in (("arithmetic", "1"), ("extraction", "0"))
        for seed in SEEDS[:3]
        for arm in (FULL, QLORA)
    ]
    assert power(differing) == Power(0.0, 1.0)
    assert power(differing[:-1]) is None


def test_the_tables_begin_without_a_result_and_end_with_verdicts_and_a_figure() -> None:
    assert (tables([]), claim_table([]), curves_figure([])) == (NOTHING, NOTHING, None)
    runs = done("arithmetic")

    shown = tables(runs)
    assert "1 of 4 tasks, 8 seeds" in shown
    assert "| QLoRA, of full fine-tuning | 89.5 % (83.2 to 95.3) | **missed** | **missed** |" in claim_table(runs)
    assert b"Optimizer steps" in (curves_figure(runs) or b"")
    assert set(shares(runs, 200)) == set(shares(runs, 800))
    assert Run.load(json.dumps(RUN.dump())) == RUN


def test_a_task_that_does_not_converge_is_shown_and_not_compared() -> None:
    runs = done("arithmetic", right="1110")

    assert "| `arithmetic` | 0.0001 | 75.0 % | 1.0 %, 25.0 points | **no** | – |" in tables(runs)
    assert claim_table(runs) == NOTHING
    assert {run.cell.arm for run in runs} == set(WHOLE.arms) < set(ARMS)
