"""Background processes are ended by identity: another process with a reused pid is never touched."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster import processes
from devcluster.processes import Record


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Record]:
    record = processes.start(
        "sleeper", ["sleep", "300"], directory=tmp_path / "records", log=tmp_path / "log", with_parent=True
    )
    yield record
    processes.stop(record)


def test_a_recorded_process_is_ended(sleeper: Record) -> None:
    assert processes.alive(sleeper)
    processes.stop(sleeper)
    assert not processes.alive(sleeper)


@pytest.mark.parametrize("change", [{"started": 1}, {"boot": "another boot"}])
def test_another_process_with_the_recorded_pid_is_left_alone(sleeper: Record, change: dict[str, object]) -> None:
    outdated = dataclasses.replace(sleeper, **change)  # type: ignore[arg-type]
    assert not processes.alive(outdated)
    processes.stop(outdated)
    assert processes.alive(sleeper)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = ["sh", "-c", "trap '' TERM; echo deaf; while :; do read -r _ < /dev/zero || :; done"]
    record = processes.start("deaf", argv, directory=tmp_path / "records", log=log, with_parent=True)
    processes.until(lambda: "deaf" in log.read_text(), 10, "the trap", log, [record])
    processes.stop(record, grace=0.2)
    assert not processes.alive(record)


def test_a_killed_starter_leaves_a_record_that_ends_its_child(tmp_path: Path) -> None:
    starter = (
        "import os, signal, sys, pathlib; from devcluster import processes; folder = pathlib.Path(sys.argv[1]);"
        "processes.start('orphan', ['sleep', '300'], directory=folder, log=folder.parent / 'log');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(processes.__file__).parent.parent
    subprocess.run([sys.executable, "-c", starter, tmp_path / "records"], cwd=root, check=False)
    (orphan,) = processes.records(tmp_path / "records")
    assert processes.alive(orphan)
    processes.stop(orphan)
    assert not processes.alive(orphan)
