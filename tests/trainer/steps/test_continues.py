"""A job that resumes another one's run: to the same bytes, and without changes there."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import Mounts, StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.steps.clean import clean
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.training.checkpoints.attempts import MAX_ATTEMPTS_WITHOUT_PROGRESS, read_attempts, write_attempts
from qlora_trainer.training.checkpoints.fingerprint import Fingerprint, run_settings
from qlora_trainer.training.continued import continue_run, continued_settings, require_something_to_continue
from qlora_trainer.training.prepared_job import PreparedJob
from tests.support.failures import failing
from tests.support.manifests import merged
from tests.support.models.tiny import POD_UID, Recorded, chat_row, write_rows
from tests.support.resolved import OPEN, resolved_spec
from tests.support.training import Lost, LostAtStep, adapter_bytes, history, interrupted_at, job, prepared, run
from tests.trainer.conftest import MakeContext

Make = Callable[..., StepContext]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """Prepare one job as `fresh`, and as `stopped` with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("roots")
    context = prepared(folder / "fresh", tiny_llama)
    shutil.copytree(folder / "fresh", folder / "stopped")
    interrupted_at(replace(context, workspace=WorkspaceLayout(folder / "stopped")), 4)
    return {name: folder / name for name in ("fresh", "stopped")}


@pytest.fixture
def make(tmp_path: Path, roots: dict[str, Path]) -> Make:
    """Makes jobs with a copy of one of the workspaces, by their names."""

    def make(name: str, root: str = "fresh", spec: dict[str, Any] | None = None) -> StepContext:
        shutil.copytree(roots[root], tmp_path / name)
        workspace = WorkspaceLayout(tmp_path / name)
        return StepContext(job(spec), workspace, Mounts(), "cpu", POD_UID, 1, str(tmp_path / name))

    return make


def record_of(context: StepContext) -> PrepareRecord:
    return PrepareRecord.model_validate_json(context.workspace.completion("prepare").read_bytes())


def continued(context: StepContext, other: StepContext) -> int | None:
    return continue_run(other.workspace.root, "other", PreparedJob.from_record(context, record_of(context), 1))


def rejected(context: StepContext, other: StepContext, *words: str) -> None:
    with failing(ExitCode.BAD_CONFIGURATION) as failure:
        continued(context, other)
    for word in words:
        assert word in failure.value.message, failure.value.message
    assert not context.workspace.checkpoints.exists()
    assert not (context.workspace.records / "attempts.jsonl").exists()


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(context: StepContext) -> None:
    """The latest attempt was killed before it could record its end."""
    path = context.workspace.records / "attempts.jsonl"
    *earlier, latest = path.read_text().splitlines()
    latest = json.dumps({key: value for key, value in json.loads(latest).items() if not key.startswith("ended")})
    path.write_text("".join(f"{line}\n" for line in (*earlier, latest)))


def test_it_ends_in_the_bytes_of_an_uninterrupted_run(make: Make) -> None:
    undisturbed, other, context = make("undisturbed"), make("other", "stopped"), make("new")
    run(undisturbed)
    with pytest.raises(Lost):
        run(other, records=LostAtStep(5))
    killed(other)
    before = everything_below(other.workspace.root)
    assert continued(context, other) == 4
    assert everything_below(other.workspace.root) == before
    shutil.rmtree(other.workspace.root)  # the copied files are enough from here on
    trained = run(context)
    assert adapter_bytes(context) == adapter_bytes(undisturbed)
    clean(context.workspace)
    assert continued(context, other) is None, "trained/ has all that it needs"
    assert history(context) == history(undisturbed)
    assert trained.attempts == 3
    attempts = read_attempts(context.workspace.records)
    assert [(attempt.ended, attempt.from_step, attempt.job_attempt) for attempt in attempts] == [
        ("interrupted", 0, 0),
        (None, 4, 0),
        ("succeeded", 4, 1),
    ]
    assert attempts[1].ended_at is not None, "its last sign of life is not that of the copy"


def test_a_run_that_was_often_killed_continues_in_the_pod_of_another_job(make: Make) -> None:
    other, context = make("other", "stopped"), make("new")
    [stopped] = read_attempts(other.workspace.records)
    killed_there = stopped.model_copy(update={"from_step": 4, "ended": None})
    write_attempts(other.workspace.records, [stopped, *[killed_there] * MAX_ATTEMPTS_WITHOUT_PROGRESS])
    assert continued(context, other) == 4
    assert run(replace(context, attempt=0)).training_step == 6


@pytest.mark.parametrize("spec", [None, {"training": {"keep": "best"}}], ids=["last", "best"])
def test_a_run_at_its_end_gives_its_adapter_again_without_another_step(spec: dict[str, Any] | None, make: Make) -> None:
    """As the job that publishes the best cell of a sweep takes it up."""
    other, context = make("other", spec=spec), make("new", spec=spec)
    ended = run(other)
    assert continued(context, other) == 6
    record = run(context)
    assert adapter_bytes(context) == adapter_bytes(other)
    assert history(context) == history(other)
    assert (record.kept_step, record.eval_loss) == (ended.kept_step, ended.eval_loss)


def test_a_workspace_with_a_checkpoint_of_its_own_resumes_from_that(make: Make) -> None:
    other, context = make("other", "stopped"), make("new", "stopped")
    shutil.rmtree(context.workspace.checkpoints / "step-4")
    before = everything_below(context.workspace.root)
    assert continued(context, other) is None
    assert everything_below(context.workspace.root) == before
    for file in (context.workspace.checkpoints / "step-2").iterdir():
        file.write_bytes(b"")
    assert continued(context, other) == 4, "a damaged one is none"


def test_settings_that_do_not_decide_the_adapter_may_differ(make: Make) -> None:
    training = {"saveEverySteps": 3, "divergencePatience": 7, "samples": 1}
    assert continued(make("new", spec={"training": training}), make("other", "stopped")) == 4


def test_another_run_is_rejected_with_the_difference_and_an_alternative(make: Make) -> None:
    context = make("new", spec={"training": {"maxSteps": 12}})
    rejected(context, make("other", "stopped"), "training.maxSteps was 6, is 12", "use spec.lora.from")


def settings(spec: dict[str, Any] | None = None) -> Fingerprint:
    return run_settings(job(spec).spec, "cpu", 1)


def test_other_settings_are_rejected_before_anything_is_prepared(make: Make) -> None:
    other = make("other", "stopped").workspace.root
    continued_settings(other, "other", settings({"training": {"samples": 1}}), ())
    continued_settings(other, "other", settings({"lora": {"from": {"source": "pvc://models/adapter"}}}), ())
    with failing(ExitCode.BAD_CONFIGURATION, match=r"training\.maxSteps was 6, is 12; set the same values"):
        continued_settings(other, "other", settings({"training": {"maxSteps": 12}}), ())
    # A state that was changed decides nothing.
    state = other / "checkpoints" / "step-4" / "state.json"
    state.write_text(state.read_text().replace('"maxSteps": 6', '"maxSteps": 12'))
    continued_settings(other, "other", settings(), ())


def test_prepare_fetches_nothing_for_another_run(make: Make, make_context: MakeContext) -> None:
    other = make("other", "stopped").workspace.root
    context = make_context({"continues": "other", "training": {"learningRate": 0.5}})
    context = replace(context, mounts=replace(context.mounts, continued=other))
    with pytest.raises(StepFailure, match=r"learningRate was 0\.01, is 0\.5"):
        prepare(context, Recorded())
    assert not context.workspace.root.exists()


def test_data_that_differ_make_it_another_run(make: Make) -> None:
    context = make("new")
    path = context.workspace.completion("prepare")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "others"}))
    rejected(context, make("other", "stopped"), "(spec.continues): the prepared rows changed")


def test_the_newest_intact_checkpoint_is_taken_and_a_damaged_one_left_as_it_is(make: Make) -> None:
    other = make("other", "stopped")
    damaged = other.workspace.checkpoints / "step-4" / "adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert continued(make("new"), other) == 2
    assert sorted(path.name for path in other.workspace.checkpoints.iterdir()) == ["step-2", "step-4"]
    shutil.rmtree(other.workspace.checkpoints / "step-2")
    rejected(make("another"), other, "has no checkpoint to continue from")


def test_a_workspace_without_checkpoints_has_nothing_to_continue(tmp_path: Path) -> None:
    with failing(ExitCode.BAD_CONFIGURATION, match="has no checkpoint to continue from"):
        require_something_to_continue(tmp_path, "other")
    with failing(ExitCode.UNREACHABLE, match="is not mounted at"):
        require_something_to_continue(tmp_path / "absent", "other")


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/step-4", "records", "report/metrics.jsonl"])
def test_links_that_lead_out_of_the_other_workspace_are_not_followed(make: Make, tmp_path: Path, place: str) -> None:
    """A tenant may have put them there, and the pod has Secrets."""
    other, context = make("other", "stopped"), make("new")
    path, outside = other.workspace.root / place, tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with failing(ExitCode.UNSAFE_ARTIFACT, match=r"link|leads to"):
        continued(context, other)
    assert not context.workspace.checkpoints.exists()


SECRET = "hf_0123456789abcdef"


def test_a_link_for_the_record_of_attempts_is_not_followed(make: Make, tmp_path: Path) -> None:
    other, context = make("other", "stopped"), make("new")
    (tmp_path / "token").write_text(SECRET)
    path = other.workspace.records / "attempts.jsonl"
    path.unlink()
    path.symlink_to(tmp_path / "token")
    with failing(ExitCode.UNSAFE_ARTIFACT, match=r"attempts\.jsonl is a link that leads out"):
        continued(context, other)
    assert not context.workspace.checkpoints.exists()


def test_an_invalid_record_of_an_attempt_is_named_by_its_line_and_not_logged(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    other = make("other", "stopped")
    with (other.workspace.records / "attempts.jsonl").open("a") as file:
        file.write(SECRET + "\n")
    assert continued(make("new"), other) == 4
    assert "attempts.jsonl:2 is not a record of an attempt and is ignored: json_invalid" in caplog.text
    assert SECRET not in caplog.text


def lay_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def lay_zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def lay_terabyte(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(2**40)


def lay_foreign_state(path: Path) -> None:
    path.write_text('{"formatVersion": 1, "step": 4}')
    sums = {"sha256": {"state.json": file_sha256(path)}}
    (path.parent / "manifest.json").write_text(json.dumps(sums))


def change(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's state, and its sum in the manifest."""
    path, manifest = checkpoint / "state.json", checkpoint / "manifest.json"
    state = json.loads(path.read_text())
    edit(state)
    path.write_text(json.dumps(state))
    sums = json.loads(manifest.read_text())["sha256"] | {"state.json": file_sha256(path)}
    manifest.write_text(json.dumps({"sha256": sums}))


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda state: state["run"].update(step=2), "steps contradict each other: 4, of the run 2"),
        (lambda state: (state.update(step=10**6), state["run"].update(step=10**6)), "is that of step 1000000"),
        (lambda state: state["run"].update(step=-5), "run.step: Input should be greater"),
        (lambda state: state["run"].update(kept_seconds="x"), "run.kept_seconds: Input should be a valid number"),
        (lambda state: state["run"].update(kept_seconds=float("nan")), "run.kept_seconds: Input should be a finite"),
        (lambda state: state["run"].update(loss=None), "has no loss after 4 steps"),
        (lambda state: state["run"]["stability"].update(loss_level="x"), "run.stability.loss_level: Input should be"),
        (lambda state: state["run"]["evaluations"].update(best_step=5), "of its best 5"),
        (lambda state: state["run"].update(micro_batch_size=0), "run.micro_batch_size: Input should be greater"),
        (lambda state: state.pop("run"), "run: Field required"),
        (lambda state: state.pop("threads"), "threads: Field required"),
        (lambda state: state.update(threads=10**6), "threads: Input should be less"),
        (lambda state: state.pop("processor"), "processor: Field required"),
        (lambda state: state.update(savedAt="then"), "savedAt: "),
        (lambda state: state.update(historyBytes=-1), "historyBytes: Input should be greater"),
        (lambda state: state.update(fingerprint=[]), "fingerprint: Input should be"),
    ],
)
def test_a_checkpoint_with_impossible_values_is_damaged(
    make: Make, edit: Callable[[dict[str, Any]], object], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sums are right: only training would find the values, and only on a GPU."""
    other = make("other", "stopped")
    change(other.workspace.checkpoints / "step-4", edit)
    continued_settings(other.workspace.root, "other", settings(), ())
    assert continued(make("new"), other) == 2
    assert "step-4 is broken and is passed over" in caplog.text
    assert place in caplog.text


def test_unknown_fields_of_another_version_are_not_read(make: Make) -> None:
    other, context = make("other", "stopped"), make("new")

    def add(state: dict[str, Any]) -> None:
        for part in (state, state["run"], state["run"]["stability"], state["run"]["evaluations"]):
            part["another"] = 1

    change(other.workspace.checkpoints / "step-4", add)
    assert continued(context, other) == 4
    assert run(context).training_step == 6


def test_metrics_are_copied_up_to_their_actual_size(make: Make) -> None:
    other, context = make("other", "stopped"), make("new")
    change(other.workspace.checkpoints / "step-4", lambda state: state.update(historyBytes=2**50))
    assert continued(context, other) == 4
    assert history(context) == history(other)
    lay_terabyte(other.workspace.report / "metrics.jsonl")
    with failing(ExitCode.STORAGE_FULL, match="the checkpoint of other needs"):
        continued(make("another"), other)


@pytest.mark.parametrize(
    ("name", "lay"),
    [
        *((name, lay) for name in ("manifest.json", "state.json") for lay in (lay_pipe, lay_zeros, lay_terabyte)),
        ("state.json", lay_foreign_state),
    ],
)
def test_a_malicious_checkpoint_is_damaged(make: Make, name: str, lay: Callable[[Path], None]) -> None:
    other = make("other", "stopped")
    lay(other.workspace.checkpoints / "step-4" / name)
    assert continued(make("new"), other) == 2


@pytest.mark.slow
def test_prepare_copies_the_checkpoint_and_reports_its_step(make_context: MakeContext, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(20)]
    )
    spec = {"training": {"saveEverySteps": 2}}
    other = make_context(spec)
    prepare(other, Recorded())
    interrupted_at(other, 2)
    other.workspace.root.rename(tmp_path / "other")
    context = make_context(merged(spec, {"continues": "other"}))
    context = replace(context, mounts=replace(context.mounts, continued=tmp_path / "other"))
    record = prepare(context, Recorded())
    assert record.remarks[1:] == ("continues other from step 2",)
    assert (context.workspace.checkpoints / "step-2").is_dir()
    shutil.rmtree(context.workspace.checkpoints)
    assert prepare(context, Recorded()).remarks == record.remarks, "not said twice"
    shutil.rmtree(tmp_path / "other")
    assert prepare(context, Recorded()) == record, "it needs the other job no more"
    (context.workspace.root / record.data_path / "train.safetensors").write_bytes(b"half of a file")
    again = prepare(context, Recorded())
    assert (again.remarks, again.continued_step) == (record.remarks, 2), "its own checkpoint is from there"
    run(context)
    clean(context.workspace)
    prepare(context, Recorded())
    assert not context.workspace.checkpoints.exists()


def test_settings_that_are_left_open_are_those_of_the_run_that_it_continues(
    make_context: MakeContext, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods") for n in range(20)])
    ending = {"training": {"saveEverySteps": 2, "maxSteps": 4}}
    other = make_context(ending)
    prepare(other, Recorded())
    interrupted_at(other, 2)
    other.workspace.root.rename(tmp_path / "other")
    context = make_context({"continues": "other"} | merged(OPEN, ending))
    context = replace(context, mounts=replace(context.mounts, continued=tmp_path / "other"))

    record = prepare(context, Recorded())

    assert record.continued_step == 2
    chosen = {each.setting for each in record.settings if each.reason != "as in other"}
    assert chosen == {"training.gradientCheckpointing"}
    taken = record.resolve(context.spec)
    assert (taken.lora, taken.training) == (resolved_spec(other.spec).lora, resolved_spec(other.spec).training)
    shutil.rmtree(tmp_path / "other")
    assert prepare(context, Recorded()) == record


def test_prepare_fetches_nothing_without_a_run_to_continue(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context({"continues": "other"})
    context = replace(context, mounts=replace(context.mounts, continued=tmp_path))
    with pytest.raises(StepFailure, match="has no checkpoint to continue from"):
        prepare(context, Recorded())
    assert not (tmp_path / "workspace").exists()
