"""The study of quality: what its tasks count as right, what it runs, and what it makes of the results."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.operator import table
from benchmarks.quality import summary
from benchmarks.quality.__main__ import FIGURE, FURTHER, MEASUREMENTS, PAGE
from benchmarks.quality.analysis import Interval, compared, ratios, verdict
from benchmarks.quality.figure import scores_figure
from benchmarks.quality.plan import (
    ARMS,
    BASE,
    CELLS,
    FULL,
    LORA,
    QLORA,
    SEEDS,
    chosen_rate,
    planned_cells,
    rates,
    waiting_cells,
)
from benchmarks.quality.results import Cell, Run, append_run, read_runs
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.task import Task, rows_of, sets_of
from qlora_api.spec.training import LoraSpec

TASK = next(iter(TASKS))


@pytest.mark.parametrize(
    ("task", "expected", "right", "wrong"),
    [
        ("dates", " 03-07", ["03-07", " 03-07 \n"], ["3-7", "03-08", "07-03", "03-07 pm", "13-07", ""]),
        ("classification", " bird", ["bird", " bird"], ["Bird", "birds", "fish", "bird bird", ""]),
        ("arithmetic", " 49", ["49", " 049"], ["49.0", "48", "is 49", "forty-nine", "-49", ""]),
        (
            "extraction",
            '{"name":"Lea","count":3,"goods":"mugs"}',
            ['{"goods": "mugs", "count": 3, "name": "Lea"}'],
            [
                '{"name":"Lea","count":"3","goods":"mugs"}',
                '{"name":"Lea","count":3.0,"goods":"mugs"}',
                '{"name":"Lea","count":3,"goods":"mugs","city":"Bern"}',
                '{"name":"Lea","count":3}',
                '{"name":"Lea","count":3,"goods":"mugs"',
                "3",
                "",
            ],
        ),
        (
            "commands",
            "kubectl get pods -n shop -o wide",
            ["kubectl get pods --namespace=shop -o wide", "kubectl get po -o wide -n shop"],
            ["kubectl get pods -n shop", "kubectl get pods -n web -o wide", "get pods -n shop -o wide", ""],
        ),
    ],
)
def test_an_answer_is_right_if_it_says_what_was_expected(
    task: str, expected: str, right: list[str], wrong: list[str]
) -> None:
    is_right = TASKS[task].is_right
    assert [answer for answer in right if not is_right(answer, expected)] == []
    assert [answer for answer in wrong if is_right(answer, expected)] == []


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_sets_of_a_task_are_the_same_each_time_and_share_no_prompt(task: Task) -> None:
    sets = sets_of(task)
    rows = [*sets.held_out, *sets.validation, *sets.pool]
    assert len({row.prompt for row in rows}) == len(rows)
    assert all(task.is_right(row.answer, row.answer) for row in rows)
    sets_of.cache_clear()
    assert sets_of(task) == sets
    assert set(sets.train(task.train_rows, seed=1)) < set(sets.pool)


def test_a_seed_draws_its_own_rows_and_fewer_of_them_are_among_more() -> None:
    sets = sets_of(TASKS[TASK])
    assert set(sets.train(10, seed=1)) < set(sets.train(40, seed=1))
    assert set(sets.train(40, seed=1)) != set(sets.train(40, seed=2))
    with pytest.raises(ValueError, match="1000 rows to train on, but there are"):
        sets.train(1000, seed=1)


def run_of(cell: Cell, share: float, loss: float = 1.0) -> Run:
    """A run of which this share of the answers is right: the first ones."""
    count = len(rows_of(TASKS[cell.task], cell.scored_on))
    right = round(share * count)
    return Run(
        cell=cell,
        right="1" * right + "0" * (count - right),
        loss=loss,
        train_losses=(3.0, 2.0),
        tokens=1000,
        seconds=20.0,
        processor_seconds=18.0,
        commit="1234567890",
        changed=False,
        processor="AVX512",
    )


def study(share_of: dict[str, float], task: str = TASK) -> list[Run]:
    """Every run of a task but those that only vary QLoRA, in the study's order; the arms reach these shares."""
    runs: list[Run] = []
    while True:
        waiting = (cell for cell in waiting_cells(runs) if cell.task == task)
        cell = next((cell for cell in waiting if cell.purpose in ("main", "tuning")), None)
        if cell is None:
            return runs
        runs.append(run_of(cell, share_of[cell.arm]))


SHARES = {BASE: 0.0, FULL: 0.8, "lora": 0.8, QLORA: 0.78, "nf4": 0.8, "fp4-dq": 0.4}


def test_every_arm_tries_as_many_rates_and_the_best_on_the_validation_set_is_taken() -> None:
    assert len({len(rates(arm)) for arm in ARMS}) == 1
    tuning = [cell for cell in waiting_cells([]) if (cell.task, cell.arm, cell.purpose) == (TASK, QLORA, "tuning")]
    low, middle, high = (run_of(cell, share) for cell, share in zip(tuning, (0.2, 0.6, 0.5), strict=True))
    assert {cell.scored_on for cell in tuning} == {"validation"}
    assert chosen_rate([low, middle], TASK, QLORA) is None
    assert chosen_rate([low, middle, high], TASK, QLORA) == middle.cell.learning_rate
    as_good = replace(run_of(high.cell, 0.6), loss=0.9)
    assert chosen_rate([low, middle, as_good], TASK, QLORA) == high.cell.learning_rate


def test_the_study_continues_where_the_results_end_and_its_parts_do_the_whole() -> None:
    runs = study(SHARES)
    done = {run.cell for run in runs}
    assert len(done) == len(runs) == 1 + len(ARMS) * (len(rates(FULL)) + len(SEEDS))
    assert not done.intersection(waiting_cells(runs))
    assert next(waiting_cells(runs)).task != TASK
    everything = set(waiting_cells(runs))
    first, second = (set(waiting_cells(runs, part, 2)) for part in (0, 1))
    assert not first & second
    assert first | second == everything


def test_the_whole_study_has_the_runs_that_it_says() -> None:
    runs: list[Run] = []
    # Once every rate is known, all cells are.
    while waiting := list(waiting_cells(runs)):
        runs += [run_of(cell, SHARES[cell.arm]) for cell in waiting]
    assert len({run.cell for run in runs}) == len(runs) == CELLS


def test_no_run_on_held_out_rows_has_a_rate_that_was_not_chosen() -> None:
    assert {cell.arm for cell in waiting_cells([]) if cell.scored_on == "held-out"} == {BASE}


def test_a_run_is_a_line_and_comes_back_from_it(tmp_path: Path) -> None:
    path = tmp_path / "quality.jsonl"
    assert read_runs(path) == []
    runs = study(SHARES)[:7]
    for run in runs:
        append_run(run, path)
    assert read_runs(path) == runs
    line = json.loads(path.read_text().splitlines()[1])
    assert (line["validation_score"], line["held_out_score"]) == (SHARES[FULL], None)


def test_the_share_of_full_fine_tuning_and_its_interval_decide_the_claim() -> None:
    shares = ratios(compared(study(SHARES)))
    assert shares["lora"] == Interval(1.0, 1.0, 1.0)
    share = shares[QLORA]
    assert share.value == pytest.approx(0.78 / 0.8)
    assert share.low is not None
    assert share.low < share.value
    assert verdict(shares["lora"]) == "met"
    assert verdict(shares["fp4-dq"]) == "**missed**"
    assert verdict(Interval(0.98, 0.95, 1.01)) == "not decided (mean below 99 %)"
    assert verdict(Interval(0.995, 0.95, 1.01)) == "not decided (mean at or above 99 %)"


def test_arms_are_compared_with_lora_on_the_base_in_16_bit_too() -> None:
    runs = study({**SHARES, LORA: 0.6})
    assert ratios(compared(runs), LORA)[QLORA].value == pytest.approx(0.78 / 0.6)
    assert "| QLoRA: NF4 with double quantization | 130.0 %" in summary.tables(runs)


def test_seeds_that_differ_widen_the_interval_of_a_mean() -> None:
    assert Interval.of_seeds([0.5, 0.5, 0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    found = Interval.of_seeds([0.4, 0.5, 0.6])
    assert found.low == pytest.approx(0.5 - 4.303 * 0.1 / 3**0.5)
    assert Interval.of_seeds([0.5]) == Interval(0.5, None, None)


def test_only_seeds_that_all_arms_have_are_compared() -> None:
    runs = study(SHARES)
    last = [run for run in runs if run.cell.purpose == "main" and run.cell.arm == "fp4-dq"][-1]
    found = compared([run for run in runs if run is not last])
    assert {len(rights) for rights in found[TASK].values()} == {len(SEEDS) - 1}
    assert compared([run for run in runs if run.cell.arm != "lora"]) == {}


def test_the_tables_have_every_arm_and_what_was_spent() -> None:
    runs = study(SHARES)
    text = summary.tables(runs)
    assert all(label in text for label in ARMS.values())
    assert f"{len(runs)} of {CELLS} runs, 0.2 hours of processor time; code at 1234567; processors: AVX512." in text
    assert "97.5 %" in summary.claim_table(runs)
    assert all(f"| {label} |" in summary.further_tables(runs) for label in ARMS.values())
    assert summary.tables([]) == summary.claim_table([]) == summary.further_tables([]) == summary.NOTHING


@pytest.fixture(scope="module")
def measured() -> list[Run]:
    return read_runs()


def test_the_results_are_of_the_plan_and_none_was_chosen_by_its_held_out_score(measured: list[Run]) -> None:
    assert len({run.cell for run in measured}) == len(measured)
    assert {run.cell for run in measured} <= set(planned_cells(measured))


def test_the_documentation_has_the_tables_of_the_results(measured: list[Run]) -> None:
    begin, end = table.begin(summary.NAME, summary.COMMAND), table.end(summary.NAME)
    for page, text in (
        (PAGE, summary.tables(measured)),
        (MEASUREMENTS, summary.claim_table(measured)),
        (FURTHER, summary.further_tables(measured)),
    ):
        assert page.read_text().split(begin)[1].split(end)[0].strip() == text.strip()


def test_the_page_names_the_rank_that_is_the_default() -> None:
    assert f"The default stays {LoraSpec().rank}, the paper's." in PAGE.read_text()


def test_the_figure_is_that_of_the_results(measured: list[Run]) -> None:
    assert not compared(measured) or FIGURE.read_bytes() == scores_figure(measured)
