"""A step's data and learning rate depend on the step alone; limits of attempts."""

from pathlib import Path
from typing import Any

from qlora_api.contract import ExitCode
from qlora_trainer.core.environment import available_cpus
from qlora_trainer.training.checkpoints.attempts import Attempt, read_attempts, reject_if_stuck, write_attempts
from qlora_trainer.training.checkpoints.time_spent import Pace
from qlora_trainer.training.optimizer import learning_rate
from qlora_trainer.training.schedule import Schedule
from tests.support.failures import failing
from tests.support.resolved import resolved_training


def schedule(sequences: int, **training: Any) -> Schedule:
    return Schedule.from_training(
        sequences, resolved_training(**({"gradient_accumulation_steps": 2, "micro_batch_size": 2} | training))
    )


def seen(steps: range, of: Schedule) -> list[int]:
    """The sequences of these steps, in order."""
    return [index for step in steps for micro_batch in of.micro_batches(step) for index in micro_batch]


def test_every_epoch_sees_every_sequence_once_in_another_order() -> None:
    three_epochs = schedule(11, epochs=3)

    assert three_epochs.total_steps == 9
    epochs = [seen(range(first, first + 3), three_epochs) for first in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert three_epochs.micro_batches(2) == [tuple(epochs[0][8:10]), (epochs[0][10],)]


def test_the_order_comes_from_the_seed() -> None:
    assert schedule(50, seed=1).micro_batches(3) == schedule(50, seed=1).micro_batches(3)
    assert schedule(50, seed=1).micro_batches(3) != schedule(50, seed=2).micro_batches(3)


def test_max_steps_continues_into_further_epochs_and_stops_in_the_middle_of_one() -> None:
    four = schedule(6, max_steps=5)

    assert four.total_steps == 5
    assert [four.epoch(step) for step in (0, 1, 2, 3, 5)] == [0.0, 4 / 6, 1.0, 1 + 4 / 6, 2 + 4 / 6]
    assert four.position(3) == (1, 4)


def test_one_epoch_is_the_default() -> None:
    assert schedule(8).total_steps == 2


def rates(steps: int, **training: Any) -> list[float]:
    spec = resolved_training(learning_rate=1.0, **training)
    return [round(learning_rate(step, steps, spec), 4) for step in range(steps)]


def test_the_rate_rises_over_the_warm_up_and_then_stays_or_falls() -> None:
    assert rates(5) == [1.0] * 5
    assert rates(5, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(5, scheduler="linear") == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates(5, scheduler="linear", warmup_steps=1) == [0.5, 1.0, 0.75, 0.5, 0.25]
    assert rates(4, scheduler="cosine") == [1.0, 0.8536, 0.5, 0.1464]
    assert rates(3, scheduler="cosine", warmup_steps=9) == [0.1, 0.2, 0.3]


def test_time_left_counts_steps_and_evaluations_at_their_own_pace() -> None:
    pace = Pace()
    assert pace.remaining_seconds(10, 2) is None
    pace = pace.after_evaluation(30.0).after_step(2.0, 400)

    assert pace.tokens_per_second == 200.0
    assert pace.remaining_seconds(10, 2) == 10 * 2.0 + 2 * 30.0
    assert 2.0 < (pace.after_step(4.0, 400).seconds_per_step or 0.0) < 4.0


TIME = "2026-01-02T03:04:05Z"


def attempts(*ends: str | None, from_steps: tuple[int, ...] | None = None) -> list[Attempt]:
    """Attempts that ended so, each from a later checkpoint by default."""
    steps = from_steps or tuple(range(len(ends)))
    return [
        Attempt.model_validate(
            {"pod_uid": f"pod-{n}", "job_attempt": 1, "started_at": TIME, "from_step": step, "ended": end}
        )
        for n, (end, step) in enumerate(zip(ends, steps, strict=True))
    ]


def test_five_consecutive_kills_at_one_checkpoint_end_the_job() -> None:
    stuck = attempts("interrupted", *[None] * 5, from_steps=(0, 3, 3, 3, 3, 3))
    reject_if_stuck(stuck[:-1], 3, 1)
    reject_if_stuck(stuck, 4, 1)

    with failing(ExitCode.RETRIES_EXHAUSTED, "5 attempts in a row were killed before a checkpoint after step 3"):
        reject_if_stuck(stuck, 3, 1)


def test_interrupted_attempts_and_those_of_an_earlier_job_do_not_count() -> None:
    reject_if_stuck(attempts(*["interrupted"] * 50, from_steps=(0,) * 50), 0, 1)
    reject_if_stuck(attempts(*[None] * 5, from_steps=(3,) * 5), 3, 2)


def test_a_job_in_the_pod_of_another_is_not_stopped_by_its_attempts() -> None:
    """Each attempt counts for the other one's Job, or for the continued run."""
    led = [attempt.model_copy(update={"job_attempt": 0}) for attempt in attempts(*[None] * 6, from_steps=(3,) * 6)]
    reject_if_stuck(led, 3, 0)
    reject_if_stuck(led, 3, 1)


def test_attempts_are_read_back_without_lines_that_are_not_attempts(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    before = attempts("interrupted", None)
    write_attempts(tmp_path, before)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write("{not json\n")

    assert read_attempts(tmp_path) == before
    assert (tmp_path / "attempts.jsonl").read_text().count("\n") == 3


def test_threads_keep_to_the_containers_limit(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    everything = available_cpus(quota, {})
    quota.write_text("max 100000\n")
    assert available_cpus(quota, {}) == everything
    quota.write_text("100000 100000\n")
    assert available_cpus(quota, {}) == 1
    quota.write_text("50000 100000\n")
    assert available_cpus(quota, {}) == 1


def test_threads_are_those_of_the_pods_request(tmp_path: Path) -> None:
    assert available_cpus(tmp_path / "none", {"OMP_NUM_THREADS": "1"}) == 1
    assert available_cpus(tmp_path / "none", {"OMP_NUM_THREADS": "1000"}) == available_cpus(tmp_path / "none", {})
