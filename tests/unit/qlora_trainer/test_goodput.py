"""Goodput: what the attempts' records say about the time that is in the adapter."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora_trainer.core.failures import Interrupted
from qlora_trainer.training.checkpoints.attempts import (
    ATTEMPTS_FILE,
    Attempt,
    PodOfJob,
    read_attempts,
    recorded_attempt,
    reopened_attempt,
    show_life,
    write_attempts,
)
from qlora_trainer.training.checkpoints.time_spent import goodput, spent_seconds

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def attempt(started: float, ended: float | None) -> Attempt:
    return Attempt(
        pod_uid="pod",
        started_at=after(started).isoformat(),
        from_step=0,
        ended_at=None if ended is None else after(ended).isoformat(),
    )


def test_time_between_attempts_does_not_count() -> None:
    attempts = [attempt(0, 600), attempt(1000, 1300), attempt(2000, None)]

    spent = spent_seconds(attempts, after(2100))

    assert spent == 600 + 300 + 100
    assert goodput(950, spent) == 0.95


def test_an_attempt_without_an_end_ended_when_the_next_one_started() -> None:
    assert spent_seconds([attempt(0, None), attempt(60, 100), attempt(1000, None)], after(1010)) == 60 + 40 + 10


def test_a_process_that_reads_no_attempts_has_no_goodput() -> None:
    spent = spent_seconds([], START)

    assert spent == 0
    assert goodput(10.0, spent) is None


def test_clocks_that_differ_give_no_share_below_zero_or_above_one() -> None:
    assert spent_seconds([attempt(10, 5), attempt(0, 2)], START) == 2
    assert goodput(3, 2) == 1.0


def test_a_run_that_has_just_begun_has_no_goodput() -> None:
    assert goodput(0.0, 0.5) is None


def test_an_attempt_counts_from_the_start_of_its_process_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), recorded_attempt(tmp_path, 0, PodOfJob("a", 1, START), lambda: after(60.25)):
        raise Interrupted(1, 2, 1)

    (found,) = read_attempts(tmp_path)
    assert (found.started_at, found.ended_at) == ("2026-01-02T03:04:05.000Z", "2026-01-02T03:05:05.250Z")


def test_the_last_sign_of_life_ends_an_attempt_that_was_killed(tmp_path: Path) -> None:
    write_attempts(tmp_path, [attempt(0, 30), attempt(100, None)])
    show_life(tmp_path)
    seen = after(190).timestamp()
    os.utime(tmp_path / ATTEMPTS_FILE, (seen, seen))

    with recorded_attempt(tmp_path, 0, PodOfJob("c", 1, after(300)), lambda: after(400)):
        running = read_attempts(tmp_path)

    assert spent_seconds(running, after(310)) == 30 + 90 + 10
    assert [found.ended for found in read_attempts(tmp_path)] == [None, None, "succeeded"]


def test_a_sign_of_life_is_newer_than_the_last_one(tmp_path: Path) -> None:
    write_attempts(tmp_path, [attempt(0, None)])
    os.utime(tmp_path / ATTEMPTS_FILE, (0, 0))

    show_life(tmp_path)

    assert (tmp_path / ATTEMPTS_FILE).stat().st_mtime > 0
    assert len(read_attempts(tmp_path)) == 1


def test_a_run_outlives_the_record_of_its_attempts(tmp_path: Path) -> None:
    with recorded_attempt(tmp_path, 0, PodOfJob("a", 1, START), lambda: after(60)):
        (tmp_path / ATTEMPTS_FILE).unlink()
        show_life(tmp_path)

    assert [found.ended for found in read_attempts(tmp_path)] == ["succeeded"]


def test_what_follows_the_training_decides_how_its_attempt_has_ended(tmp_path: Path) -> None:
    with recorded_attempt(tmp_path, 0, PodOfJob("a", 1, START), lambda: after(60)):
        pass
    (trained,) = read_attempts(tmp_path)

    with reopened_attempt(tmp_path, "a", lambda: after(70)):
        (killed_here,) = read_attempts(tmp_path)
    (scored,) = read_attempts(tmp_path)
    with pytest.raises(ValueError, match="no score"), reopened_attempt(tmp_path, "a", lambda: after(90)):
        raise ValueError("no score")
    (failed,) = read_attempts(tmp_path)

    ends = [found.ended for found in (trained, killed_here, scored, failed)]
    assert ends == ["succeeded", None, "succeeded", "failed"]
    assert failed == trained.model_copy(update={"ended": "failed", "ended_at": "2026-01-02T03:05:35.000Z"})


def test_what_follows_the_training_changes_no_attempt_of_another_pod(tmp_path: Path) -> None:
    with recorded_attempt(tmp_path, 0, PodOfJob("other", 1, START), lambda: after(60)):
        pass
    before = read_attempts(tmp_path)

    with pytest.raises(Interrupted), reopened_attempt(tmp_path, "a", lambda: after(90)):
        raise Interrupted(6, 6, 6)

    assert read_attempts(tmp_path) == before


def test_a_process_started_before_its_first_line_ran() -> None:
    program = "from qlora_trainer.core.environment import process_started; print(process_started().isoformat())"
    before = datetime.now(UTC)
    started = datetime.fromisoformat(subprocess.check_output([sys.executable, "-c", program], text=True).strip())

    # The kernel counts in hundredths of a second.
    assert before - timedelta(seconds=0.1) < started < datetime.now(UTC)
