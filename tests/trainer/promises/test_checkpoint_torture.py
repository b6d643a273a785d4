"""Checkpoints under torture: kills at random instants, damage to every file, a disk that is full at every write.

A checkpoint that verifies is used as long as one exists, never another; at most the work since the last save is lost;
and no old checkpoint goes before a newer one is on disk and verified.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.outcome import classify
from qlora_trainer.training.checkpoints.checkpoint import newest_checkpoint, read_checkpoint
from tests.support.runs import checkpoints
from tests.support.runs.bad_disk import BadDisk, bad_disk
from tests.support.runs.checkpoints import FILES, in_child, newest_step, save
from tests.support.runs.forks import server
from tests.support.training import adapter_bytes, history, interrupted_at, prepared, run

KILLS = [60, pytest.param(200, marks=pytest.mark.slow)]
LONGEST_DELAY_S = 0.02
FULL_DISKS = [4, pytest.param(12, marks=pytest.mark.slow)]


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints that verify, ascending."""
    found = []
    for path in folder.glob("step-*"):
        try:
            found.append(read_checkpoint(path).step)
        except ValueError:
            continue
    return sorted(found)


@pytest.mark.parametrize("kills", KILLS)
def test_no_kill_at_any_instant_costs_more_than_the_step_that_was_being_saved(kills: int, tmp_path: Path) -> None:
    # Forked from a process that has loaded PyTorch and nothing else: here, a thread of an earlier test may hold a lock.
    context, random = server(), Random(0)
    reached, awaited = 0, 0
    for _ in range(kills):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=checkpoints.save_for_ever, args=(tmp_path, send))
        process.start()
        send.close()
        for _ in range(random.randrange(3)):
            reached = receive.recv()
            awaited += 1
        process.join(random.uniform(0, LONGEST_DELAY_S))
        assert process.exitcode is None
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        try:
            while True:
                reached = receive.recv()
        except EOFError:
            receive.close()
        # At least two whole ones at any time, once two were saved.
        assert len(steps_in(tmp_path)) >= min(reached, 2)
        found = newest_step(tmp_path)
        assert (found or 0) in (reached, reached + 1)
        reached = found or 0
        assert not list(tmp_path.glob("*.corrupt"))
        assert not list(tmp_path.glob(".*"))
    assert reached >= awaited > kills / 2


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 2 and 4."""
    save(tmp_path, 2, 4)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_every_bit_of_a_checkpoint_counts(name: str, two: Path) -> None:
    path = two / "step-4" / name
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8) if name.endswith(".json") else (place % 8,):
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
            with pytest.raises(ValueError, match="step-4 is damaged"):
                read_checkpoint(path.parent)
    path.write_bytes(content)

    assert newest_step(two) == 4


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_cut_or_grown_anywhere_is_set_aside(name: str, two: Path) -> None:
    path = two / "step-4" / name
    content = path.read_bytes()
    # A file that a lost write left full of zeros is as bad as one cut short.
    changed = [content[:length] for length in range(len(content))]
    changed += [content[:length].ljust(len(content), b"\0") for length in range(0, len(content) - 2, 7)]
    changed += [content + b"\0", content + content, content + b" x"]
    for other in changed:
        if other == content:
            continue
        path.write_bytes(other)
        with pytest.raises(ValueError, match="step-4 is damaged"):
            read_checkpoint(path.parent)

    assert newest_step(two) == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("instead", ["folder", "dangling link", "link to itself", "file of the other checkpoint"])
def test_another_object_in_place_of_a_file_is_rejected(name: str, instead: str, two: Path) -> None:
    path = two / "step-4" / name
    other = (two / "step-2" / name).read_bytes()
    # One of the files is the same in both checkpoints, and may be.
    same = other == path.read_bytes() and instead == "file of the other checkpoint"
    path.unlink()
    if instead == "folder":
        path.mkdir()
    elif instead == "file of the other checkpoint":
        path.write_bytes(other)
    else:
        path.symlink_to(path.name if instead == "link to itself" else "nowhere")

    assert newest_step(two) == (4 if same else 2)


def test_when_all_are_damaged_none_is_used_and_all_are_kept(two: Path) -> None:
    for step in (2, 4):
        (two / f"step-{step}" / "state.json").write_text("{}")

    assert newest_checkpoint(two) is None
    assert sorted(path.name for path in two.iterdir()) == ["step-2.corrupt", "step-4.corrupt"]
    save(two, 2)
    assert newest_step(two) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_save_that_fails_at_any_operation_leaves_the_earlier_checkpoints(number: int, tmp_path: Path) -> None:
    """Fail each file system operation in turn, until the save succeeds."""
    for failing in range(1, 200):
        folder = tmp_path / str(failing)
        save(folder, 1, 2)

        def save_on_bad_disk(folder: Path = folder, failing: int = failing) -> None:
            with bad_disk(folder, failing, number):
                save(folder, 3)

        status = os.waitstatus_to_exitcode(in_child(save_on_bad_disk))
        assert len(steps_in(folder)) >= 2
        assert newest_step(folder) in (2, 3)
        assert not list(folder.glob("*.corrupt"))
        if status == 0:
            assert steps_in(folder) == [2, 3]
            assert failing > 20  # the sweep has gone through the whole save
            return
    pytest.fail("the save never got through")


SHORT_RUN = {
    "training": {
        "maxSteps": 3,
        "saveEverySteps": 1,
        "gradientAccumulationSteps": 1,
        "evalEverySteps": 1,
        "keep": "best",
    },
}


def full_from(failing: int, workspace: Path) -> AbstractContextManager[BadDisk]:
    """A volume that is full from that write on."""
    return bad_disk(workspace, failing, errno.ENOSPC, stays_full=True)


@pytest.mark.parametrize("full_disks", FULL_DISKS)
def test_a_run_on_a_volume_that_fills_up_at_any_write_resumes_to_the_same_bytes(
    full_disks: int, tmp_path: Path, tiny_llama: Path
) -> None:
    """Fill the train step's volume at the first, some other or the last write."""
    undisturbed = prepared(tmp_path / "undisturbed", tiny_llama, SHORT_RUN)
    with full_from(sys.maxsize, undisturbed.workspace.root) as disk:
        run(undisturbed)
    assert disk.operations > 50
    some = Random(0).sample(range(2, disk.operations), full_disks - 2)

    for failing in (1, *some, disk.operations):
        context = prepared(tmp_path / str(failing), tiny_llama, SHORT_RUN)
        with full_from(failing, context.workspace.root), pytest.raises(OSError, match="No space left") as caught:
            run(context)
        assert classify(caught.value).exit_code is ExitCode.STORAGE_FULL

        assert run(context).training_step == 3
        assert adapter_bytes(context) == adapter_bytes(undisturbed), failing
        assert history(context) == history(undisturbed), failing
        assert not list(context.workspace.root.rglob("*.partial"))


def test_a_saved_stop_counts_although_its_record_does_not_fit_the_volume(tmp_path: Path, tiny_llama: Path) -> None:
    counted, full = (prepared(tmp_path / name, tiny_llama, SHORT_RUN) for name in ("counted", "full"))
    with full_from(sys.maxsize, counted.workspace.root) as disk:
        interrupted_at(counted, 2)

    with full_from(disk.operations, full.workspace.root):
        interrupted_at(full, 2)

    assert run(full).training_step == 3


FILL = """
import os, shutil, sys
from pathlib import Path
from tests.support.runs.checkpoints import newest_step, save
root, kind = Path(sys.argv[1]), sys.argv[2]
failed = 0
for left in range(100):
    folder = root / "checkpoints"
    save(folder, 1, 2, size=3000)
    ballast, free = [], os.statvfs(root)
    if kind == "pages":
        (root / "ballast").write_bytes(bytes((free.f_bavail - left) * free.f_bsize))
    else:
        for number in range(free.f_favail - left):
            (root / f"ballast-{number}").touch()
    try:
        save(folder, 3, size=3000)
        done = True
    except Exception as error:
        done = False
        failed += 1
    found, names = newest_step(folder), sorted(path.name for path in folder.iterdir())
    assert (found, names) == ((3, ["step-2", "step-3"]) if done else (2, ["step-1", "step-2"])), (left, found, names)
    for path in root.glob("ballast*"):
        path.unlink()
    shutil.rmtree(folder)
    if done:
        print(failed)
        break
"""


@pytest.mark.parametrize("kind", ["pages", "inodes"])
def test_a_volume_that_is_full_at_any_write_leaves_the_earlier_checkpoints(kind: str, tmp_path: Path) -> None:
    """A real file system has room for nothing, then for one page or file more a time."""
    mount = f"mount -t tmpfs -o size=1m,nr_inodes=64 none {tmp_path}"
    script = f"{mount} && exec {sys.executable} -c '{FILL}' {tmp_path} {kind}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"no small file system can be mounted here: {result.stderr.strip()}")

    assert int(result.stdout or 0) >= 4, result.stderr


def test_power_may_fail_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are synced before the rename, and the rename before any removal."""
    folder = tmp_path / "checkpoints"
    events: list[tuple[str, str]] = []
    fsync, rename, remove = os.fsync, os.rename, shutil.rmtree

    def record(name: str, call: Callable[..., Any], path_of: Callable[[Any], str]) -> Callable[..., Any]:
        def recorded(first: Any, *others: Any, **settings: Any) -> Any:
            events.append((name, path_of(first)))
            return call(first, *others, **settings)

        return recorded

    monkeypatch.setattr(os, "fsync", record("sync", fsync, lambda number: os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(os, "rename", record("rename", rename, str))
    monkeypatch.setattr(shutil, "rmtree", record("remove", remove, str))
    save(folder, 1)
    assert ("sync", str(tmp_path)) in events  # the folder of all checkpoints is new too
    save(folder, 2)
    events.clear()
    save(folder, 3)

    unfinished = folder / ".step-3.partial"
    written = {str(unfinished), *(str(unfinished / path.name) for path in (folder / "step-3").iterdir())}
    renamed = events.index(("rename", str(unfinished)))
    assert {path for name, path in events[:renamed] if name == "sync"} >= written
    removed = events.index(("remove", str(folder / "step-1")))
    assert ("sync", str(folder)) in events[renamed:removed]
