"""A run's curves in TensorBoard's files, read back by TensorBoard's own library."""

import shutil
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import Interrupted, StepFailure, StopRequest
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.training import Lost, LostAtStep, StopAtStep, history, prepared, run
from tests.trainer.conftest import MakeContext

TRACKED: dict[str, Any] = {"training": {"reportTo": ["tensorboard", "mlflow", "wandb"]}}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, list[dict[str, float]]]:
    """Return the report of a run: lost in step 1, stopped after step 3, and resumed."""
    context = prepared(tmp_path_factory.mktemp("tracked"), tiny_llama, TRACKED)
    stop = StopRequest()
    with pytest.raises(Lost):
        run(context, records=LostAtStep(1))
    with pytest.raises(Interrupted):
        run(context, stop=stop, records=StopAtStep(3, stop))
    # The process ends here, with its unwritten data.
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


def test_a_run_that_is_stopped_leaves_none_of_its_steps_in_memory(report: tuple[Path, list[dict[str, float]]]) -> None:
    folder, metrics = report[0] / "interrupted", report[1]
    before = {step: loss for step, loss in losses(metrics).items() if step <= 3}
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(before)


def test_train_writes_no_files_for_the_trackers_of_publish(
    report: tuple[Path, list[dict[str, float]]],
) -> None:
    assert not {"mlflow", "wandb"} & {path.name for path in report[0].iterdir()}


def test_a_missing_tool_is_named_before_the_run_starts(
    make_context: MakeContext, tmp_path: Path, records: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("question", "answer")])
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(StepFailure, match="reportTo names wandb, which is not installed") as failure:
        prepare(make_context({"training": {"reportTo": ["wandb"]}}), records)
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_files_that_fail_in_the_middle_get_no_more_metrics_and_the_run_continues(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_scalar = SummaryWriter.add_scalar

    def fills_the_disk(writer: SummaryWriter, name: str, value: float, step: int) -> None:
        if step >= 4:
            raise OSError(ENOSPC, "No space left on device")
        add_scalar(writer, name, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", fills_the_disk)
    context = prepared(tmp_path, tiny_llama, TRACKED)

    record = run(context)

    assert record.training_step == 6
    assert list(losses(history(context))) == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(context.workspace.report / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert warnings(caplog) == ["tensorboard failed at step 4 and gets no more metrics from this process"]


def test_files_that_cannot_be_opened_do_not_fail_the_run(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = prepared(tmp_path, tiny_llama, {"training": {"reportTo": ["tensorboard"], "maxSteps": 1}})
    context.workspace.report.mkdir()
    (context.workspace.report / "tensorboard").touch()

    assert run(context).training_step == 1

    assert warnings(caplog) == ["tensorboard could not be opened and gets no more metrics from this process"]


def test_files_that_cannot_be_closed_do_not_hide_that_the_run_was_stopped(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_the_disk(_writer: SummaryWriter) -> None:
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "close", fills_the_disk)
    context, stop = prepared(tmp_path, tiny_llama, TRACKED), StopRequest()
    stop.set()

    with pytest.raises(Interrupted):
        run(context, stop=stop)

    assert warnings(caplog) == ["tensorboard could not be closed and gets no more metrics from this process"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about the files, up to the name of the file that has the metrics."""
    return [
        record.message.partition(";")[0] for record in caplog.records if record.name == "qlora_trainer.history.trackers"
    ]
