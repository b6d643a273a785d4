"""What the benchmarks make of what they have measured, and what they say of the code that was measured."""

import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.base import summary
from benchmarks.base.worker import read_bytes
from benchmarks.loop import Alternation, Pair, Span, overhead
from benchmarks.machine import describe_checkout
from benchmarks.operator import arrival_table, audit, day, progress, seeding, simulation, table, trainer
from benchmarks.speed.summary import figures, seconds_to
from qlora_api.contract import ProgressRecord, decode_record
from qlora_api.naming import JOB_UID_LABEL, STEP_LABEL


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


def start(seconds: float, read: int) -> dict[str, float]:
    """What a start of the train step took."""
    return {"secondsToLoaded": seconds / 2, "secondsToFirstStep": seconds, "readBytes": read, "peakBytes": 3 * 2**20}


def test_the_figures_of_the_base_are_medians_and_memory_above_the_libraries() -> None:
    quantizer = {"bytesPerSecond": 50e6, "aboveBytes": 70, "weightBytes": 10}
    made = {
        "name": "Llama",
        "parameters": 1_500_000_000,
        "originalBytes": 3 * 10**9,
        "baseBytes": 10**9,
        "seconds": 41.4,
        "peakBytes": 10**9,
        "peakAnonymousBytes": 50 * 2**20,
        "librariesBytes": 20 * 2**20,
    }
    measured = {
        "quantizer": dict.fromkeys(summary.NAMES, quantizer),
        "bases": [made],
        "start": {
            "before": [start(seconds, 300 * 2**20) for seconds in (30.0, 20.0, 90.0)],
            "after": [start(seconds, 100 * 2**20) for seconds in (12.0, 10.0, 11.0)],
        },
    }

    shown = summary.tables({"repetitions": 3, "figures": summary.figures(measured)})

    assert "| bitsandbytes, the whole weight | 50 | 7.0 |" in shown
    assert "| Llama, 1.50B | 3.00 | 1.00 | 41 | 30 |" in shown
    assert "| The train step quantizes the original | 15.0 | 30.0 | 300 | 3 |" in shown
    assert "| The train step maps the base that `prepare` made | 5.5 | 11.0 | 100 | 3 |" in shown


def test_what_was_read_from_storage_is_what_the_kernel_says() -> None:
    assert read_bytes(["rchar: 7", "read_bytes: 4096", "cancelled_write_bytes: 0"]) == 4096
    with pytest.raises(LookupError, match="read_bytes"):
        read_bytes(["rchar: 7"])


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
        "processorMillisecondsPerJob": {subject: {"untilQuiet": 5.0}, "apiServer": {"untilQuiet": 20.0}},
        "residentMiB": {"idle": 80.0, "peak": 90.0},
        "storedBytes": {"QLoRAJob": 1024, "Job": 2048},
    }


def test_the_table_of_many_jobs_shows_the_run_with_the_median_rate() -> None:
    runs = [operator_run("operator", rate) for rate in (50.0, 70.0, 60.0)]
    runs += [operator_run("floor", rate) for rate in (100.0, 90.0, 80.0)]
    runs += [operator_run("kubeflow-trainer", 20.0)]
    shown = arrival_table.tables({"runs": [*runs, operator_run("operator", 40.0, 1000)]})
    assert (
        "| 500 jobs in one burst | This operator | A script that creates the objects | Kubeflow Trainer |" in shown
    )
    assert "| First Jobs per second | 60 | 90 | 20 |" in shown
    assert "| 1,000 jobs in one burst | This operator |\n| --- | --- |\n| First Jobs per second | 40 |" in shown
    assert "| Seconds until one has it, median / 99th percentile | 1.0 / 60.0 | 1.0 / 90.0 | 1.0 / 20.0 |" in shown
    assert "| all of them | 3.0 |" in shown
    assert "| 500 jobs: ≥ 63 first Jobs per second | 60.0 | missed |" in shown
    assert "| 500 jobs: 99 % have their status ≤ 8 s later | 3.0 | met |" in shown
    assert "| 1,000 jobs: memory of the operator ≤ 110 MiB | 90.0 | met |" in shown


def test_what_is_not_measured_of_others_is_not_shown_of_them() -> None:
    other = operator_run("kubeflow-trainer", 20.0)
    del other["secondsFromFirstJobToStatus"]
    shown = arrival_table.tables({"runs": [operator_run("operator", 60.0), other]})
    assert "| Seconds from there to its status, median / 99th percentile | 2.0 / 3.0 | – |" in shown


def test_the_tables_are_put_where_the_page_has_a_place_for_them(tmp_path: Path) -> None:
    page = tmp_path / "scale.md"
    other = f"{table.begin('day')}{table.end('day')}"
    page.write_text(f"before\n\n{table.begin('arrival')}\nold\n\n{table.end('arrival')}\nbetween\n\n{other}after\n")
    for tables in ("| first |\n", "| second |\n"):
        table.write("arrival", tables, page)
    text = page.read_text()
    assert text == (
        f"before\n\n{table.begin('arrival')}\n| second |\n\n{table.end('arrival')}\nbetween\n\n{other}after\n"
    )


def line(verb: str, resource: str, agent: str = "qlora-operator", stage: str = "ResponseComplete") -> bytes:
    """A line of the audit log."""
    kind, _, subresource = resource.partition("/")
    reference = {"resource": kind, "namespace": "team", "name": "a"} | (
        {"subresource": subresource} if subresource else {}
    )
    entry = {
        "stage": stage,
        "verb": verb,
        "userAgent": agent,
        "objectRef": reference,
        "requestURI": "/apis",
        "requestReceivedTimestamp": "2026-01-02T03:04:05.250000Z",
        "responseStatus": {"code": 200},
    }
    return json.dumps(entry).encode() + b"\n"


def test_requests_are_counted_once_and_without_watches_and_those_of_others() -> None:
    log = [
        line("get", "pods/log", stage="ResponseStarted"),
        line("get", "pods/log"),
        line("watch", "pods", agent="kopf/1"),
        line("list", "pods", agent="kopf/1"),
        line("patch", "qlorajobs/status"),
        line("patch", "jobs/status", agent="kube-controller-manager"),
        line("create", "jobs")[:-20],
    ]
    found = list(audit.parse(log))
    assert [(request.call, request.writes) for request in found] == [
        ("get pods/log", False),
        ("list pods", False),
        ("patch qlorajobs/status", True),
    ]
    assert audit.by_call(found, per=2) == {"get pods/log": 0.5, "list pods": 0.5, "patch qlorajobs/status": 0.5}
    assert found[0].seconds % 60 == pytest.approx(5.25)


def asked(verb: str, resource: str, name: str = "", seconds: float = 0.0, code: int = 200) -> audit.Request:
    return audit.Request(verb, resource, "team", name, seconds, code)


def test_the_rate_of_status_writes_is_that_of_each_job_between_its_first_and_its_last() -> None:
    often = [asked("patch", "qlorajobs/status", "a", seconds) for seconds in (12.0, 2.0, 7.0)]
    seldom = [asked("patch", "qlorajobs/status", "b", seconds) for seconds in (0.0, 20.0)]
    others = [asked("get", "pods/log", "a", 3.0), asked("patch", "qlorajobs/status", "c", 3.0)]
    assert progress.status_writes([*often, *seldom, *others]) == {
        "perJobAndTenSeconds": 1.25,
        "ofTheBusiestJob": 2.0,
        "shortestPauseSeconds": 5.0,
    }
    assert progress.status_writes(others) == {}


def test_a_resync_is_one_list_of_each_kind_however_many_pages_it_has() -> None:
    kinds = ("pods", "qlorajobs", "qlorajobs", "jobs", "pods", "qlorajobs", "jobs", "jobs", "pods")
    lists = [audit.Request("list", kind, "", "", float(second), 200) for second, kind in enumerate(kinds)]
    of_one_job = [asked("list", "jobs", seconds=2.5), asked("get", "jobs", seconds=2.6)]
    assert day.resyncs([*lists[:3], *of_one_job, *lists[3:]]) == [(1.0, 4.0), (5.0, 8.0)]


def test_memory_that_grows_is_told_from_memory_that_varies() -> None:
    assert day.figures_of_memory([100.0, 104.0, 102.0, 101.0] * 4)["growth"] == 0
    grows = day.figures_of_memory([100.0 + second for second in range(16)])
    assert grows == {"firstQuarter": 101.5, "lastQuarter": 113.5, "growth": 12.0, "peak": 115.0}


def test_a_step_with_two_jobs_is_found() -> None:
    children = [
        {"metadata": {"labels": {JOB_UID_LABEL: uid, STEP_LABEL: step}}}
        for uid, step in (("a", "prepare"), ("a", "train"), ("b", "prepare"), ("b", "prepare"))
    ]
    created = [asked("create", "jobs", code=code) for code in (201, 201, 201, 201, 409)]
    assert simulation.batch_jobs(children, [*created, asked("delete", "jobs")]) == {
        "there": 4,
        "created": 4,
        "deleted": 1,
        "stepsWithSeveral": 1,
    }


def test_a_copy_of_a_job_has_its_own_name_and_uids_everywhere() -> None:
    child = {
        "metadata": {
            "name": "old-train-1",
            "namespace": "team",
            "uid": "uid-2",
            "resourceVersion": "7",
            "labels": {JOB_UID_LABEL: "uid-1"},
            "ownerReferences": [{"name": "old", "uid": "uid-1"}],
        },
        "spec": {"args": ["--job=old"]},
        "status": {"succeeded": 1},
    }
    assert seeding.bare(child, {"old": "new", "uid-1": "uid-9"}) == {
        "metadata": {
            "name": "new-train-1",
            "namespace": "team",
            "uid": "uid-2",
            "labels": {JOB_UID_LABEL: "uid-9"},
            "ownerReferences": [{"name": "new", "uid": "uid-9"}],
        },
        "spec": {"args": ["--job=new"]},
    }


def test_what_the_played_trainer_reports_is_what_the_operator_reads() -> None:
    began = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert trainer.log("job", "pod", "train", began, began) == ""
    lines = trainer.log("job", "pod", "train", began, began + timedelta(seconds=61)).splitlines()
    records = [decode_record(each, job_uid="job", pod_uid="pod") for each in lines]
    assert [record.training_step for record in records if isinstance(record, ProgressRecord)] == [10, 11, 12]
    for step in ("prepare", "train", "publish", "clean"):
        assert decode_record(trainer.result("job", "pod", step, began), job_uid="job", pod_uid="pod") is not None
