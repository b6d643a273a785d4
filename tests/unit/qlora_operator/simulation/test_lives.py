"""Lives of jobs and sweeps in a played cluster: no invariant breaks, and everything ends."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.qlora_operator.simulation.machine import JobLives, Lives, SweepLives

_ACTIONS = 14


def live(lives: type[Lives], count: int) -> None:
    """Live so many lives. A failure prints the actions that lead to it."""
    limits = settings(max_examples=count, stateful_step_count=_ACTIONS, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lives, settings=limits)


def test_jobs_live_and_end_without_breaking_an_invariant() -> None:
    live(JobLives, 250)


def test_sweeps_live_and_end_without_breaking_an_invariant() -> None:
    live(SweepLives, 50)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("lives", "count"), [(JobLives, 16_000), (SweepLives, 4_000)])
def test_thousands_of_lives_break_no_invariant(lives: type[Lives], count: int) -> None:
    live(lives, count)
