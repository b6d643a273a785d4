"""A cache of bases that jobs share, over a hub with one model, and an earlier job with its adapter."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.model.base import cached_base
from tests.support.earlier_adapter import Place, run_earlier
from tests.support.services.hub_jobs import tiny_hub
from tests.support.shared_cache import SharedCache
from tests.trainer.conftest import MakeContext


@pytest.fixture
def cache(
    make_context: MakeContext, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SharedCache]:
    """A hub with the model acme/tiny, and an empty cache."""
    monkeypatch.setattr(cached_base, "_WAIT_SECONDS", 0.02)
    (tmp_path / "cache").mkdir()
    with tiny_hub(tmp_path, tiny_llama, monkeypatch) as hub:
        yield SharedCache(hub, tmp_path / "cache", make_context, monkeypatch)


@pytest.fixture(scope="session")
def earlier(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Place, TrainRecord]:
    """A published job with the record of its training. Do not change it: copy it."""
    return run_earlier(tmp_path_factory.mktemp("earlier"), tiny_llama.parent)


@pytest.fixture
def place(tmp_path: Path, earlier: tuple[Place, TrainRecord]) -> Place:
    """Its data and its adapter, for a test to change."""
    original, _ = earlier
    for name in ("data", "adapters"):
        shutil.copytree(original.root / name, tmp_path / name)
    return Place(tmp_path, original.models)
