"""`qlora run --restart` deletes what the job's own run has left, and nothing of another one."""

from pathlib import Path

import pytest

from qlora_api.spec.job import QLoRAJobDocument
from qlora_cli.local.restart import discard_runs
from qlora_cli.local.run import LocalRun
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.stores.contents import Manifest
from qlora_trainer.training.checkpoints.attempts import only_attempt
from tests.support.manifests import MINIMAL, merged

OF_A_RUN = ("checkpoints", "trained", "report")


def run_of(name: str, workspace: Path) -> LocalRun:
    document = QLoRAJobDocument.model_validate(merged(MINIMAL, {"metadata": {"name": name}}))
    return LocalRun(document, workspace, {}, {}, "cpu")


def adapter_of(name: str, workspace: Path) -> Path:
    """The folder of the adapter that a job of this name has published."""
    texts = dict.fromkeys(("fingerprint", "spec_sha256", "base_model", "base_revision"), "0")
    manifest = Manifest(job_uid="local", job_name=name, libraries={}, files={}, **texts)
    folder = workspace / "adapter"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(manifest.text())
    return folder


@pytest.fixture
def started(tmp_path: Path) -> LocalRun:
    """A run of the job `mine` that has trained."""
    run = run_of("mine", tmp_path / "work")
    run.remember()
    for name in (*OF_A_RUN, "data", "base"):
        (run.workspace / name).mkdir()
    for step in ("prepare", "train", "publish"):
        (run.workspace / "records" / f"{step}.json").write_text("{}")
    return run


def test_the_run_is_deleted_and_what_was_prepared_stays(started: LocalRun) -> None:
    adapter = adapter_of("mine", started.workspace)
    assert discard_runs([started]) == [*(started.workspace / name for name in OF_A_RUN), adapter]
    assert {path.name for path in started.workspace.iterdir()} == {"data", "base", "records"}
    kept = {"job.json", "run.json", "prepare.json", "train.lock"}
    assert {path.name for path in (started.workspace / "records").iterdir()} == kept


def test_the_adapter_of_another_job_and_files_of_the_user_stay(started: LocalRun) -> None:
    adapter = adapter_of("theirs", started.workspace)
    (started.workspace / "merged").mkdir()
    discard_runs([started])
    assert adapter.exists()
    assert (started.workspace / "merged").exists()


def test_the_run_of_another_job_stays(started: LocalRun) -> None:
    with pytest.raises(StepFailure, match="holds the run of the job mine, and FILE has the job yours: name another"):
        discard_runs([run_of("yours", started.workspace)])
    assert (started.workspace / "checkpoints").exists()


def test_of_several_runs_none_is_deleted_if_one_is_of_another_job(started: LocalRun, tmp_path: Path) -> None:
    run_of("theirs", tmp_path / "other").remember()
    with pytest.raises(StepFailure, match="holds the run of the job theirs"):
        discard_runs([started, run_of("yours", tmp_path / "other")])
    assert (started.workspace / "checkpoints").exists()


def test_a_run_that_trains_stays(started: LocalRun) -> None:
    with only_attempt(started.layout.records), pytest.raises(StepFailure, match="another attempt is still training"):
        discard_runs([started])
    assert (started.workspace / "checkpoints").exists()


def test_there_is_nothing_to_delete_before_the_first_run(tmp_path: Path) -> None:
    adapter = adapter_of("mine", tmp_path)
    assert discard_runs([run_of("mine", tmp_path)]) == []
    assert adapter.exists()
