"""The losses that a status keeps: few, spread over the run, and none of a part that is repeated."""

import functools
import itertools

import pytest

from qlora_api.loss_history import MAX_HISTORY_LENGTH, MAX_POINTS, with_losses

HEADER = "step,train_loss,valid_loss"
Point = tuple[int, float | None, float | None]


def after(*reports: Point) -> list[str]:
    """The lines after these reports."""
    table = functools.reduce(lambda table, report: with_losses(table, *report), reports, None)
    header, *lines = (table or HEADER).splitlines()
    assert header == HEADER
    return lines


def run(steps: int, every: int, *, evaluated: int) -> list[str]:
    """The lines of a run that reports every so many steps, and repeats the latest evaluation."""
    return after(*((step, 3 / step, 3 / (step - step % evaluated or 1)) for step in range(1, steps + 1, every)))


def test_a_point_has_the_losses_of_its_step_and_an_evaluation_once() -> None:
    assert after((0, None, None)) == []
    assert after((0, None, 3.5), (1, 3.123456789, 3.5), (2, 0.00034, 3.5), (2, 0.00033, 1.25), (2, 0.00033, 1.25)) == [
        "0,,3.5",
        "1,3.12346,",
        "2,0.00033,1.25",
    ]


def test_a_resumed_run_replaces_what_it_repeats() -> None:
    assert after((1, 3.0, None), (5, 2.0, 2.5), (9, 1.0, 1.5), (5, 2.1, None), (6, 1.9, 2.5)) == [
        "1,3,",
        "5,2.1,2.5",
        "6,1.9,",
    ]


@pytest.mark.parametrize(("steps", "every"), [(1000, 1), (100_000, 40), (5000, 7)])
def test_a_long_run_keeps_its_ends_and_evaluations_and_points_all_along(steps: int, every: int) -> None:
    lines = run(steps, every, evaluated=steps // 10)
    kept = [int(line.partition(",")[0]) for line in lines]
    assert (len(lines), kept[0], kept[-1]) == (MAX_POINTS, 1, range(1, steps + 1, every)[-1])
    assert kept == sorted(set(kept))
    assert max(later - earlier for earlier, later in itertools.pairwise(kept)) <= 4 * steps / MAX_POINTS
    assert sum(not line.endswith(",") for line in lines) >= 10


def test_more_evaluations_than_points_are_thinned_too_and_the_table_has_a_largest_size() -> None:
    far, wide = 2**53 - 1000, -1.23456e-300
    lines = after(*((far + number, wide, wide * number) for number in range(300)))
    assert (len(lines), lines[0].partition(",")[0]) == (MAX_POINTS, str(far))
    assert len("\n".join((HEADER, *lines))) <= MAX_HISTORY_LENGTH
