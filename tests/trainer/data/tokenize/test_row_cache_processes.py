"""Processes that tokenize the rows of a sweep's cells at the same time."""

import os
import signal
import subprocess
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.data.tokenize.chunk_maker import CHUNK_ROWS
from tests.support.commands.command import TIMEOUT_S, Files
from tests.support.models.tiny import chat_row, write_rows
from tests.support.waiting import eventually

WAITING = "waiting for another cell of the sweep to tokenize the same rows"


class Cell(Files):
    """A job of a sweep."""

    @property
    def document(self) -> dict[str, Any]:
        """With a UID unlike the default."""
        name = self.root.name
        return {**super().document, "metadata": {"name": name, "uid": name}}

    def begin(self) -> "subprocess.Popen[str]":
        """Its prepare step, running."""
        pod, sweep = f"pod-of-{self.root.name}", str(self.root.parent / "rates.sweep")
        return self.start("prepare", QLORA_POD_UID=pod, QLORA_SWEEP_FOLDER=sweep)


@pytest.mark.parametrize(
    ("count", "killed"), [pytest.param(3, False, marks=pytest.mark.slow), (2, True)], ids=["goes on", "killed"]
)
def test_one_of_several_processes_tokenizes_and_another_replaces_a_killed_one(
    tmp_path: Path, tiny_llama: Path, count: int, killed: bool
) -> None:
    rows = tmp_path / "rates.sweep" / "rows"
    cells = [Cell(tmp_path / f"rates-0{number}", tiny_llama.parent) for number in range(count)]
    contents = [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(3 * CHUNK_ROWS + 100)]
    for each in cells:
        write_rows(each.data / "train.jsonl", contents)
    inodes: dict[str, set[int]] = defaultdict(set)

    def look() -> int:
        """Note the inode of each chunk: one that is made again is another file."""
        for path in rows.glob("train-*"):
            inodes[path.name].add(path.stat().st_ino)
        return len(inodes)

    with ExitStack() as running:
        first = running.enter_context(cells[0].begin())
        running.callback(first.kill)
        eventually(look, seconds=TIMEOUT_S, every=0.005, what="a chunk")
        first.send_signal(signal.SIGSTOP)
        assert 1 <= look() < 4
        (claim,) = filter(Path.is_dir, rows.iterdir())
        others = [running.enter_context(each.begin()) for each in cells[1:]]
        for process in others:
            running.callback(process.kill)
            assert process.stdout is not None
            assert any(WAITING in line for line in process.stdout)
        if killed:
            first.kill()
            first.wait()
            # As two minutes later.
            owner = claim / ".owner"
            os.utime(owner, (owner.stat().st_mtime - 130,) * 2)
        else:
            first.send_signal(signal.SIGCONT)
            others = [first, *others]
        eventually(
            lambda: look() and all(process.poll() is not None for process in others),
            seconds=TIMEOUT_S,
            every=0.005,
            what="the end of all",
        )
        for process in others:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    assert [len(found) for found in inodes.values()] == [1] * 4
    assert not any(path.is_dir() for path in rows.iterdir())
    ended = cells[1:] if killed else cells
    data = [[*(each.workspace / "data").iterdir()] for each in ended]
    of_each = [{path.name: path.read_bytes() for path in folder.iterdir()} for [folder] in data]
    assert all(found == of_each[0] for found in of_each)
