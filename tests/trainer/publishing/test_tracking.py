"""The run of a published adapter in trackers: once, whole, and never blocking."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import urllib3.util.retry
from mlflow.tracking import MlflowClient

from qlora_api.contract import ENV_MLFLOW_SERVER, ENV_WANDB_SERVER
from qlora_api.spec.output import TrackedRun, TrackingStatus
from qlora_trainer.core.completion import PublishRecord, read_completion, write_completion
from qlora_trainer.core.context import Mounts
from qlora_trainer.publishing import tracking
from qlora_trainer.publishing.tracking import FinishedRun, UploadError, upload_to_mlflow
from qlora_trainer.steps import publish as publish_module
from tests.support.commands.command import Files
from tests.support.models.tiny import JOB_UID
from tests.support.runs.published import published
from tests.support.services.fault_proxy import Fault, FaultProxy, serve_proxy
from tests.support.services.mlflow_server import mlflow_server
from tests.support.services.wandb_stub import wandb_stub


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


def tracked(files: Files, *trackers: str, **tracking: Any) -> Files:
    """The job with these trackers."""
    output = {"output": {"tracking": tracking}} if tracking else {}
    return files.with_spec({"training": {"reportTo": list(trackers)}, **output})


def losses(files: Files) -> dict[int, float]:
    lines = (files.workspace / "report" / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines) if "loss" in entry}


def forget_tracking(files: Files) -> None:
    """Drop the upload's record, as if the attempt was killed before it wrote that."""
    path = files.workspace / "records" / "publish.json"
    record = read_completion(path, PublishRecord)
    assert record is not None
    write_completion(path, record.model_copy(update={"tracking": None}))


def test_mlflow_has_one_run_with_every_point_once_after_two_attempts(
    trained: Files, mlflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_MLFLOW_SERVER, mlflow)
    job = tracked(trained, "mlflow", experiment="support-bot")
    first = published(job)
    forget_tracking(job)
    again = published(job)

    assert first.tracking is not None
    assert first.tracking == again.tracking
    run = first.tracking.mlflow
    assert run is not None
    assert run.url is not None
    client = MlflowClient(tracking_uri=mlflow)
    experiment = client.get_experiment_by_name("support-bot")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id])
    assert run.url == f"{mlflow}/#/experiments/{experiment.experiment_id}/runs/{found.info.run_id}"
    assert (found.info.run_name, found.info.status) == ("tiny", "FINISHED")
    assert found.data.tags["qlora.adapterSha256"] == first.adapter.sha256
    assert found.data.params["rank"] == "4"
    shown = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in shown] == list(range(1, 31))
    assert {point.step: point.value for point in shown} == pytest.approx(losses(job))
    assert [point.step for point in client.get_metric_history(found.info.run_id, "eval/loss")] == [0, 10, 20, 30]


def finished_run(**tags: str) -> FinishedRun:
    return FinishedRun("7f3c", "tiny", "repeated", {"rank": 4}, tags, [(1, {"train/loss": 2.0})])


def test_a_second_upload_replaces_the_tags_of_the_same_run(mlflow: str) -> None:
    client = MlflowClient(tracking_uri=mlflow)
    first = upload_to_mlflow(mlflow, {}, finished_run(adapter="one"))
    experiment = client.get_experiment_by_name("repeated")
    assert experiment is not None
    # Two concurrent attempts have each made one.
    second = client.create_run(experiment.experiment_id, tags={"qlora.job": "7f3c"}).info.run_id
    assert upload_to_mlflow(mlflow, {}, finished_run(adapter="two")) == first
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.pop(second).info.status == "KILLED"
    [kept] = runs.values()
    assert (kept.data.tags["adapter"], kept.info.status) == ("two", "FINISHED")


def test_a_wait_that_the_server_requests_does_not_hold_the_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(urllib3.util.retry, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    busy = FaultProxy("", rule=lambda _request: Fault(503, headers={"Retry-After": "3600"}))
    with serve_proxy(busy) as server, pytest.raises(UploadError, match="503"):
        upload_to_mlflow(f"http://{server.address}", {}, finished_run())
    assert sum(waits) < 60


def test_an_upload_ends_although_the_server_accepts_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowly: a minute each, and it has thousands of points to take."""
    monkeypatch.setattr(tracking, "_MLFLOW_BATCH", 1)
    taken: list[str] = []

    class Slow:
        def __getattr__(self, name: str) -> Any:
            def answer(*_: Any, **__: Any) -> Any:
                taken.append(name)
                return [] if name == "search_runs" else MagicMock()

            return answer

    points = [(step, {"train/loss": 1.0}) for step in range(1000)]
    with pytest.raises(UploadError, match="has not taken the run within 180 seconds"):
        tracking._to_mlflow(Slow(), "http://m", replace(finished_run(), points=points), lambda: 60.0 * len(taken))
    assert len(taken) < 10


def test_an_upload_that_cannot_be_recorded_costs_nothing(trained: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = TrackingStatus(mlflow=TrackedRun(url="http://m.example.org/#/r"))
    monkeypatch.setattr(publish_module, "upload_run", lambda *_: uploaded)

    def full(path: Path, record: PublishRecord) -> None:
        if record.tracking is not None:
            raise OSError(ENOSPC, "No space left on device")
        write_completion(path, record)

    monkeypatch.setattr(publish_module, "write_completion", full)
    assert published(trained).tracking == uploaded


def test_weights_and_biases_gets_every_step_with_the_key_of_the_secret(
    trained: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = "canary" + "k" * 40
    job = tracked(trained, "wandb", secretRef={"name": "trackers"}, experiment="support-bot")
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "WANDB_API_KEY").write_text(key)
    with wandb_stub() as server:
        monkeypatch.setenv(ENV_WANDB_SERVER, server.url)
        record = published(job, mounts=Mounts(credentials=tmp_path))

    assert record.tracking is not None
    assert record.tracking.wandb is not None
    assert record.tracking.wandb.url == f"{server.url}/team/support-bot/runs/{JOB_UID}"
    assert len(server.authorizations) == 1
    [lines] = server.history.values()
    shown = {line["_step"]: line["train/loss"] for line in lines.values() if "train/loss" in line}
    assert shown == pytest.approx(losses(job))


def test_a_failing_tracker_does_not_fail_the_job_and_is_retried_later(
    trained: Files, mlflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_MLFLOW_PATIENCE", {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    monkeypatch.setenv(ENV_MLFLOW_SERVER, "http://127.0.0.1:1")
    job = tracked(trained, "mlflow")
    record = published(job)

    assert record.tracking is not None
    assert record.tracking.mlflow is not None
    assert record.tracking.mlflow.url is None
    assert "127.0.0.1" in record.tracking.mlflow.message
    assert (job.workspace / "adapter" / "adapter_model.safetensors").exists()

    monkeypatch.setenv(ENV_MLFLOW_SERVER, mlflow)
    later = published(job).tracking
    assert later is not None
    assert not later.failures


def test_a_rejected_key_is_reported_and_not_shown(
    trained: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = tracked(trained, "wandb", secretRef={"name": "trackers"})
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "WANDB_API_KEY").write_text("canary-key")
    monkeypatch.setenv(ENV_WANDB_SERVER, "http://127.0.0.1:1")
    tracking = published(job, mounts=Mounts(credentials=tmp_path)).tracking

    assert tracking is not None
    assert "WANDB_API_KEY invalid" in tracking.failures["wandb"]
    assert "canary-key" not in tracking.failures["wandb"]


def test_without_a_server_nothing_is_uploaded(trained: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_MLFLOW_SERVER, raising=False)
    assert published(tracked(trained, "mlflow", "tensorboard")).tracking is None
