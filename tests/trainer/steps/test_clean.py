"""Clean deletes scratch and incomplete files, and nothing that is the only copy or behind a link."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_api.contract import WorkspaceLayout, needed_contract
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.steps.clean import clean
from qlora_trainer.steps.prepare import prepare
from tests.support.commands.command import Files
from tests.support.models.tiny import JOB_UID, POD_UID, Recorded
from tests.support.runs.published import context, published


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_clean_deletes_scratch_only_and_publish_still_succeeds(trained: Files, tmp_path: Path) -> None:
    record = published(trained)
    layout = WorkspaceLayout(trained.workspace)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("kept")
    layout.models.symlink_to(tmp_path / "outside")
    (layout.data / "link").symlink_to(tmp_path / "outside")
    kept = {folder: content(folder) for folder in (layout.adapter, layout.report, layout.records)}

    clean(layout)
    clean(layout)

    assert sorted(path.name for path in layout.root.iterdir()) == ["adapter", "records", "report"]
    assert {folder: content(folder) for folder in kept} == kept
    assert (tmp_path / "outside" / "precious").read_text() == "kept"
    assert published(trained) == record


def test_clean_keeps_an_unpublished_adapter(trained: Files) -> None:
    layout = WorkspaceLayout(trained.workspace)
    kept = content(layout.trained)
    clean(layout)
    assert content(layout.trained) == kept
    assert not layout.checkpoints.exists()


@pytest.mark.parametrize("is_cleaned", [False, True], ids=["as it ended", "cleaned"])
def test_prepare_of_a_job_without_status_finds_the_run_and_makes_nothing(trained: Files, is_cleaned: bool) -> None:
    record = published(trained)
    layout = WorkspaceLayout(trained.workspace)
    if is_cleaned:
        clean(layout)
    before = {path: path.stat().st_mtime_ns for path in layout.root.rglob("*")}

    assert sha256_found_by_prepare(trained) == record.adapter.sha256

    assert {path: path.stat().st_mtime_ns for path in layout.root.rglob("*")} == before


def test_prepare_finds_a_run_that_is_not_published_yet_and_none_whose_adapter_is_gone(trained: Files) -> None:
    layout = WorkspaceLayout(trained.workspace)
    assert sha256_found_by_prepare(trained) == file_sha256(layout.trained / ADAPTER_FILE)
    published(trained)
    clean(layout)
    (layout.adapter / ADAPTER_FILE).write_bytes(b"cut")
    assert sha256_found_by_prepare(trained) is None


def sha256_found_by_prepare(files: Files) -> str | None:
    """The adapter of the finished run that prepare finds, None if it finds none."""
    records = Recorded()
    # As the operator sets it for a job whose profile has no key to sign with.
    prepare(replace(context(files), contract_version=needed_contract(1)), records)
    found = records.findings.trained
    return None if found is None else found.adapter_sha256


KILLED_WRITES = """
import os, sys
from pathlib import Path
from qlora_api.contract import WorkspaceLayout, needed_contract
from qlora_trainer.core import filesystem
workspace = WorkspaceLayout(Path(sys.argv[1]))
folders = (workspace.trained, workspace.base, workspace.checkpoints / "step-1", workspace.models / "1")
begun = [*map(filesystem.atomic_folder, folders), filesystem.scratch_folder(workspace.merged)]
for folder in begun:
    (folder.__enter__() / "model.safetensors").write_bytes(b"weights")
os.fsync = lambda _: os._exit(7)
filesystem.write_atomically(Path(sys.argv[2]), b"record")
"""


def test_clean_deletes_incomplete_files_of_a_killed_step(tmp_path: Path) -> None:
    layout = WorkspaceLayout(tmp_path)
    for folder in (layout.records, layout.report, layout.adapter, layout.merged):
        folder.mkdir()
    for path in (layout.completion("train"), layout.report / "summary.json"):
        command = [sys.executable, "-c", KILLED_WRITES, str(tmp_path), str(path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        assert subprocess.run(command, check=False, env=environment).returncode == 7
    for name in (f".adapter.{JOB_UID}.{POD_UID}.partial", f".adapter.{JOB_UID}.{POD_UID}.replaced.partial"):
        (tmp_path / name).mkdir()
    assert len(list(tmp_path.rglob("*.partial"))) == 9
    clean(layout)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", "merged", "records", "report"]


def test_clean_deletes_nothing_behind_a_link(tmp_path: Path) -> None:
    layout, outside = WorkspaceLayout(tmp_path / "job"), tmp_path / "outside"
    layout.root.mkdir()
    outside.mkdir()
    (outside / ".theirs.partial").touch()
    for folder in (layout.records, layout.report, layout.models):
        folder.symlink_to(outside)
    clean(layout)
    assert [path.name for path in outside.iterdir()] == [".theirs.partial"]


def test_the_clean_command_writes_nothing_into_the_workspace(trained: Files) -> None:
    (trained.workspace / "records" / "clean.log").mkdir()
    done = trained.run("clean")
    assert (done.exit_code, done.result.outcome) == (0, "succeeded")
    assert not (trained.workspace / "checkpoints").exists()
