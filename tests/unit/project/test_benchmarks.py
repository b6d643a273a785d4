"""What the benchmarks make of what they have measured, and what they say of the code that was measured."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.loop import Alternation, Pair, Span, overhead
from benchmarks.machine import describe_checkout
from benchmarks.operator import table
from benchmarks.speed.summary import figures, seconds_to


def measured(peak: int = 1000, loaded: int = 400, step_peak: int = 900, seconds: float = 10.0) -> dict[str, Any]:
    """A repetition of three steps of 100 tokens, `seconds` each, whose loss falls from 3.0 by a half each."""
    return {
        "peakBytes": peak,
        "loaded": {"residentBytes": loaded},
        "steps": [{"seconds": seconds * step, "tokens": 100, "peakBytes": step_peak} for step in (1, 2, 3)],
        "evalLosses": {"1": 2.5, "2": 2.0, "3": 1.5},
    }


@pytest.mark.parametrize(
    ("target", "seconds"), [(3.5, 0.0), (2.75, 5.0), (2.5, 10.0), (2.4, 12.0), (1.5, 30.0), (1.4, None)]
)
def test_the_time_to_a_loss_lies_on_the_line_between_two_snapshots(target: float, seconds: float | None) -> None:
    assert seconds_to(target, 3.0, measured()) == (None if seconds is None else pytest.approx(seconds))


def test_every_figure_is_the_median_of_the_repetitions() -> None:
    repetitions = [measured(), measured(5000, 300, 1300, seconds=2.0), measured(900, 500, 2000, seconds=20.0)]

    found = figures(repetitions, 3.0, 2.0)

    assert found.peak_bytes == 1000
    assert found.loaded_bytes == 400
    assert found.above_loaded_bytes == 1000
    assert found.tokens_per_second == pytest.approx(10.0)
    assert found.seconds_to_target == pytest.approx(20.0)


def test_a_loss_that_one_repetition_has_not_reached_is_not_reached() -> None:
    assert figures([measured(), measured() | {"evalLosses": {"1": 2.9}}], 3.0, 2.0).seconds_to_target is None


def test_the_overhead_is_told_with_its_quartiles_by_either_clock_and_without_the_optimizer() -> None:
    pairs = [
        Pair("loop", Span(10.0 + extra, 20.0 + extra), Span(1.0, 1.0), Span(10.0, 20.0)) for extra in (5, 1, 2, 3, 4)
    ]

    found = overhead(pairs)

    by_wall_time = found["wall time"]
    assert (by_wall_time.lower_quartile, by_wall_time.median, by_wall_time.upper_quartile) == pytest.approx(
        (0.2, 0.3, 0.4)
    )
    assert found["processor time"].median == pytest.approx(0.15)
    assert found["processor time without the optimizer"].median == pytest.approx(0.1)


def test_the_bare_passes_come_after_the_step_and_before_it_in_turn_and_take_nothing_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, order = SimpleNamespace(now=0.0), []
    batches: Iterator[str] = iter("abcde")
    monkeypatch.setattr(Span, "now", lambda: Span(clock.now, clock.now))

    def bare_passes(_run: object, batches: list[Any]) -> Span:
        order.append(f"bare {batches[0]}")
        clock.now += 100
        return Span(99.0, 99.0)

    alternation = Alternation(lambda _run: [(next(batches), True)], bare_passes)
    for _ in range(5):
        ((batch, _counts),) = alternation.read("run")
        order.append(f"loop {batch}")
        clock.now += 7
        alternation.before_optimizer(None, None, None)
        clock.now += 2
        alternation.after_optimizer(None, None, None)

    # The first step pays for what is made once.
    assert order == ["loop a", "loop b", "bare b", "bare c", "loop c", "loop d", "bare d", "bare e", "loop e"]
    assert [pair.first for pair in alternation.pairs] == ["loop", "bare", "loop", "bare"]
    assert {(pair.loop, pair.optimizer, pair.bare) for pair in alternation.pairs} == {
        (Span(9.0, 9.0), Span(2.0, 2.0), Span(99.0, 99.0))
    }


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_result_names_its_commit_and_whether_the_code_was_changed_and_not_whether_results_were(
    tmp_path: Path,
) -> None:
    assert describe_checkout(tmp_path) == (None, None)
    code, result = tmp_path / "trainer.py", tmp_path / "benchmarks" / "results" / "loop.json"
    result.parent.mkdir(parents=True)
    for file in (code, result):
        file.write_text("1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes").write_text("not tracked\n")
    result.write_text("2\n")
    assert describe_checkout(tmp_path) == (commit, False)
    code.write_text("2\n")
    assert describe_checkout(tmp_path) == (commit, True)
    assert describe_checkout(result.parent) == (None, None)


def operator_run(subject: str, rate: float, jobs: int = 500) -> dict[str, Any]:
    """A run of many jobs in which all figures follow from the rate."""
    return {
        "subject": subject,
        "jobs": jobs,
        "loadAverage": [0.1, 0.1, 0.1],
        "firstJobsPerSecond": rate,
        "secondsToAllFirstJobs": jobs / rate,
        "secondsToFirstJob": {"p50": 1.0, "p99": rate},
        "secondsFromFirstJobToStatus": {"p50": 2.0, "p99": 3.0},
        "allCallsPerJob": 4.01,
        "processorMillisecondsPerJob": {"operator": {"untilQuiet": 5.0}, "apiServer": {"untilQuiet": 20.0}},
        "residentMiB": {"idle": 80.0, "peak": 90.0},
        "storedBytes": {"QLoRAJob": 1024, "Job": 2048},
    }


def test_the_table_of_many_jobs_shows_the_run_with_the_median_rate() -> None:
    runs = [operator_run("operator", rate) for rate in (50.0, 70.0, 60.0)]
    runs += [operator_run("floor", rate) for rate in (100.0, 90.0, 80.0)]
    shown = table.figures({"runs": [*runs, operator_run("operator", 40.0, 1000), operator_run("floor", 95.0, 1000)]})
    assert "| First Jobs per second | 60 | 40 |" in shown
    assert "| of a script that does nothing else | 90 | 95 |" in shown
    assert "| Seconds until one has it, median / 99th percentile | 1.0 / 60.0 | 1.0 / 40.0 |" in shown
    assert "| all of them | 3.0 |" in shown
    assert "| 500 jobs: ≥ 63 first Jobs per second | 60.0 | missed |" in shown
    assert "| 500 jobs: 99 % have their status ≤ 8 s later | 3.0 | met |" in shown
    assert "| 1,000 jobs: memory of the operator ≤ 110 MiB | 90.0 | met |" in shown


def test_the_tables_are_put_where_the_page_has_a_place_for_them(tmp_path: Path) -> None:
    page = tmp_path / "scale.md"
    page.write_text(f"before\n\n{table._BEGIN}old\n{table._END}\n\nafter\n")
    for rate in (50.0, 70.0):
        table.write({"runs": [operator_run("operator", rate)]}, page)
    text = page.read_text()
    assert (text.count("First Jobs per second | 70"), "| 50 |" in text, "old" in text) == (1, False, False)
    assert text.startswith("before\n\n<!--")
    assert text.endswith("-->\n\nafter\n")
