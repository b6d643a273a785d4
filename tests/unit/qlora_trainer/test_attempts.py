"""A run's records of attempts: its goodput, and the time, cost and loss of each attempt."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.core.completion import RunUsage
from qlora_trainer.core.failures import Interrupted
from qlora_trainer.report.page import estimated_peaks, resources_used
from qlora_trainer.training.checkpoints import attempts
from qlora_trainer.training.checkpoints.attempts import (
    ATTEMPTS_FILE,
    Attempt,
    PodOfJob,
    note_time,
    read_attempts,
    recorded_attempt,
    reopened_attempt,
    show_life,
    write_attempts,
)
from qlora_trainer.training.checkpoints.time_spent import goodput, run_usage, spent_seconds
from tests.support.builders import MEMORY

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def attempt(started: float, until: float | None, **more: Any) -> Attempt:
    """Seconds after START, in fields whose names end with `_at` too."""
    times = {name: after(value).isoformat() for name, value in more.items() if name.endswith("_at")}
    others = {name: value for name, value in more.items() if not name.endswith("_at")}
    end = None if until is None else after(until).isoformat()
    return Attempt.model_validate(
        {"pod_uid": "pod", "from_step": 0, "started_at": after(started).isoformat(), "ended_at": end} | times | others
    )


def test_time_between_attempts_does_not_count() -> None:
    spent = spent_seconds([attempt(0, 600), attempt(1000, 1300), attempt(2000, None)], after(2100))

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


def test_the_last_heartbeat_ends_a_killed_attempt(tmp_path: Path) -> None:
    write_attempts(tmp_path, [attempt(0, 30), attempt(100, None)])
    show_life(tmp_path)
    seen = after(190).timestamp()
    os.utime(tmp_path / ATTEMPTS_FILE, (seen, seen))

    with recorded_attempt(tmp_path, 0, PodOfJob("c", 1, after(300)), lambda: after(400)):
        running = read_attempts(tmp_path)

    assert spent_seconds(running, after(310)) == 30 + 90 + 10
    assert [found.ended for found in read_attempts(tmp_path)] == [None, None, "succeeded"]


def test_a_heartbeat_is_newer_than_the_last_one(tmp_path: Path) -> None:
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


def test_the_steps_after_training_decide_the_ending_of_its_attempt(tmp_path: Path) -> None:
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


def test_the_steps_after_training_change_no_attempt_of_another_pod(tmp_path: Path) -> None:
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


def four_attempts() -> RunUsage:
    return run_usage(
        [
            # Killed: it had saved at 500.
            attempt(0, 600, trained_at=100, saved_at=500),
            # Failed while it loaded.
            attempt(700, 730, from_step=4, ended="failed"),
            # Asked to stop before its first checkpoint was due, which it saved then.
            attempt(800, 900, from_step=4, trained_at=850, saved_at=899, ended="interrupted"),
            attempt(1000, None, from_step=9, trained_at=1020, saved_at=1050),
        ],
        2,
        after(1100),
    )


def test_steps_in_no_checkpoint_are_lost() -> None:
    usage = four_attempts()
    assert [each.lost_seconds for each in usage.attempts] == [100, 30, 1, 0]
    assert [each.startup_seconds for each in usage.attempts] == [100, None, 50, 20]
    assert [each.ended for each in usage.attempts] == [None, "failed", "interrupted", "succeeded"]
    assert (usage.seconds, usage.startup_seconds, usage.lost_seconds) == (830, 170, 131)


def test_the_report_has_time_and_cost_of_each_attempt() -> None:
    shown = resources_used(four_attempts(), "cuda")
    assert shown.summary.startswith("0.46 GPU hours: 4 attempts on 2 GPUs, 13m50s in all.")
    priced = resources_used(four_attempts(), "cuda", "2.50 EUR").summary
    assert priced.startswith("0.46 GPU hours (1.15 EUR): 4 attempts on 2 GPUs")
    assert priced.endswith("an interruption has undone (0.18 EUR).")
    assert "2m50s went into loading, and 2m11s into work that an interruption has undone" in shown.summary
    assert [row[1:] for row in shown.rows][:2] == [
        ("10m0s", "1m40s", "0", "killed", "1m40s"),
        ("30s", "–", "4", "failed", "30s"),
    ]


def test_the_estimate_is_drawn_with_the_measured_peaks() -> None:
    assert estimated_peaks(MEMORY) == (("estimate", 10.0), ("estimate, high", 11.0))


def test_only_the_latest_attempts_are_listed_and_all_are_counted() -> None:
    usage = run_usage([attempt(10 * number, 10 * number + 4, trained_at=10 * number) for number in range(60)], 1, START)
    assert (usage.count, len(usage.attempts), usage.seconds) == (60, 50, 240)


def test_an_attempt_notes_when_it_trained_and_saved(tmp_path: Path) -> None:
    with recorded_attempt(tmp_path, 0, PodOfJob("a", 1, START), lambda: after(60)):
        note_time(tmp_path, "a", "trained_at", after(20))
        note_time(tmp_path, "a", "saved_at", after(30))
        note_time(tmp_path, "b", "saved_at", after(40))
        # If it is killed now, only that is recorded.
        (running,) = read_attempts(tmp_path)
    assert (running.trained_at, running.saved_at) == ("2026-01-02T03:04:25.000Z", "2026-01-02T03:04:35.000Z")
    assert running.ended is None
    (ended,) = read_attempts(tmp_path)
    assert ended == running.model_copy(update={"ended": "succeeded", "ended_at": "2026-01-02T03:05:05.000Z"})


def test_a_full_volume_loses_the_record_of_an_attempt_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded_attempt(tmp_path, 0, PodOfJob("pod", 1, START), lambda: after(60)):
        with monkeypatch.context() as patch:
            patch.setattr(attempts, "write_atomically", full)
            note_time(tmp_path, "pod", "trained_at", START)
            note_time(tmp_path, "pod", "saved_at", START)
        note_time(tmp_path, "pod", "saved_at", after(5))
    assert read_attempts(tmp_path)[-1].saved_at is not None


def full(*_: object) -> None:
    raise OSError(ENOSPC, "No space left on device")
