"""Losses over steps, from a workspace or from logs, also of a run that was interrupted."""

import json

import pytest

from qlora_api.contract import ProgressRecord
from qlora_client.history import LossHistory, of_metrics, of_records, of_status
from qlora_client.jobs.job import Job


def test_the_metrics_of_a_workspace_have_every_step() -> None:
    lines = [{"step": 0, "evalLoss": 2.5}, {"step": 1, "loss": 2.0, "gradNorm": 1.0}, {"step": 2, "loss": 1.5}]
    history = of_metrics("\n".join(map(json.dumps, lines)).encode())
    assert history == LossHistory({1: 2.0, 2: 1.5}, {0: 2.5})


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"loss": 1}', b'{"step": 1, "loss": "much"}', b"[" * 100_000])
def test_a_line_that_is_no_metric_is_named(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        of_metrics(b'{"step": 1, "loss": 2.0}\n' + line)


def test_a_number_that_is_not_finite_is_left_out() -> None:
    assert of_metrics(b'{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}').training == {2: 1.0}


def record(step: int, loss: float | None, eval_loss: float | None = None) -> ProgressRecord:
    return ProgressRecord(
        job_uid="u",
        pod_uid="p",
        step="train",
        time="2026-01-02T03:04:05Z",
        training_step=step,
        loss=loss,
        eval_loss=eval_loss,
    )


def test_a_run_that_was_resumed_has_the_losses_of_its_last_attempt() -> None:
    history = of_records([record(10, 3.0), record(20, 2.0), record(30, 1.9), record(15, 2.5), record(25, 1.8)])
    assert history.training == {10: 3.0, 15: 2.5, 25: 1.8}


def test_an_evaluation_counts_once_however_often_it_is_reported() -> None:
    history = of_records([record(0, None, 3.0), record(5, 2.0, 3.0), record(10, 1.9, 2.1), record(15, 1.8, 2.1)])
    assert history.held_out == {0: 3.0, 10: 2.1}
    assert history.best == (10, 2.1)


def test_the_status_keeps_losses_when_the_pods_are_gone() -> None:
    table = "step,train_loss,valid_loss\n0,,3.5\n1,3.25,\n9,2.5,2.75"
    assert of_status(Job({"status": {"history": table}})) == LossHistory({1: 3.25, 9: 2.5}, {0: 3.5, 9: 2.75})
    assert of_status(Job({"status": {}})) == LossHistory()


@pytest.mark.parametrize(
    ("steps", "total", "enough"),
    [
        (range(1, 1001, 50), 1000, True),
        (range(1, 1001, 100), 1000, False),
        (range(300, 1001, 10), 1000, False),
        (range(1, 4), 3, True),
        ((), 1000, False),
    ],
    ids=["all of it", "few points", "only its end", "a short run", "nothing"],
)
def test_whether_a_log_shows_the_run(steps: range, total: int, enough: bool) -> None:
    assert LossHistory(dict.fromkeys(steps, 1.0)).suffices(total) is enough
