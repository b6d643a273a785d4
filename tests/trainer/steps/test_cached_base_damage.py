"""Bases in the cache that were changed or cannot be read: made again, or left alone."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.model.base import cache as cache_module
from tests.support.bad_bases import (
    HARMS,
    Harm,
    overwrite_with_manifest,
    write,
)
from tests.support.failures import failing
from tests.support.shared_cache import SharedCache, base_of, contents
from tests.support.training import run


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_cached_base_that_was_changed_is_made_again(cache: SharedCache, harm: Harm) -> None:
    first = cache.prepare("first")
    sound = contents(cache.base)
    harm(cache.base)
    record = cache.prepare("second")
    assert base_of(record).origin == "downloaded"
    assert base_of(record).message.startswith("the base in the cache was damaged (")
    assert record.base_sha256 == first.base_sha256
    assert contents(cache.base) == sound
    assert not [path for path in cache.base.iterdir() if path.is_symlink()]


def test_the_checksum_detects_a_planted_base_with_other_numbers(cache: SharedCache) -> None:
    """No server publishes a base's sum: a process on the claim can plant a base."""
    first = cache.prepare("first")
    overwrite_with_manifest(cache.base)
    second = cache.prepare("second")
    assert base_of(second).origin == "cache"
    assert base_of(second).sha256 != base_of(first).sha256


def test_intact_files_of_a_damaged_base_are_kept(cache: SharedCache) -> None:
    parts = cache.split_weights()
    cache.prepare("first")
    write(cache.base / parts[1], (cache.base / parts[1]).read_bytes()[::-1])
    assert parts[1] in base_of(cache.prepare("second")).message
    assert [name for name in cache.hub.fetched if name in parts] == [*parts, parts[1]]


@contextmanager
def unreadable(cache: Path, number: int) -> Iterator[None]:
    """Let no file of the cache's be hashed, as after a fault of its volume."""

    def fail(path: Path, *more: Any) -> str:
        if cache in path.parents:
            raise OSError(number, os.strerror(number), str(path))
        return file_sha256(path, *more)

    with patch.object(cache_module, "file_sha256", fail):
        yield


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_base_that_one_job_cannot_read_stays_for_the_others(cache: SharedCache, number: int) -> None:
    cache.prepare("first")
    before = cache.base.stat().st_ino
    with unreadable(cache.folder, number):
        record = cache.prepare("second")
    assert record.base_path == "base"
    assert f"the model cache cannot be used ({os.strerror(number)})" in base_of(record).message
    assert cache.base.stat().st_ino == before
    assert base_of(cache.prepare("third")).origin == "cache"


def test_training_is_retried_while_the_cache_does_not_answer(cache: SharedCache) -> None:
    cache.prepare()
    error = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with (
        patch.object(cache_module, "manifest_of", side_effect=error),
        failing(ExitCode.UNREACHABLE, match=r"Stale file handle.*; the step is retried"),
    ):
        run(cache.context())
