"""Rows that cells of a sweep share: tokenized once, also concurrently, and verified."""

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core import folder_lock
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.folder_lock import exclusive
from qlora_trainer.data.tokenize import row_cache as rows_folder
from qlora_trainer.data.tokenize.chunks import Chunk, Limits
from qlora_trainer.steps.prepare import prepare
from tests.support.commands.command import TIMEOUT_S
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.runs.forks import forked
from tests.trainer.conftest import MakeContext
from tests.trainer.data.conftest import data_bytes

ROWS = [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(120)]
OTHER_CELL = {"lora": {"rank": 8}, "training": {"seed": 7, "learningRate": 2e-3}}
WAITING = "waiting for another cell of the sweep to tokenize the same rows"
MakeCell = Callable[..., StepContext]


@pytest.fixture
def cell(make_context: MakeContext, tmp_path: Path, workers: Any, small_chunks: None) -> MakeCell:
    """Makes contexts of a sweep's cells with twelve chunks, in folders of one claim."""
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    workers(1)

    def make(name: str, spec: dict[str, Any] | None = None, *, shared: bool = True) -> StepContext:
        context = make_context(spec)
        return replace(
            context,
            document=context.document.model_copy(
                update={"metadata": context.document.metadata.model_copy(update={"name": name, "uid": name})}
            ),
            workspace=WorkspaceLayout(tmp_path / name),
            mounts=replace(context.mounts, sweep=tmp_path / "rates.sweep" if shared else None),
            pod_uid=f"pod-of-{name}",
        )

    return make


@pytest.fixture
def alone(cell: MakeCell, made: list[int]) -> dict[str, bytes]:
    """The data of the other cell, made without sharing."""
    data = data_bytes(cell("alone", OTHER_CELL, shared=False))
    made.clear()
    return data


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell looks three times for a chunk that another cell makes."""
    monkeypatch.setattr(rows_folder, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(rows_folder, "_MOST_LOOKS", 3)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The folder with the shared rows."""
    return tmp_path / "rates.sweep" / "rows"


class Acting(Recorded):
    """Records that act once, when the step logs this action."""

    def __init__(self, activity: str, act: Callable[[], object]) -> None:
        super().__init__()
        self._activity, self._act, self._acted = activity, act, False

    def progress(self, record: Any, *, force: bool = False) -> None:
        super().progress(record, force=force)
        if record.activity == self._activity and not self._acted:
            self._acted = True
            self._act()


def said(records: Recorded) -> list[str]:
    """Actions that the step has logged."""
    return [entry["activity"] for entry in records.written]


def test_cells_of_a_sweep_tokenize_their_rows_once(
    cell: MakeCell, alone: dict[str, bytes], rows: Path, made: list[int]
) -> None:
    prepare(cell("rates-00"), Recorded())
    assert made == [10] * 12

    assert data_bytes(cell("rates-01", OTHER_CELL)) == alone
    assert made == [10] * 12
    assert len([*rows.iterdir()]) == 13, "beside the chunks only the lock"


def test_a_cell_does_not_trust_shared_rows_that_are_damaged(cell: MakeCell, rows: Path, made: list[int]) -> None:
    first = cell("rates-00")
    prepare(first, Recorded())
    made.clear()
    flipped, cut, *_ = sorted(rows.glob("train-*"))
    content = flipped.read_bytes()
    flipped.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cut.write_bytes(cut.read_bytes()[:-1])

    prepare(cell("rates-01"), Recorded())

    assert made == [10] * 2
    assert flipped.read_bytes() == content


def with_unknown_token(chunk: Chunk) -> Chunk:
    ids = chunk.input_ids.copy()
    ids[5] = 100_000
    return replace(chunk, input_ids=ids)


def with_a_row_too_much(chunk: Chunk) -> Chunk:
    return replace(chunk, lengths=chunk.lengths + numpy.eye(1, len(chunk.lengths), dtype=numpy.int32)[0])


def with_long_rows(chunk: Chunk) -> Chunk:
    """Two rows as one."""
    lengths, counts = chunk.lengths[1:].copy(), chunk.target_counts[1:].copy()
    lengths[0] += chunk.lengths[0]
    counts[0] += chunk.target_counts[0]
    return replace(chunk, lengths=lengths, target_counts=counts, digests=chunk.digests[1:])


def with_64_bits(chunk: Chunk) -> Chunk:
    return replace(chunk, input_ids=chunk.input_ids.astype(numpy.int64))


def test_a_cell_does_not_train_on_shared_rows_that_no_trainer_makes(
    cell: MakeCell, rows: Path, made: list[int]
) -> None:
    """Each has a digest that fits its content."""
    longest = {"maxSequenceLength": 32}
    prepare(cell("rates-00", {"training": longest}), Recorded())
    made.clear()
    before = {path: path.read_bytes() for path in sorted(rows.glob("train-*"))}
    changes = (with_unknown_token, with_a_row_too_much, with_long_rows, with_64_bits)
    for path, change in zip(before, changes, strict=False):
        chunk = Chunk.read(path, Limits(vocabulary=512, longest=32))
        assert chunk is not None
        change(chunk).write(path)
        assert path.read_bytes() != before[path]

    prepare(cell("rates-01", {"training": {"seed": 7, **longest}}), Recorded())

    assert made == [10] * len(changes)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("obstacle", ["folder", "another user's"])
def test_a_cell_without_rights_to_replace_shared_rows_uses_its_own(
    cell: MakeCell,
    alone: dict[str, bytes],
    rows: Path,
    made: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    obstacle: str,
) -> None:
    prepare(cell("rates-00"), Recorded())
    made.clear()
    wrong, *_ = sorted(rows.glob("train-*"))
    wrong.unlink()
    if obstacle == "folder":
        wrong.mkdir()
    else:
        wrong.write_bytes(b"")
        rename = Path.replace

        def sticky(path: Path, target: Path) -> Path:
            if target == wrong:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path), None, str(target))
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", sticky)

    assert data_bytes(cell("rates-01", OTHER_CELL)) == alone

    assert made == [10]
    assert "the rows of this job go into its own folder" in caplog.text


def test_a_cell_that_may_not_use_the_shared_folder_uses_its_own(
    cell: MakeCell, alone: dict[str, bytes], rows: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(cell("rates-00"), Recorded())
    made.clear()
    opened = os.open

    def denied(path: Any, *more: Any, **named: Any) -> int:
        if Path(path) == rows / ".lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *more, **named)

    monkeypatch.setattr(os, "open", denied)
    assert data_bytes(cell("rates-01", OTHER_CELL)) == alone
    assert made == [10] * 12


@pytest.mark.usefixtures("impatient")
def test_a_cell_does_not_wait_for_a_pod_that_hangs_with_the_lock(
    cell: MakeCell, alone: dict[str, bytes], rows: Path, made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    rows.mkdir(parents=True)
    records, later = Recorded(), Recorded()

    with exclusive(rows / ".lock", longest_wait=1):
        waiting = cell("rates-00", OTHER_CELL)
        prepare(waiting, records)
        prepare(cell("rates-01"), later)

    assert said(records).count(WAITING) == 3, "as for a pod that makes the rows and hangs"
    assert "or not released the lock next to it: this one makes the rows itself" in caplog.text
    assert WAITING not in said(later), "what is there needs no lock"
    assert made == [10] * 12
    assert data_bytes(waiting) == alone


def test_cells_with_other_rows_keep_the_others_rows_and_unfinished_files(cell: MakeCell, rows: Path) -> None:
    drawn = {"shuffle": True, "maxRows": 100}
    prepare(cell("rates-00", {"dataset": drawn}), Recorded())
    before = set(rows.glob("train-*"))
    fresh, forgotten = rows / ".train-0.partial", rows / ".train-1.partial"
    fresh.touch()
    forgotten.touch()
    os.utime(forgotten, (0, 0))

    prepare(cell("rates-01", {"dataset": drawn, **OTHER_CELL}), Recorded())

    assert before < set(rows.glob("train-*"))
    assert fresh.exists()
    assert not forgotten.exists()


def test_shared_rows_are_not_written_through_a_link(cell: MakeCell, tmp_path: Path) -> None:
    (tmp_path / "rates.sweep").symlink_to(tmp_path / "data")

    with pytest.raises(OSError, match=r"rates\.sweep is a symbolic link: delete it"):
        prepare(cell("rates-00"), Recorded())


# At the same time


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume that supports none."""

    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(folder_lock, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": flock}))


@pytest.mark.parametrize("volume", ["with_locks", pytest.param("without_locks", marks=pytest.mark.slow)])
def test_a_cell_waits_for_the_one_that_tokenizes_the_same_rows(
    cell: MakeCell,
    alone: dict[str, bytes],
    made: list[int],
    monkeypatch: pytest.MonkeyPatch,
    volume: str,
    request: pytest.FixtureRequest,
) -> None:
    if volume == "without_locks":
        request.getfixturevalue(volume)
    monkeypatch.setattr(rows_folder, "_LOOK_SECONDS", 0.01)
    half_done, waits = threading.Event(), threading.Event()

    def hold() -> None:
        half_done.set()
        assert waits.wait(TIMEOUT_S)

    first, second = Acting("tokenizing: 50 rows done", hold), Acting(WAITING, waits.set)
    with ThreadPoolExecutor() as threads:
        holding = threads.submit(prepare, cell("rates-00"), first)
        assert half_done.wait(TIMEOUT_S)
        waiting = cell("rates-01", OTHER_CELL)
        try:
            prepare(waiting, second)
        finally:
            waits.set()
        holding.result()

    assert WAITING in said(second)
    assert WAITING not in said(first)
    assert made == [10] * 12
    assert data_bytes(waiting) == alone


def test_a_cell_replaces_one_that_is_killed(
    cell: MakeCell, alone: dict[str, bytes], rows: Path, made: list[int]
) -> None:
    killed = Acting("tokenizing: 50 rows done", lambda: os.kill(os.getpid(), signal.SIGKILL))
    with forked(prepare, cell("rates-00"), killed) as process:
        process.join()
    assert process.exitcode == -signal.SIGKILL
    [claim] = filter(Path.is_dir, rows.iterdir())
    # As two minutes later.
    os.utime(claim / ".owner", ((claim / ".owner").stat().st_mtime - 130,) * 2)

    assert data_bytes(cell("rates-01", OTHER_CELL)) == alone
    assert made == [10] * 7, "the chunks of the other one are used"
    assert not any(path.is_dir() for path in rows.iterdir())


def test_a_cell_with_other_settings_does_not_wait(
    cell: MakeCell, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_folder, "_MOST_LOOKS", 1)
    longer = cell("rates-01", {"training": {"maxSequenceLength": 128}})
    others = Recorded()

    prepare(cell("rates-00"), Acting("tokenizing: 50 rows done", lambda: prepare(longer, others)))

    assert WAITING not in said(others)
    assert made == [10] * 24


@pytest.mark.usefixtures("impatient")
def test_a_cell_that_has_waited_for_too_long_tokenizes_the_rows_itself(
    cell: MakeCell, alone: dict[str, bytes], made: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    waiting, hanging = cell("rates-01", OTHER_CELL), Recorded()

    prepare(cell("rates-00"), Acting("tokenizing: 50 rows done", lambda: prepare(waiting, hanging)))

    assert said(hanging).count(WAITING) == 3, "for one chunk, and for no other"
    assert "this one makes the rows itself" in caplog.text
    assert made == [10] * 12, "it uses what is there, and leaves the rest to the other"
    assert data_bytes(waiting) == alone


def test_every_cell_reports_invalid_rows_itself(cell: MakeCell, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_folder, "_MOST_LOOKS", 1)
    path = rows.parents[1] / "data" / "train.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[55] = b"3\n"
    path.write_bytes(b"".join(lines))

    for name in ("rates-00", "rates-01"):
        records = Recorded()
        with pytest.raises(StepFailure, match=r"train\.jsonl line 56 is a number"):
            prepare(cell(name), records)
        assert WAITING not in said(records)
