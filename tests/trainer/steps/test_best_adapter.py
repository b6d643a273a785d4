"""The exact adapter of the best evaluation is kept, and a run can end early."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.completion import PrepareRecord, TrainRecord, read_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StopRequest
from qlora_trainer.core.outcome import summary
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.publishing.gate import check_gate
from qlora_trainer.publishing.verify import require_own_training
from qlora_trainer.steps.publish import publish
from qlora_trainer.training import finish_run, loop
from qlora_trainer.training.checkpoints.checkpoint import newest_checkpoint
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Run
from tests.support.failures import failing
from tests.support.manifests import merged
from tests.support.models.tiny import Recorded
from tests.support.resolved import resolved_spec
from tests.support.runs.report_page import Page
from tests.support.training import Lost, LostAtStep, adapter_bytes, history, interrupted_at, prepared, run
from tests.trainer.conftest import Prepare

# A learning rate that makes the held-out loss fall until step 4, rise twice, and fall again.
UNSTEADY: dict[str, Any] = {
    "training": {
        "maxSteps": 9,
        "evalEverySteps": 1,
        "saveEverySteps": 3,
        "learningRate": 0.03,
        "scheduler": "constant",
        "warmupSteps": 0,
    }
}
BEST = merged(UNSTEADY, {"training": {"keep": "best", "earlyStopping": {"patience": 2}}})

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def workspace(tmp_path: Path, one_block: Path) -> Prepare:
    """Makes prepared workspaces, each by its name."""
    return lambda name="workspace", spec=BEST: prepared(tmp_path / name, one_block, spec)


def losses(context: StepContext) -> dict[int, float]:
    """The held-out loss after each step."""
    return {int(line["step"]): line["evalLoss"] for line in history(context) if "evalLoss" in line}


def best(curve: dict[int, float]) -> int:
    return min((step for step in curve if step > 0), key=lambda step: curve[step])


def test_a_run_ends_early_and_keeps_the_exact_adapter_of_its_best_evaluation(workspace: Prepare) -> None:
    context, records = workspace(), Recorded()
    found = run(context, records=records)
    curve = losses(context)

    assert list(curve) == [0, 1, 2, 3, 4, 5, 6]
    assert best(curve) == 4
    assert (found.training_step, found.total_steps, found.adapter_step) == (6, 9, 4)
    assert (found.initial_eval_loss, found.eval_loss) == (curve[0], curve[4])
    assert summary(found, "train").startswith("trained 6 of 9 steps to loss ")
    assert summary(found, "train").endswith("; the adapter is that of step 4, which has the lowest held-out loss")
    last = records.written[-1]
    assert (last["trainingStep"], last["totalSteps"], last["remainingSeconds"]) == (6, 9, 0.0)
    assert last["activity"] == "stopped early: 2 evaluations without improvement"
    # With a constant learning rate a shorter run is the beginning of a longer one.
    four_steps = workspace("four", merged(UNSTEADY, {"training": {"maxSteps": 4}}))
    run(four_steps)
    assert adapter_bytes(context) == adapter_bytes(four_steps)
    assert not context.workspace.best.exists()


def test_loss_and_score_of_a_gate_are_those_of_the_adapter_that_is_kept(workspace: Prepare) -> None:
    scored = {"gate": {"score": {"check": "regex", "pattern": "[a-z]", "rows": 3, "maxNewTokens": 4}}}
    best_of_six = workspace("best", merged(BEST, scored))
    four_steps = workspace("four", merged(UNSTEADY, merged({"training": {"maxSteps": 4}}, scored)))

    records = [run(context) for context in (best_of_six, four_steps)]

    kept, expected = (check_gate(best_of_six.spec.gate, record) for record in records)
    assert kept == expected
    assert kept is not None
    assert (kept.eval_loss, kept.score_rows) == (losses(best_of_six)[4], 3)
    answers = [(context.workspace.report / "answers.jsonl").read_text() for context in (best_of_six, four_steps)]
    assert answers[0] == answers[1]


def test_a_run_that_keeps_the_last_adapter_stops_early_with_that_one(workspace: Prepare) -> None:
    last = merged(UNSTEADY, {"training": {"earlyStopping": {"patience": 2}}})
    context, six_steps = workspace("early", last), workspace("six", merged(UNSTEADY, {"training": {"maxSteps": 6}}))

    found = run(context)
    run(six_steps)

    assert (found.training_step, found.adapter_step, found.eval_loss) == (6, 6, losses(context)[6])
    assert adapter_bytes(context) == adapter_bytes(six_steps)


@pytest.mark.parametrize("disturbed_by", ["stops after every step", "a kill beside a best that no checkpoint holds"])
def test_a_disturbed_run_ends_at_the_same_step_with_the_same_best_adapter(
    disturbed_by: str, workspace: Prepare
) -> None:
    undisturbed, disturbed = workspace("undisturbed"), workspace("disturbed")
    expected = run(undisturbed)

    if disturbed_by.startswith("stops"):
        for step in range(1, 6):
            interrupted_at(disturbed, step)
    else:
        # The best so far is that of step 4; the checkpoint of step 3 holds that of step 3.
        with pytest.raises(Lost):
            run(disturbed, records=LostAtStep(5))
        assert disturbed.workspace.best.exists()
        assert [path.name for path in disturbed.workspace.checkpoints.iterdir()] == ["step-3"]
    found = run(disturbed)

    assert adapter_bytes(disturbed) == adapter_bytes(undisturbed)
    assert history(disturbed) == history(undisturbed)
    assert (found.training_step, found.adapter_step, found.eval_loss) == (
        expected.training_step,
        expected.adapter_step,
        expected.eval_loss,
    )


def test_a_run_killed_after_its_early_stop_trains_no_further(
    workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, killed, records = workspace("undisturbed"), workspace("killed"), Recorded()
    run(undisturbed)

    def lost(*_arguments: object) -> None:
        raise Lost

    with monkeypatch.context() as patched:
        patched.setattr(finish_run, "save_adapter", lost)
        with pytest.raises(Lost):
            run(killed)
    found = run(killed, records=records)

    assert (found.training_step, found.adapter_step) == (6, 4)
    assert {entry["trainingStep"] for entry in records.written} == {6}
    assert adapter_bytes(killed) == adapter_bytes(undisturbed)


def test_a_best_adapter_newer_than_the_checkpoint_does_not_count_on_resume(
    workspace: Prepare,
) -> None:
    undisturbed, forged = workspace("undisturbed"), workspace("forged")
    run(undisturbed)
    with pytest.raises(Lost):
        run(forged, records=LostAtStep(5))
    path = forged.workspace.best / "best.safetensors"
    path.write_bytes(b"of another run")

    assert run(forged).adapter_step == 4
    assert adapter_bytes(forged) == adapter_bytes(undisturbed)


def test_a_checkpoint_whose_best_adapter_is_damaged_is_set_aside(workspace: Prepare) -> None:
    undisturbed, damaged = workspace("undisturbed"), workspace("damaged")
    run(undisturbed)
    interrupted_at(damaged, 5)
    path = damaged.workspace.checkpoints / "step-5" / "best.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    assert run(damaged).adapter_step == 4
    assert (damaged.workspace.checkpoints / "step-5.corrupt").is_dir()
    assert adapter_bytes(damaged) == adapter_bytes(undisturbed)


def test_damage_to_the_best_adapter_of_one_checkpoint_leaves_the_other_one(workspace: Prepare) -> None:
    context = workspace(spec=merged(BEST, {"training": {"saveEverySteps": 1}}))
    run(context)
    newest, before = (context.workspace.checkpoints / f"step-{step}" for step in (6, 5))
    with (newest / "best.safetensors").open("r+b") as file:
        file.write(b"damaged!")

    found = newest_checkpoint(context.workspace.checkpoints)

    assert found is not None
    assert found.path == before
    assert found.best is not None


def test_a_best_adapter_newer_than_the_last_checkpoint_is_deleted(
    workspace: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = merged(BEST, {"training": {"maxSteps": 2, "earlyStopping": None}})
    context = workspace(spec=falling)
    stop = StopRequest()
    evaluated = loop._held_out_means

    def stopped_at_the_end(of: Run, state: RunState, data: PreparedDataset) -> list[float] | None:
        if state.step == 2:
            stop.set()
        return evaluated(of, state, data)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_held_out_means", stopped_at_the_end)
        with pytest.raises(Interrupted):
            run(context, stop=stop)
    assert (context.workspace.checkpoints / "step-2").is_dir(), "saved without its evaluation"

    assert run(context).adapter_step == 2
    assert not context.workspace.best.exists()


def test_a_merged_model_is_compared_with_the_adapter_that_is_kept(workspace: Prepare) -> None:
    context = workspace(spec=merged(BEST, {"output": {"merged": {}}}))

    found = run(context)

    assert found.compared is not None
    assert found.compared.loss == pytest.approx(found.eval_loss, rel=2e-4)
    assert found.compared.loss != pytest.approx(losses(context)[6], rel=2e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training_step": 5}, "states 5 optimizer steps, but this job has 6"),
        ({"training_step": 9, "adapter_step": 9}, "states 9 optimizer steps, but this job has 6"),
        ({"adapter_step": 6}, "states the adapter of step 6, but spec.training.keep and the evaluations choose that"),
        ({"adapter_step": None}, "states the adapter of step 6, but spec.training.keep and the evaluations choose"),
    ],
)
def test_publish_checks_the_step_of_the_early_stop(change: dict[str, Any], said: str, stopped: StepContext) -> None:
    workspace = stopped.workspace
    data = read_completion(workspace.completion("prepare"), PrepareRecord)
    trained = read_completion(workspace.completion("train"), TrainRecord)
    assert data is not None
    assert trained is not None
    require_own_training(data, trained, resolved_spec(stopped.spec), workspace)

    with failing(ExitCode.UNSAFE_ARTIFACT, match=said):
        require_own_training(data, trained.model_copy(update=change), resolved_spec(stopped.spec), workspace)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, one_block: Path) -> StepContext:
    """A run that has stopped early. Do not change it."""
    context = prepared(tmp_path_factory.mktemp("stopped") / "workspace", one_block, BEST)
    run(context)
    return context


def test_the_published_files_name_the_step_of_the_adapter(workspace: Prepare) -> None:
    context = workspace()
    run(context)
    curve = losses(context)

    published = publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))

    assert published.adapter.step == 4
    model_card = (context.workspace.adapter / "README.md").read_text()
    steps = "6 of 9, stopped early; the adapter is that of step 4, with the lowest held-out loss"
    assert f"| Optimizer steps | {steps} |" in model_card
    assert f"| held-out rows | {curve[0]:.4f} | {curve[4]:.4f} |" in model_card
    page = Page((context.workspace.report / "report.html").read_text()).words
    for shown in (
        "Optimizer steps 6 of 9, stopped early",
        "Adapter of step 4",
        f"{curve[4]:.4f}",
        f"{curve[4]:.3f}",
        "earlyStopping.patience 2",
    ):
        assert shown in page
    figures = json.loads((context.workspace.report / "summary.json").read_text())
    assert (figures["optimizerSteps"], figures["plannedSteps"], figures["adapterStep"]) == (6, 9, 4)
    assert figures["loss"]["heldOutAfter"] == curve[4]


def test_keep_last_is_the_default(workspace: Prepare) -> None:
    spelled_out = workspace("spelled out", merged(UNSTEADY, {"training": {"keep": "last", "maxSteps": 1}}))
    left_out = workspace("left out", merged(UNSTEADY, {"training": {"maxSteps": 1}}))
    assert run(spelled_out).fingerprint == run(left_out).fingerprint
    assert json.loads(left_out.workspace.completion("train").read_text())["adapterStep"] == 1
