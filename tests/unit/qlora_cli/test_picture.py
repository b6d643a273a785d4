"""View of a job in a terminal and in a file at one moment."""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from qlora_api.contract import ProgressRecord, ResultRecord, encode_record
from qlora_cli.cluster.draw import Moment, draw_losses, end_of, line_of, picture
from qlora_cli.cluster.listing import job_table
from qlora_cli.cluster.watch import sentence
from qlora_client.jobs.job import Job
from qlora_client.jobs.pods import Event

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PROGRESS = {
    "step": 420,
    "totalSteps": 1000,
    "percent": 42,
    "loss": 1.23449,
    "evalLoss": 1.5,
    "tokensPerSecond": 12345.6,
    "summary": "42% 420/1000",
    "remaining": "1h12m",
}


def job(phase: str, message: str = "", **status: Any) -> Job:
    kind = phase if phase in ("Failed", "Suspended") else "Succeeded"
    conditions = [{"type": kind, "message": message}]
    metadata = {"name": "bot", "namespace": "team", "uid": "u", "creationTimestamp": CREATED.isoformat()}
    return Job({"metadata": metadata, "spec": {}, "status": {"phase": phase, "conditions": conditions, **status}})


def shown(moment: Moment, width: int = 100) -> list[str]:
    """The picture in a terminal without colors."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True, color_system=None)
    console.print(picture(moment, console, CREATED + timedelta(hours=2)))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (job("Pending"), "Pending"),
        (job("Queued", "waits for a GPU\nof the queue", progress={}), "Queued: waits for a GPU of the queue"),
        (
            job("Training", "trains", progress=PROGRESS),
            "Training: 42% 420/1000, loss 1.234, held-out 1.500, 12,346 tokens/s, 1h12m left",
        ),
        # The cause of its end is news, its progress is not.
        (job("Suspended", "a checkpoint is saved", progress=PROGRESS), "Suspended: a checkpoint is saved"),
        (job("Failed", "the loss is NaN", progress=PROGRESS), "Failed: the loss is NaN"),
    ],
)
def test_a_line_has_the_changes(given: Job, line: str) -> None:
    assert line_of(given) == line


def test_a_picture_has_bar_figures_curve_and_the_latest_events() -> None:
    events = [Event(CREATED + timedelta(minutes=n), "Normal", f"Reason{n}", "what happened") for n in range(8)]
    losses = {step: 3 - step / 400 for step in range(1, 421)}
    lines = shown(Moment(job("Training", progress=PROGRESS), losses, events))
    assert lines[0] == "bot  Training  2h0m"
    assert lines[1].startswith("━━━━")
    assert lines[2] == "42% 420/1000, loss 1.234, held-out 1.500, 12,346 tokens/s, 1h12m left"
    assert any("2.998" in line for line in lines)
    assert any("(step)" in line for line in lines)
    assert [line.split()[1] for line in lines[-5:]] == [f"Reason{n}:" for n in range(3, 8)]


@pytest.mark.parametrize("width", [30, 40, 60, 200])
def test_a_picture_fits_a_terminal_of_any_width(width: int) -> None:
    events = [Event(CREATED, "Warning", "Long", "word " * 80)]
    losses = {step: 3 - step / 400 for step in range(1, 421)}
    lines = shown(Moment(job("Training", progress=PROGRESS), losses, events), width)
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [44, 60, 80, 124])
def test_a_curve_is_not_cut_by_the_terminal(width: int) -> None:
    """The picture would cut it without a word."""
    curve = draw_losses({step: 3 - step / 400 for step in range(1, 421)}, width)
    assert width - 24 < max(map(len, curve.splitlines())) <= width
    assert "(step)" in curve


@pytest.mark.parametrize(
    "losses", [{}, {1: 1.0, 2: 1.0}, {1: 2.0, 2: 2.0, 3: 2.0}, {1: 1e-9, 2: 0.0, 3: -1.0}, {5: 1e30, 6: 1.0, 7: 2.0}]
)
def test_few_equal_and_extreme_losses_are_drawn_or_left_out(losses: dict[int, float]) -> None:
    curve = draw_losses(losses, 80)
    assert bool(curve) == (len(losses) > 2)
    assert all(len(line) <= 80 for line in curve.splitlines())


def test_the_end_has_the_address_of_the_adapter_or_a_remedy() -> None:
    adapter = {"uri": "pvc://a/b", "sha256": "f" * 64}
    assert end_of(job("Succeeded", adapter=adapter)) == (
        f"bot has succeeded: pvc://a/b (SHA-256 {'f' * 64})\nDownload it: qlora adapter bot --namespace team"
    )
    told = end_of(job("Failed", "no row fits: \x1b[2J"))
    assert told.startswith("bot has failed: no row fits: \\x1b[2J\n")
    assert "qlora logs bot --namespace team" in told
    assert "qlora retry bot --namespace team" in told


def test_the_table_draws_progress_on_a_terminal_only() -> None:
    jobs = [job("Training", progress=PROGRESS, failures=1, disruptions=1, usage={"gpuHours": "2.50"}), job("Pending")]
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=120, force_terminal=terminal, no_color=True, color_system=None)
        console.print(job_table(jobs, CREATED + timedelta(days=1), namespaces=False, bars=terminal))
        assert isinstance(console.file, io.StringIO)
        _, training, pending = console.file.getvalue().splitlines()
        assert ("━" in training) == terminal
        assert training.split()[-5:] == ["1.234", "1h12m", "2", "2.50", "1d0h"]
        assert pending.split() == ["bot", "Pending", "-", "-", "-", "-", "-", "1d0h"]


def test_the_table_names_a_run_that_learned_little_instead_of_its_progress() -> None:
    remark = "learned little: loss 5.12 to 5.08"
    console = Console(file=io.StringIO(), width=100, force_terminal=True, no_color=True, color_system=None)
    console.print(
        job_table(
            [job("Succeeded", progress=PROGRESS, adapter={"remark": remark})], CREATED, namespaces=False, bars=True
        )
    )
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[1].split()[:-5] == ["bot", "Succeeded", *remark.split()]


def test_the_wide_table_has_cost_forecast_and_budget() -> None:
    usage, forecast = {"gpuHours": "2.50", "cost": "6.25 EUR"}, {"gpuHours": "12.50", "cost": "31.25 EUR"}
    limited = job("Training", usage=usage, forecast=forecast, gpuHoursLimit=10.0)
    own = Job({**job("Pending", forecast={"gpuHours": "3.00"}).body, "spec": {"budget": {"gpuHours": 24}}})
    console = Console(file=io.StringIO(), width=200, no_color=True, color_system=None)
    console.print(job_table([limited, own, job("Pending")], CREATED, namespaces=False, bars=False, wide=True))
    assert isinstance(console.file, io.StringIO)
    header, *rows = console.file.getvalue().splitlines()
    assert header.split()[-6:] == ["GPU", "hours", "Cost", "Forecast", "Budget", "Age"]
    assert [row.split()[6:] for row in rows] == [
        ["2.50", "6.25", "EUR", "12.50", "(31.25", "EUR)", "10.00", "0s"],
        ["-", "-", "3.00", "24.00", "0s"],
        ["-", "-", "-", "-", "0s"],
    ]


def test_a_narrow_terminal_cuts_long_names_and_nothing_else() -> None:
    long = Job({**job("Training", progress=PROGRESS).body, "metadata": job("A").body["metadata"] | {"name": "x" * 45}})
    console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True, color_system=None)
    console.print(job_table([long], CREATED, namespaces=False, bars=False))
    assert isinstance(console.file, io.StringIO)
    header, row = (line.rstrip() for line in console.file.getvalue().splitlines())
    assert header.split() == ["Name", "Phase", "Progress", "Loss", "Left", "Recoveries", "GPU", "hours", "Age"]
    assert row.split()[1:] == ["Training", "42%", "420/1000", "1.234", "1h12m", "-", "-", "0s"]
    assert row.startswith("xxxxx")
    assert "…" in row


COMMON: dict[str, Any] = {"job_uid": "u", "pod_uid": "p", "step": "train", "time": "2026-01-02T03:04:05Z"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            encode_record(ProgressRecord(**COMMON, activity="training", training_step=4, total_steps=9, loss=1.5)),
            "03:04:05 train: training 4/9, loss 1.500",
        ),
        (
            encode_record(ResultRecord(**COMMON, outcome="succeeded", exit_code=0, reason="Done", message="9 steps")),
            "03:04:05 train succeeded: 9 steps",
        ),
        (
            encode_record(ResultRecord(**COMMON, outcome="failed", exit_code=14, reason="Diverged", message="NaN")),
            "03:04:05 train failed: Diverged: NaN",
        ),
        (encode_record(ProgressRecord(**{**COMMON, "job_uid": "v"})), None),
        ("Traceback (most recent call last):", "Traceback (most recent call last):"),
        ('\tFile "a"', '        File "a"'),
        ("\x1b]8;;http://evil\x07 \u202e", "\\x1b]8;;http://evil\\x07 \\u202e"),
        ('{"kind": "progress"}', '{"kind": "progress"}'),
    ],
)
def test_a_record_is_printed_as_a_sentence_without_control_characters(line: str, told: str | None) -> None:
    assert sentence(line, "u") == told
