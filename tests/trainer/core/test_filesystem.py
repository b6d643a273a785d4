"""Files and folders are written complete, or are recognized as incomplete by name."""

import os
from pathlib import Path

import pytest

from qlora_trainer.core.filesystem import (
    atomic_folder,
    complete_folder,
    new_folder,
    partial_path,
    remove,
    remove_partials,
    scratch_folder,
    write_atomically,
)


def test_an_atomic_folder_has_its_name_only_when_the_body_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "new" / "trained"
    with atomic_folder(target) as partial:
        (partial / "adapter").write_bytes(b"weights")
        assert partial == tmp_path / "new" / ".trained.partial"
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["trained"]
    assert (target / "adapter").read_bytes() == b"weights"


def test_an_atomic_folder_replaces_an_older_one_and_partial_files(tmp_path: Path) -> None:
    target = tmp_path / "trained"
    for folder in (target, partial_path(target)):
        folder.mkdir()
        (folder / "old").touch()
    with atomic_folder(target) as partial:
        (partial / "new").touch()
        assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["trained"]
    assert os.listdir(target) == ["new"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_body_that_raises_leaves_the_older_folder_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "trained"
    new_folder(target)
    (target / "old").touch()

    def write() -> None:
        with atomic_folder(target) as partial:
            (partial / "new").touch()
            raise error

    with pytest.raises(error):
        write()
    assert os.listdir(tmp_path) == ["trained"]
    assert os.listdir(target) == ["old"]


def test_everything_is_synced_before_the_rename_and_the_rename_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    partial = new_folder(tmp_path / ".data.partial")
    (partial / "inner").mkdir()
    (partial / "inner" / "file").touch()
    complete_folder(partial, tmp_path / "data")
    folders = [str(path) for path in (partial / "inner", partial / "inner" / "file", partial)]
    assert synced == [*folders, str(tmp_path)]


def test_a_scratch_folder_is_deleted_afterwards(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "merged") as folder:
        (folder / "weights").touch()
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.json"
    write_atomically(path, b"old")

    def fail(_number: int) -> None:
        raise OSError("broken disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken disk"):
        write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["train.json"]
    assert path.read_bytes() == b"old"


def test_two_processes_that_write_a_file_concurrently_both_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second may have the same process id, and writes while the first one syncs."""
    path, fsync = tmp_path / "prepare.json", os.fsync

    def sync_while_another_writes(number: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(path, b"its record")
        assert path.read_bytes() == b"its record"
        fsync(number)

    monkeypatch.setattr(os, "fsync", sync_while_another_writes)
    write_atomically(path, b"this record")
    assert path.read_bytes() == b"this record"
    assert os.listdir(tmp_path) == ["prepare.json"]


def test_every_new_parent_folder_is_synced_into_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    write_atomically(tmp_path / "team" / "job" / "record.json", b"{}")
    assert synced[:2] == [str(tmp_path), str(tmp_path / "team")]
    assert synced[-1] == str(tmp_path / "team" / "job")


def test_of_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    outside, linked, dangling = tmp_path / "outside", tmp_path / "link", tmp_path / "dangling"
    outside.mkdir()
    linked.symlink_to(outside)
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (linked, dangling, tmp_path / "absent"):
        remove(path)
    assert os.listdir(tmp_path) == ["outside"]


def test_partials_are_removed_except_the_one_to_resume(tmp_path: Path) -> None:
    kept, old, file = (partial_path(tmp_path / name) for name in ("kept", "old", "record.json"))
    for folder in (kept, old, tmp_path / "data"):
        folder.mkdir()
    file.touch()
    remove_partials(tmp_path, but=kept)
    assert sorted(os.listdir(tmp_path)) == [".kept.partial", "data"]
