"""Tokenizing in chunks: the same bytes for any processes and interruptions."""

import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.core import environment
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.tokenize import chunk_maker as tokenize
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.runs.forks import forked
from tests.trainer.conftest import MakeContext
from tests.trainer.data.conftest import data_bytes

ROWS = [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(120)]


class Stop(Exception):  # noqa: N818 - no error
    """Ends prepare as a signal would."""


class StopAfter(Recorded):
    """Records that end the step as soon as `rows` rows are tokenized."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows

    def progress(self, record: Any, *, force: bool = False) -> None:
        super().progress(record, force=force)
        if record.activity == f"tokenizing: {self._rows} rows done":
            raise Stop


def test_workers_interruptions_and_chunks_change_nothing(
    make_context: MakeContext,
    tmp_path: Path,
    workers: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    spec = {"dataset": {"eval": {"fraction": 0.2}}}
    whole = data_bytes(make_context(spec))
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 10)
    monkeypatch.setattr(tokenize, "_CHUNKS_ALONE", 3)
    for count in (1, 2):
        workers(count)
        context = make_context({**spec, "lora": {"targetModules": [["q_proj"], ["v_proj"]][count - 1]}})
        for rows in (20, 50)[count - 1 :]:
            with pytest.raises(Stop):
                prepare(context, StopAfter(rows))
        chunks = list((context.workspace.data / ".rows.partial").iterdir())
        assert 5 <= len(chunks) < 12
        made = data_bytes(context)
        assert {name: made[name] for name in made if name != "manifest.json"} == {
            name: whole[name] for name in whole if name != "manifest.json"
        }
    assert "PyTorch" not in capfd.readouterr().err, "a worker misses what it does without"


@pytest.mark.usefixtures("small_chunks")
def test_tokenized_chunks_are_reused_and_damaged_ones_made_again(
    make_context: MakeContext, tmp_path: Path, workers: Any, made: list[int]
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    workers(1)
    context = make_context()
    with pytest.raises(Stop):
        prepare(context, StopAfter(70))
    made.clear()
    [first, *_] = (context.workspace.data / ".rows.partial").iterdir()
    first.write_bytes(first.read_bytes()[:-1])  # a disk that lost the end of a file
    prepare(context, Recorded())
    assert made == [10] * 6
    assert [path.name for path in context.workspace.data.iterdir()] == [prepare(context, Recorded()).fingerprint]


@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_another_trainer_version_are_made_again(
    make_context: MakeContext, tmp_path: Path, workers: Any, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    workers(1)
    with pytest.raises(Stop):
        prepare(make_context(), StopAfter(70))
    made.clear()
    installed = version
    monkeypatch.setattr(environment, "version", lambda name: "0.0.1" if name == "qlora-operator" else installed(name))
    prepare(make_context(), Recorded())
    assert made == [10] * 12


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("change", ["rows", "length"])
def test_chunks_of_other_data_or_settings_are_not_used(
    make_context: MakeContext, tmp_path: Path, workers: Any, change: str
) -> None:
    path = write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    workers(1)
    with pytest.raises(Stop):
        prepare(make_context(), StopAfter(70))
    spec = {"training": {"maxSequenceLength": 32}} if change == "length" else {}
    if change == "rows":
        write_rows(path, ROWS[::-1])
    resumed = data_bytes(make_context(spec))
    (tmp_path / "workspace" / "records" / "prepare.json").unlink()
    assert resumed == data_bytes(make_context(spec))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [1, 2])
def test_the_first_invalid_row_is_reported_by_any_process(
    make_context: MakeContext, tmp_path: Path, workers: Any, count: int
) -> None:
    """A chunk's last row is wrong, a later chunk too, and the file's end unreadable."""
    path = write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[19], lines[33] = b"3\n", b"[]\n"
    path.write_bytes(b"".join(lines) + b"\xff")
    workers(count)
    context = make_context()
    with pytest.raises(StepFailure, match=r"train\.jsonl line 20 is a number"):
        prepare(context, Recorded())
    assert not [*context.workspace.root.rglob("*")]


class KilledAfter(StopAfter):
    """Records that kill their process instead."""

    def progress(self, record: Any, *, force: bool = False) -> None:
        try:
            super().progress(record, force=force)
        except Stop:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_prepare_resumes_from_its_chunks_to_the_same_bytes(
    make_context: MakeContext, tmp_path: Path, workers: Any
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    workers(1)
    context = make_context()
    found: list[dict[str, int]] = []
    for rows in (30, 70):
        with forked(prepare, context, KilledAfter(rows)) as process:
            process.join()
        assert process.exitcode == -signal.SIGKILL
        # The inode of a chunk's file changes with a new file.
        paths = context.workspace.data.glob(".rows.partial/train-*.safetensors")
        found.append({path.name: path.stat().st_ino for path in paths})

    first, second = found
    assert (len(first), len(second)) == (3, 7)
    # A chunk is made after those before it.
    assert {name: second[name] for name in first} == first
    resumed = data_bytes(context)
    shutil.rmtree(context.workspace.root)
    assert resumed == data_bytes(context)


def test_workers_end_with_the_process_that_is_killed(tmp_path: Path) -> None:
    """No worker keeps reading a volume that another pod has mounted by then."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, sys, threading\n"
        "from qlora_trainer.data.tokenize.chunk_maker import _end_with_parent\n"
        "def child(pipe):\n"
        "    threading.Thread(target=_end_with_parent, daemon=True).start()\n"
        "    pipe.send(1)\n"
        "    threading.Event().wait()\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    here, there = context.Pipe()\n"
        "    process = context.Process(target=child, args=(there,))\n"
        "    process.start()\n"
        "    here.recv()\n"
        "    print(process.pid, flush=True)\n"
        "    threading.Event().wait()\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        descriptor = os.pidfd_open(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    try:
        assert multiprocessing.connection.wait([descriptor], timeout=60)
    finally:
        os.close(descriptor)
