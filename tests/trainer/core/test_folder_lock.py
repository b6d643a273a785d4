"""Which process may write to a folder on a shared volume, with locks and without."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_trainer.core import folder_lock
from qlora_trainer.core.folder_lock import OWNER_FILE, exclusive, own, take
from tests.support.waiting import eventually

HOLD = """
import sys
from pathlib import Path
from qlora_trainer.core.folder_lock import own
own(Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume that supports none."""

    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def aged(folder: Path, seconds: float) -> Path:
    """The folder, as if it had been idle for so long."""
    for path in (folder / OWNER_FILE, folder):
        if path.exists():
            os.utime(path, (time.time() - seconds,) * 2)
    return folder


def is_taken(folder: Path, *, same_job: bool = False) -> bool:
    ownership = take(folder, time.time(), 100, same_job=same_job)
    if ownership is not None:
        ownership.release()
    return ownership is not None


def test_a_folder_belongs_to_its_owner_until_that_process_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    owner.stdout.readline()
    assert not is_taken(aged(tmp_path, 1000), same_job=True)
    owner.kill()
    owner.communicate()
    assert not is_taken(aged(tmp_path, 50))
    assert is_taken(aged(tmp_path, 50), same_job=True)
    assert is_taken(aged(tmp_path, 1000))


@pytest.mark.usefixtures("without_locks")
def test_without_locks_an_idle_folder_loses_its_owner(tmp_path: Path) -> None:
    own(tmp_path).release()
    assert not is_taken(aged(tmp_path, 50), same_job=True)
    assert is_taken(aged(tmp_path, 1000), same_job=True)
    with exclusive(tmp_path / "lock", longest_wait=1) as now:
        assert now == (tmp_path / "lock").stat().st_mtime


def test_waiting_for_a_lock_ends_after_the_timeout(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", longest_wait=0):
        for seconds in (0, 0.2):
            with (
                pytest.raises(TimeoutError, match="another process holds a lock"),
                exclusive(tmp_path / "lock", seconds),
            ):
                pytest.fail("two are in")
    with exclusive(tmp_path / "lock", longest_wait=0):
        pass


def test_an_owner_touches_its_folder_periodically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_TOUCH_SECONDS", 0.01)
    ownership = own(tmp_path)
    before = aged(tmp_path, 1000).joinpath(OWNER_FILE).stat().st_mtime
    eventually(lambda: (tmp_path / OWNER_FILE).stat().st_mtime > before + 900, every=0.01, what="a touch")
    ownership.release()


def test_a_finished_partial_folder_is_left_as_it_is(tmp_path: Path) -> None:
    """Its owner has removed the file: a file made here would come with the folder."""
    folder = tmp_path / "partial"
    folder.mkdir()
    assert not is_taken(aged(folder, 50), same_job=True)
    assert [*folder.iterdir()] == []
    assert is_taken(aged(folder, 1000))
    assert not is_taken(tmp_path / "gone")


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    os.utime(tmp_path / "precious", (1, 1))
    (tmp_path / OWNER_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        take(tmp_path, time.time() + 1000, 100, same_job=True)
    assert (tmp_path / "precious").stat().st_mtime == 1
