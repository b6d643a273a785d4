"""Which readings of a log are stored when many jobs train, and what the metrics show of the others."""

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any
from zlib import crc32

import pytest

from qlora_api.contract import encode_record
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.progress import ProgressReader
from tests.support.builders import NAME, after, child, ended, job_body, pod, progress, result, running, status_in, time
from tests.support.cluster.memory_cluster import KEY, MemoryCluster, operator, shown

FIGURES = {"training_step": 100, "total_steps": 1000, "loss": 1.5, "epoch": 0.1, "training_since": time(-60)}


class Training:
    """A job that trains while others do, and an operator that reads its log in each pass."""

    def __init__(self, jobs: int) -> None:
        trains = status_in("train", phase="Training", phaseSince=time(-60))
        self.cluster = MemoryCluster(job_body(trains.dump()))
        self.cluster.jobs, self.cluster.pods = [child("train")], [running(pod("train"))]
        self.metrics, self.now, self._log = Metrics(), 0.0, ""
        self._store = shown(self.cluster)
        # The job's period begins a second before each full minute.
        self._reader = ProgressReader(self._read_log, lambda: self.now + 1 - crc32("/".join(KEY).encode()), 1)
        for number in range(jobs):
            self._reader._schedule.seconds_until_due(("team", f"other{number}"), self._reader._monotonic())
        self.report(0)
        self.report(60)

    async def _read_log(self, namespace: str, name: str) -> str:
        return self._log

    def report(self, at: float, **fields: Any) -> bool:
        """Let the trainer report these figures and the operator read them. Whether it stores them."""
        self._log = encode_record(progress(**FIGURES | fields | {"time": time(at)}))
        return self.look(at)

    def look(self, at: float) -> bool:
        """Whether a pass over the job at that second stores anything."""
        self.now, before = at, self.cluster.writes.count("status")
        reconciler = operator(self.cluster, self._store, after(at))
        reconciler = replace(reconciler, progress=self._reader, metrics=self.metrics)
        asyncio.run(reconciler.reconcile(KEY))
        return self.cluster.writes.count("status") > before


def test_the_figures_of_few_jobs_are_stored_with_each_reading() -> None:
    job = Training(jobs=150)
    assert [job.report(at, training_step=at) for at in (100, 110, 120)] == [True, True, True]
    assert not job.look(130), "the trainer has reported nothing since"


def test_the_figures_of_two_thousand_jobs_are_stored_once_a_minute_and_shown_at_each_reading() -> None:
    job = Training(jobs=2000)
    seconds = range(80, 320, 20)
    stored = [at for at in seconds if job.report(at, training_step=100 + at // 60, loss=at / 100)]
    assert [later - earlier for earlier, later in pairwise(stored)] == [60, 60, 60]
    assert job.cluster.status.progress is not None
    assert job.cluster.status.progress.loss == stored[-1] / 100
    job.report(stored[-1] + 20, loss=2.6)
    assert job.metrics.registry.get_sample_value("qlora_job_loss", {"namespace": "team", "name": NAME}) == 2.6


@pytest.mark.parametrize(
    "news",
    [
        {"training_step": 110},
        {"eval_loss": 1.25},
        {"checkpoint_step": 100, "checkpoint_time": time(70)},
        {"micro_batch_size": 1},
        {"evaluations": ((100, 1.5),)},
    ],
    ids=["another percent", "an evaluation", "a checkpoint", "a lower micro batch", "a rung"],
)
def test_what_a_user_waits_for_is_stored_at_once(news: dict[str, Any]) -> None:
    job = Training(jobs=2000)
    assert not job.report(80, training_step=101)
    assert job.report(100, **news)


def test_a_run_that_hangs_is_measured_from_its_last_report() -> None:
    job = Training(jobs=2000)
    assert not job.report(80)
    assert job.look(100), "the record is the same as before, and not stored yet"
    assert job.cluster.status.step is not None
    assert job.cluster.status.step.progressed_at == time(100)
    assert not job.look(120)


def test_losses_of_the_run_stay_in_the_status_when_its_pods_are_gone() -> None:
    job = Training(jobs=150)
    for step, loss, eval_loss in ((120, 1.4, 1.75), (140, 1.3, 1.75), (160, 1.2, 1.5)):
        job.report(step, training_step=step, loss=loss, eval_loss=eval_loss)
    kept = "step,train_loss,valid_loss\n100,1.5,\n120,1.4,1.75\n140,1.3,\n160,1.2,1.5"
    assert job.cluster.status.history == kept

    end = pod("train")
    facts: dict[str, Any] = {"training_step": 200, "total_steps": 200, "loss": 1.1, "eval_loss": 1.25}
    job.cluster.jobs, job.cluster.pods = [child("train", Complete="")], [ended(end, 0, result(end, "train", **facts))]
    job._store = shown(job.cluster)
    job.look(200)

    assert job.cluster.status.history == f"{kept}\n200,1.1,1.25"
