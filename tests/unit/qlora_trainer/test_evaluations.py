"""Which evaluation is the best, and when a run has no patience left."""

import pytest

from qlora_api.spec.resolved import ResolvedTraining
from qlora_api.spec.training import EarlyStoppingSpec
from qlora_api.steps import too_few_evaluations
from qlora_trainer.training.progress.evaluations import expected_end
from tests.support.resolved import resolved_training

Curve = list[tuple[int, float]]


def training(keep: str = "best", patience: int | None = None, min_delta: float = 0.0) -> ResolvedTraining:
    stopping = None if patience is None else EarlyStoppingSpec(patience=patience, min_delta=min_delta)
    return resolved_training(keep=keep, early_stopping=stopping, eval_every_steps=10)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([2.0, 1.5, 1.2, 1.4], 20),
        ([2.0, 1.2, 1.2, 1.2], 10),  # of equal ones the first
        ([2.0, 1.5, 1.4, 1.3], 30),
        ([1.0, 1.5, 1.2, 1.4], 20),  # the untrained adapter cannot be kept
    ],
)
def test_the_best_adapter_is_the_first_trained_one_with_the_lowest_loss(losses: list[float], step: int) -> None:
    curve = [(10 * number, loss) for number, loss in enumerate(losses)]
    assert expected_end(training("best"), 30, curve) == (30, step)
    assert expected_end(training("last"), 30, curve) == (30, 30)


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "end"),
    [
        (1, 0.0, [2.0, 1.5, 1.5], 20),  # an equal loss is no improvement
        (2, 0.0, [2.0, 1.5, 1.6, 1.4, 1.5, 1.5], 50),  # one that is lower restarts the count
        (2, 0.0, [2.0, 1.5, 1.6, 1.55, 1.1], 30),  # lower than the one before, but not than the lowest
        (3, 0.0, [2.0, 1.5, 1.6, 1.7], 100),
        (1, 0.25, [2.0, 1.75, 1.0], 10),  # exactly minDelta is not more than it
        (1, 0.25, [2.0, 1.5, 1.0, 0.8], 30),
        (2, 0.25, [2.0, 1.9, 1.8, 1.7], 20),  # each a little below the lowest so far
        (2, 0.0, [1.0, 1.3, 1.2, 1.1], 20),  # nothing that is better than before training
        (1, 0.0, [2.0], 100),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_improvement(
    patience: int, min_delta: float, losses: list[float], end: int
) -> None:
    curve = [(10 * number, loss) for number, loss in enumerate(losses)]
    assert expected_end(training("last", patience, min_delta), 100, curve) == (end, end)


def test_a_run_that_stops_early_keeps_the_best_before_its_end() -> None:
    curve = [(0, 2.0), (10, 1.5), (20, 1.2), (30, 1.3), (40, 1.4), (50, 0.1)]
    assert expected_end(training("best", patience=2), 100, curve) == (40, 20)


def test_improvements_too_small_to_count_are_still_kept() -> None:
    curve = [(0, 2.0), (10, 1.9), (20, 1.8)]
    assert expected_end(training("best", patience=2, min_delta=0.25), 100, curve) == (20, 20)


CHOOSES = "keep: best has only the last adapter to choose from"
NEVER = "earlyStopping with patience 3 ends nothing early"


@pytest.mark.parametrize(
    ("keep", "patience", "steps", "found", "without_effect"),
    [
        ("best", None, 10, "no evaluations", CHOOSES),  # the one after step 10 is that at the end
        ("best", None, 11, "", ""),
        ("last", 3, 30, "2 evaluations", NEVER),
        ("last", 3, 20, "1 evaluation", NEVER),
        ("last", 3, 31, "", ""),
        ("best", 3, 5, "no evaluations", f"{CHOOSES} and {NEVER}"),
        ("last", None, 5, "", ""),
    ],
)
def test_settings_that_need_more_evaluations_than_the_run_has_are_named(
    keep: str, patience: int | None, steps: int, found: str, without_effect: str
) -> None:
    remark = too_few_evaluations(training(keep, patience), steps)
    if not without_effect:
        assert remark is None
        return
    said = f"spec.training.evalEverySteps is 10 and the run has {steps} steps, with {found} between its start and its"
    assert remark == f"{said} end: {without_effect}; a run with a lower evalEverySteps has more"


def test_a_run_with_too_few_evaluations_ends_as_in_the_remark() -> None:
    """For any losses that rise from the start, where a run would stop or keep another."""
    assert expected_end(training("best", 3), 10, [(0, 1.0), (10, 9.0)]) == (10, 10)
    assert expected_end(training("last", 3), 30, [(0, 1.0), (10, 7.0), (20, 8.0), (30, 9.0)]) == (30, 30)
    assert expected_end(training("last", 3), 31, [(0, 1.0), (10, 7.0), (20, 8.0), (30, 9.0)]) == (30, 30)
