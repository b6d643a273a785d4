"""A run trains on while a thread writes its checkpoint, which counts once it has been read back."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StopRequest
from qlora_trainer.core.outcome import classify
from qlora_trainer.training import loop
from qlora_trainer.training.checkpoints.attempts import read_attempts
from qlora_trainer.training.checkpoints.checkpoint import Checkpoint, save_checkpoint
from qlora_trainer.training.checkpoints.saver import CheckpointSaver
from tests.support.manifests import merged
from tests.support.models.tiny import Recorded
from tests.support.training import (
    Lost,
    LostAtStep,
    StopAtStep,
    adapter_bytes,
    failure,
    history,
    interrupted_at,
    prepared,
    run,
)
from tests.trainer.conftest import Prepare

pytestmark = pytest.mark.usefixtures("one_thread")

# Nothing waits for the save of step 3 before that of step 6.
SPEC: dict[str, Any] = {"lora": {"dropout": 0.1}, "training": {"maxSteps": 7, "saveEverySteps": 3, "evalEverySteps": 7}}
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def workspace(tmp_path: Path, one_block: Path) -> Prepare:
    """Makes prepared workspaces, each by its name."""
    return lambda name="workspace", spec=SPEC: prepared(tmp_path / name, one_block, spec)


class Held:
    """Holds each save of a checkpoint back until the loop waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self._released, self._error = threading.Event(), error
        self.begun: list[int] = []
        wait = CheckpointSaver.wait

        def released(saver: CheckpointSaver) -> None:
            if saver._saving is not None:
                self._released.set()
            wait(saver)

        monkeypatch.setattr(loop, "save_checkpoint", self._save)
        monkeypatch.setattr(CheckpointSaver, "wait", released)

    def _save(self, folder: Path, step: int, *content: Any) -> Checkpoint:
        self.begun.append(step)
        self._released.wait()
        self._released.clear()
        if self._error is not None:
            raise self._error
        return save_checkpoint(folder, step, *content)


def files(context: StepContext, step: int) -> dict[str, bytes]:
    """The tensors of a checkpoint, by the names of their files."""
    return {path.name: path.read_bytes() for path in context.workspace.checkpoints.glob(f"step-{step}/*.safetensors")}


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_32bit"])
def test_a_checkpoint_holds_its_own_step_however_far_the_run_has_gone_on(
    optimizer: str, workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = merged(SPEC, {"training": {"optimizer": optimizer}})
    stopped, trained, records = workspace("stopped", spec), workspace("trained", spec), Recorded()
    interrupted_at(stopped, 3)
    held = Held(monkeypatch)

    run(trained, records=records)

    assert held.begun == [3, 6, 7]
    shown = [(line["trainingStep"], line.get("checkpointStep")) for line in records.written]
    # Step 3 is reported only after it has been read back, which the save of step 6 waits for.
    assert {step for step, checkpoint in shown if checkpoint is None} >= {3, 4, 5, 6}
    assert [checkpoint for _, checkpoint in shown if checkpoint][-1] == 7
    monkeypatch.undo()
    kept = workspace("kept", spec)
    Held(monkeypatch)
    with pytest.raises(Lost):
        run(kept, records=LostAtStep(5))
    assert files(kept, 3)
    assert files(kept, 3) == files(stopped, 3)

    # The history has lines of later steps, which a resumed run repeats.
    run(kept)
    assert (adapter_bytes(kept), history(kept)) == (adapter_bytes(trained), history(trained))


def test_a_best_adapter_is_replaced_only_after_the_save_that_copies_it(
    workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"training": {"evalEverySteps": 1, "keep": "best", "learningRate": 0.03, "warmupSteps": 0}}
    plain, slow = workspace("plain", merged(SPEC, best)), workspace("slow", merged(SPEC, best))
    run(plain)
    Held(monkeypatch)

    assert run(slow).adapter_step is not None
    assert adapter_bytes(slow) == adapter_bytes(plain)
    assert not slow.workspace.best.exists()


def test_a_stop_waits_for_both_saves(workspace: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    context, stop = workspace(), StopRequest()
    held, records = Held(monkeypatch), StopAtStep(5, stop)

    with pytest.raises(Interrupted, match="interrupted at step 5 of 7; the checkpoint of step 5 is saved"):
        run(context, stop=stop, records=records)

    assert held.begun == [3, 5]
    assert records.written[-1]["checkpointStep"] == 5
    assert sorted(path.name for path in context.workspace.checkpoints.iterdir()) == ["step-3", "step-5"]
    assert read_attempts(context.workspace.records)[-1].saved_at is not None


@pytest.mark.parametrize(
    ("error", "saved"), [(None, "the checkpoint of step 3 is kept"), (FULL, "nothing was saved yet")]
)
def test_a_run_that_diverges_names_the_checkpoint_that_was_being_saved(
    error: Exception | None, saved: str, workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, real = workspace(), loop.apply_gradient

    def diverging(run: Any, state: Any, gradient: Any) -> Any:
        if state.step == 4:
            gradient.means.fill_(float("nan"))
        return real(run, state, gradient)

    monkeypatch.setattr(loop, "apply_gradient", diverging)
    Held(monkeypatch, error)

    found = failure(context)

    assert found.exit_code.reason == "Diverged"
    assert saved in found.message
    assert bool(files(context, 3)) is (error is None)


def test_a_full_volume_is_reported_with_the_step_of_its_checkpoint(
    workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = workspace()
    held = Held(monkeypatch, FULL)

    with pytest.raises(OSError, match="step 3") as caught:
        run(context)

    assert held.begun == [3]
    assert classify(caught.value).exit_code.reason == "StorageFull"
    assert not list(context.workspace.checkpoints.glob("step-*"))
    assert read_attempts(context.workspace.records)[-1].ended == "failed"


def test_a_failure_waits_for_the_save_and_stays_the_one_that_is_reported(
    workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = workspace()
    held = Held(monkeypatch, FULL)

    with pytest.raises(Lost):
        run(context, records=LostAtStep(5))

    assert held.begun == [3]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
