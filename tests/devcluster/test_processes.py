"""Background processes are ended by identity: what runs under a reused pid is never touched."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster import processes
from devcluster.errors import ClusterError
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
def test_a_stranger_with_the_recorded_pid_is_left_alone(sleeper: Record, change: dict[str, object]) -> None:
    outdated = dataclasses.replace(sleeper, **change)  # type: ignore[arg-type]
    assert not processes.alive(outdated)
    processes.stop(outdated)
    assert processes.alive(sleeper)


def test_a_process_that_ignores_sigterm_is_ended_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "log"
    argv = ["sh", "-c", "trap '' TERM; echo deaf; while :; do read -r _ < /dev/zero || :; done"]
    record = processes.start("deaf", argv, directory=tmp_path / "records", log=log, with_parent=True)
    processes.until(lambda: "deaf" in log.read_text(), 10, "the trap", log, [record])
    processes.stop(record, grace=0.2)
    assert not processes.alive(record)


def test_a_program_is_on_record_before_it_does_anything(tmp_path: Path) -> None:
    path, log = tmp_path / "records/reader", tmp_path / "log"
    record = processes.start("reader", ["cat", path], directory=path.parent, log=log)
    processes.until(lambda: not processes.alive(record), 10, "cat to end", log)
    assert processes.parse_record("reader", log.read_text()) == record


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


def test_a_command_name_with_spaces_and_parentheses_is_read() -> None:
    rest = " ".join(["S", *map(str, range(4, 22)), "777", "23", "24"])
    assert processes.parse_record("odd", f"boot\n42 (a) b (c)) {rest}\n") == Record("odd", 42, "boot", 777)


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="process record etcd: expected a boot id"):
        processes.parse_record("etcd", "17\n")


def test_waiting_ends_at_once_with_the_log_when_a_needed_process_dies(tmp_path: Path) -> None:
    log = tmp_path / "log"
    record = processes.start("fragile", ["sh", "-c", "echo no disk; exit 3"], directory=tmp_path / "records", log=log)
    with pytest.raises(ClusterError, match=r"fragile died while waiting for a miracle; last lines of .*log:\nno disk"):
        processes.until(lambda: False, 60, "a miracle", log, [record])
