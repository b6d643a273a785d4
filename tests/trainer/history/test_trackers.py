"""A run's curves in the tools that teams compare runs with, read back by the tools' own libraries."""

import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from qlora_api.contract import ExitCode
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StepFailure, StopRequest
from qlora_trainer.history.trackers import open_trackers
from qlora_trainer.steps.prepare import prepare
from tests.support.tiny import Recorded, chat_row, write_rows
from tests.support.training import Lost, LostAtStep, StopAtStep, history, prepared, run
from tests.trainer.conftest import MakeContext


class MLflowGoesAway(Recorded):
    """Records that take MLflow's files away as soon as they say so."""

    def __init__(self, context: StepContext, when: Callable[[Any], bool]) -> None:
        super().__init__()
        self._folder, self._when = context.workspace.report / "mlflow", when

    def progress(self, record: Any, *, force: bool = False) -> None:
        super().progress(record, force=force)
        if self._when(record) and self._folder.is_dir():
            shutil.rmtree(self._folder)
            self._folder.touch()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, list[dict[str, float]]]:
    """The report folder of a run that was lost in step 1, stopped after step 3 and resumed, and its metrics."""
    spec: dict[str, Any] = {"training": {"reportTo": ["tensorboard", "mlflow", "wandb"]}}
    context = prepared(tmp_path_factory.mktemp("tracked"), tiny_llama, spec)
    stop = StopRequest()
    with pytest.raises(Lost):
        run(context, records=LostAtStep(1))
    with pytest.raises(Interrupted):
        run(context, stop=stop, records=StopAtStep(3, stop))
    # The process ends here, with whatever it has not written yet.
    shutil.copytree(context.workspace.report, context.workspace.report / "interrupted")
    run(context)
    return context.workspace.report, history(context)


def losses(metrics: list[dict[str, float]]) -> dict[int, float]:
    return {int(entry["step"]): entry["loss"] for entry in metrics if "loss" in entry}


def test_tensorboard_shows_each_step_once(report: tuple[Path, list[dict[str, float]]]) -> None:
    folder, metrics = report
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    assert dict(shown) == pytest.approx(losses(metrics))
    assert [event.step for event in events.Scalars("eval/loss")] == [0, 2, 4, 6]
    assert set(events.Tags()["scalars"]) >= {"train/grad_norm", "train/learning_rate", "train/tokens_per_second"}


def test_mlflow_has_one_run_with_its_settings_and_each_step_once(
    report: tuple[Path, list[dict[str, float]]],
) -> None:
    folder, metrics = report
    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("qlora")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("tiny", "FINISHED")
    assert found.data.params["rank"] == "4"
    shown = client.get_metric_history(found.info.run_id, "train/loss")
    assert [metric.step for metric in shown] == [1, 2, 3, 4, 5, 6]
    assert {metric.step: metric.value for metric in shown} == pytest.approx(losses(metrics))
    evaluations = client.get_metric_history(found.info.run_id, "eval/loss")
    assert [metric.step for metric in evaluations] == [0, 2, 4, 6]


def test_a_run_that_is_stopped_leaves_none_of_its_steps_in_memory(report: tuple[Path, list[dict[str, float]]]) -> None:
    folder, metrics = report[0] / "interrupted", report[1]
    before = {step: loss for step, loss in losses(metrics).items() if step <= 3}
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(before)
    assert weights_and_biases_losses(folder) == pytest.approx(before)
    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("qlora")
    assert experiment is not None
    assert [found.info.status for found in client.search_runs([experiment.experiment_id])] == ["KILLED"]


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB writes it: blocks of 32 KiB, the first after a header of 7 bytes."""
    record, at = b"", 7
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def weights_and_biases_losses(folder: Path) -> dict[int, float]:
    shown: dict[int, float] = {}
    for path in sorted(folder.glob("wandb/wandb/offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            items = {"".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "train/loss" in items:
                shown[record.history.step.num] = float(items["train/loss"])
    return shown


def test_weights_and_biases_gets_files_to_upload(report: tuple[Path, list[dict[str, float]]]) -> None:
    folder, metrics = report
    assert weights_and_biases_losses(folder) == pytest.approx(losses(metrics))


def test_runs_of_one_process_have_records_of_their_own(tmp_path: Path) -> None:
    tools, losses_of = ("tensorboard", "mlflow", "wandb"), {"first": 1.0, "second": 2.0}
    opened = {
        name: open_trackers(tools, tmp_path / name, run_name=name, run_id=name, settings={}, from_step=0)
        for name in losses_of
    }
    for step in (1, 2):
        for name, trackers in opened.items():
            for tracker in trackers:
                tracker.log(step, {"loss": losses_of[name]})
    for trackers in opened.values():
        for tracker in trackers:
            tracker.close(finished=True)
    for name, loss in losses_of.items():
        assert weights_and_biases_losses(tmp_path / name) == {1: loss, 2: loss}
        events = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        assert {event.step: event.value for event in events.Scalars("train/loss")} == {1: loss, 2: loss}
        client = MlflowClient(tracking_uri=(tmp_path / name / "mlflow").as_uri())
        experiment = client.get_experiment_by_name("qlora")
        assert experiment is not None
        [found] = client.search_runs([experiment.experiment_id])
        assert found.data.metrics["train/loss"] == loss


def test_a_tool_that_is_not_installed_is_named_before_anything_is_done(
    make_context: MakeContext, tmp_path: Path, records: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("question", "answer")])
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(StepFailure, match="reportTo names wandb, which is not installed") as failure:
        prepare(make_context({"training": {"reportTo": ["wandb"]}}), records)
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_a_tool_that_fails_in_the_middle_gets_no_more_metrics_and_the_run_and_the_others_continue(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = prepared(tmp_path, tiny_llama, {"training": {"reportTo": ["mlflow", "tensorboard"]}})

    record = run(context, records=MLflowGoesAway(context, lambda progress: progress.training_step == 3))

    assert record.training_step == 6
    assert list(losses(history(context))) == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(context.workspace.report / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert warnings(caplog) == ["mlflow failed at step 4 and gets no more metrics from this process"]


def test_a_server_that_is_unreachable_at_the_start_does_not_fail_the_run(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        context = prepared(tmp_path, tiny_llama, {"training": {"reportTo": ["mlflow"], "maxSteps": 1}})
        assert run(context).training_step == 1

    assert warnings(caplog) == ["mlflow could not be opened and gets no more metrics from this process"]


def test_a_tool_that_cannot_be_closed_does_not_hide_that_the_run_was_stopped(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context, stop = prepared(tmp_path, tiny_llama, {"training": {"reportTo": ["mlflow"]}}), StopRequest()
    stop.set()

    with pytest.raises(Interrupted):
        run(context, stop=stop, records=MLflowGoesAway(context, lambda progress: progress.activity == "interrupted"))

    assert warnings(caplog) == ["mlflow could not be closed and gets no more metrics from this process"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about the tools, up to the name of the file that has the metrics."""
    return [
        record.message.partition(";")[0] for record in caplog.records if record.name == "qlora_trainer.history.trackers"
    ]
