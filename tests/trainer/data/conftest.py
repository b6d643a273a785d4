"""Lets tests make small chunks of rows, and count them."""

from collections.abc import Callable
from typing import Any

import pytest

from qlora_trainer.core.context import StepContext
from qlora_trainer.data import build
from qlora_trainer.data.tokenize import chunk_maker as tokenize
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import Recorded


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of ten rows, all made by workers."""
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 10)
    monkeypatch.setattr(tokenize, "_CHUNKS_ALONE", 0)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of worker processes."""
    return lambda count: monkeypatch.setattr(build, "available_cpus", lambda: count)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each chunk that this process makes."""
    made: list[int] = []
    make = tokenize.ChunkMaker.make

    def counted(self: Any, rows: Any) -> Any:
        made.append(len(rows))
        return make(self, rows)

    monkeypatch.setattr(tokenize.ChunkMaker, "make", counted)
    return made


def data_bytes(context: StepContext) -> dict[str, bytes]:
    """Rows that prepare makes of the data."""
    folder = context.workspace.root / prepare(context, Recorded()).data_path
    return {path.name: path.read_bytes() for path in folder.iterdir()}
