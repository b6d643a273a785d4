"""Tries hostile input: its place, its bounds, and the files that must stay unchanged."""

import json
import os
import resource
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.trainer.conftest import MakeContext

SECRET = "hf_secretsecretsecret"
MEMORY_BYTES = 3 * 2**30
SECONDS = 120
_HASHED_BYTES = 2**26


@dataclass(frozen=True)
class Place:
    """Places of a case's files, all below one watched folder."""

    root: Path

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.root / "models" / "model"

    @property
    def data(self) -> Path:
        """The folder of train.jsonl."""
        return self.root / "data"

    @property
    def outside(self) -> Path:
        """Not on any volume of the job; holds `secret`."""
        return self.root / "outside"

    @property
    def canary(self) -> Path:
        """The effect of code in the input."""
        return self.outside / "canary"

    def config(self, **changes: Any) -> None:
        """Change the model's configuration."""
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def tokenizer_config(self, **changes: Any) -> None:
        """Change the tokenizer's configuration."""
        path = self.model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def code(self, folder: Path, *names: str) -> None:
        """Put Python files there that make the canary when they are run."""
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"open({str(self.canary)!r}, 'w').close()\n")

    def template(self, text: str) -> None:
        """Give the model this chat template."""
        (self.model / "chat_template.jinja").write_text(text)

    def rows(self, content: bytes, name: str = "train.jsonl") -> None:
        """Put this in place of the data."""
        (self.data / "train.jsonl").unlink()
        (self.data / name).write_bytes(content)


class Payload:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._canary),)


@dataclass(frozen=True)
class Case:
    """Something that was made to do harm, and how it is rejected."""

    attack: Callable[[Place], None]
    code: ExitCode
    says: str
    """Part of the message, which tells the guard that has rejected it from any other."""


def collector(cases: dict[str, Case]) -> Callable[[ExitCode, str], Callable[[Callable[[Place], None]], None]]:
    """Makes a decorator that collects a case; the function's name is its title."""

    def case(code: ExitCode, says: str) -> Callable[[Callable[[Place], None]], None]:
        def collect(attack: Callable[[Place], None]) -> None:
            cases[attack.__name__.replace("_", " ")] = Case(attack, code, says)

        return collect

    return case


@dataclass(frozen=True)
class Trial:
    """Prepares a job over a tiny model and three rows, with the input of a case."""

    place: Place
    context: MakeContext

    def require_rejection(self, case: Case) -> None:
        """Check that the case ends as stated, runs no code and changes only the workspace."""
        case.attack(self.place)
        source = next((path.name for path in self.place.data.iterdir() if path.name.startswith("train.")), "")
        context = self.context({"dataset": {"source": f"pvc://data/{source}"}}, model=self.place.model)
        before = contents(self.place.root, but=context.workspace.root)
        with bounded(), pytest.raises(StepFailure) as failure:
            prepare(context, Recorded())
        found = failure.value
        assert (found.exit_code, case.says in found.message) == (case.code, True), found.message
        assert SECRET not in found.message
        assert not self.place.canary.exists()
        assert contents(self.place.root, but=context.workspace.root) == before
        assert not context.workspace.completion("prepare").exists()


def new_place(root: Path, model: Path) -> Place:
    """The folders of a job that nothing is wrong with."""
    place = Place(root)
    shutil.copytree(model, place.model)
    place.outside.mkdir()
    (place.outside / "secret").write_text(SECRET)
    write_rows(place.data / "train.jsonl", [chat_row("a question", "an answer")] * 3)
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
