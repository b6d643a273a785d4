"""A cache that is full, cannot be written or hangs never stops a job."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.folder_lock import exclusive
from qlora_trainer.core.partial_folders import PartialFolders
from qlora_trainer.model.base import cache as cache_module
from qlora_trainer.model.base.cache import ModelCache
from tests.support.bad_bases import (
    WEIGHTS,
    write,
)
from tests.support.failures import failing
from tests.support.models.tiny import Recorded
from tests.support.runs.bad_disk import bad_disk
from tests.support.shared_cache import SharedCache, base_of


def test_a_full_cache_is_reported_and_the_base_goes_into_the_workspace(cache: SharedCache) -> None:
    cache.limit_room(1000, on_cache=True)
    records = Recorded()
    record = cache.prepare(records=records)
    assert record.base_path == "base"
    assert base_of(record).message == (
        "the model cache cannot be used (it has 0.0 MiB free, and the base needs 0.2 MiB): the base was made in the "
        "workspace"
    )
    assert any("the model cache cannot be used (" in line["activity"] for line in records.written)
    assert cache.partials == []


@contextmanager
def broken(cache: Path, failing: int, number: int) -> Iterator[None]:
    """Let every operation on the cache's volume fail from number `failing` on."""
    fsync = os.fsync
    with bad_disk(cache, failing, number, stays_full=True), patch.object(os, "fsync", fsync):
        yield


@pytest.mark.parametrize(
    ("failing", "error"),
    [(1, "EROFS"), (2, "EACCES"), (4, "ENOSPC"), (9, "EDQUOT"), (14, "ENOSPC"), (14, "EIO"), (16, "ENOLCK")],
)
def test_a_cache_that_cannot_be_written_costs_the_job_nothing(cache: SharedCache, failing: int, error: str) -> None:
    number: int = getattr(errno, error)
    with broken(cache.folder, failing, number):
        record = cache.prepare()
    assert record.base_path == "base"
    assert f"the model cache cannot be used ({os.strerror(number)})" in base_of(record).message
    assert cache.partials == []


@pytest.mark.parametrize("found", ["nothing", "damaged"])
def test_a_pod_that_hangs_with_the_caches_lock_makes_the_others_use_their_own(
    cache: SharedCache, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(cache_module, "_LONGEST_WAIT_SECONDS", 0.2)
    if found == "damaged":
        cache.prepare("first")
        write(cache.base / WEIGHTS, b"")
    else:
        (cache.folder / "quantized").mkdir(parents=True)
    with exclusive(cache.folder / "quantized" / ".lock", longest_wait=1):
        record = cache.prepare("second")
    assert record.base_path == "base"
    assert base_of(record).message == (
        "the model cache cannot be used (another process holds a lock for more than 0 s): the base was made in the "
        "workspace"
    )
    assert base_of(cache.prepare("third")).origin == "downloaded"
    assert base_of(cache.prepare("fourth")).origin == "cache"


def test_without_room_in_cache_and_workspace_no_weights_are_downloaded(cache: SharedCache) -> None:
    for on_cache in (True, False):
        cache.limit_room(1000, on_cache=on_cache)
    message = r"workspace volume has 0.0 MiB free.*; the model cache cannot be used: it has"
    with failing(ExitCode.STORAGE_FULL, match=message):
        cache.prepare()
    assert WEIGHTS not in cache.hub.fetched


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ESTALE, ExitCode.UNREACHABLE), (errno.EDQUOT, ExitCode.STORAGE_FULL)]
)
@pytest.mark.parametrize("call", ["find", "claim"])
def test_a_fault_of_the_cache_is_retried_by_a_job_whose_workspace_has_no_room(
    cache: SharedCache, monkeypatch: pytest.MonkeyPatch, number: int, code: ExitCode, call: str
) -> None:
    """Detected before the download, or only before the base is made."""
    cache.limit_room((cache.repository / WEIGHTS).stat().st_size + 1000, on_cache=False)

    def fail(*_arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    patched = {"find": (ModelCache, "_validate_no_link"), "claim": (PartialFolders, "claim")}
    monkeypatch.setattr(*patched[call], fail)
    message = f"MiB free.*; the model cache cannot be used: {os.strerror(number)}"
    with failing(code, match=message):
        cache.prepare()
    assert WEIGHTS not in cache.hub.fetched


def test_a_cache_that_can_only_be_read_is_read(cache: SharedCache) -> None:
    cache.prepare("first")
    with broken(cache.folder, 1, errno.EROFS):
        assert base_of(cache.prepare("second")).origin == "cache"


def test_a_cache_whose_folder_is_a_link_is_not_used(cache: SharedCache, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (cache.folder / "quantized").symlink_to(tmp_path / "outside")
    assert "quantized is a symbolic link" in base_of(cache.prepare()).message
    assert [*(tmp_path / "outside").iterdir()] == []
