"""Tries hostile input: its place, its bounds, and the files that must stay unchanged."""

import os
import resource
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.rejected.inputs import Rejected
from tests.support.rejected.made import Place
from tests.trainer.conftest import MakeContext

SECRET = "hf_secretsecretsecret"
MEMORY_BYTES = 3 * 2**30
SECONDS = 120
_HASHED_BYTES = 2**26


@dataclass(frozen=True)
class Trial:
    """Prepares a job over a tiny model and three rows, with the input of a case."""

    place: Place
    context: MakeContext

    def require_rejection(self, case: Rejected) -> None:
        """Check that the case ends as stated, runs no code and leaves nothing behind."""
        if case.dataset:
            self.place.put(self.place.data, case.files)
        else:
            self.place.put(self.place.model, case.files)
            write_rows(self.place.data / "train.jsonl", [chat_row("a question", "an answer")] * 3)
        context = self.context({"dataset": case.dataset}, model=self.place.model)
        before = contents(self.place.root, but=context.workspace.root)
        with bounded(), pytest.raises(StepFailure) as failure:
            prepare(context, Recorded())
        message, begins = failure.value.message, case.message.startswith("pvc://")
        assert failure.value.exit_code is case.code, message
        assert message.startswith(case.message) if begins else case.message in message, message
        assert len(message) < 700
        assert SECRET not in message
        assert not self.place.canary.exists()
        assert contents(self.place.root, but=context.workspace.root) == before
        assert not [*context.workspace.root.rglob("*")]


def new_place(root: Path, model: Path) -> Place:
    """The folders of a job that nothing is wrong with."""
    place = Place(root)
    shutil.copytree(model, place.model)
    place.outside.mkdir()
    (place.outside / "secret").write_text(SECRET)
    place.data.mkdir()
    return place


def new_trial(root: Path, model: Path, context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """With home, temporary and working folder among those that are watched."""
    place = new_place(root, model)
    for name in ("home", "temporary", "working"):
        (root / name).mkdir()
    monkeypatch.setenv("HOME", str(root / "home"))
    # Read once, when they are imported.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "home" / "modules"))
    monkeypatch.setenv("TMPDIR", str(root / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(root / "working")
    return Trial(place, context)


@contextmanager
def bounded() -> Iterator[None]:
    """Bound memory and time, so that a bomb does not take the machine with it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)

    def too_long(_signal: int, _frame: object) -> None:
        pytest.fail(f"not rejected within {SECONDS} s")

    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def contents(folder: Path, *, but: Path | None = None) -> dict[str, tuple[object, ...]]:
    """Map all paths but one folder's to kind, content and times. Follow no link."""
    paths = (path for path in sorted(folder.rglob("*")) if but is None or not path.is_relative_to(but))
    return {str(path): _content(path) for path in paths}


def _content(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return status.st_mode, os.readlink(path)
    if not stat.S_ISREG(status.st_mode):
        # A temporary file that has gone again changes a folder's times.
        return (status.st_mode,)
    with path.open("rb") as file:
        digest = sha256(file.read(_HASHED_BYTES)).hexdigest()
    return status.st_mode, status.st_size, status.st_mtime_ns, digest
