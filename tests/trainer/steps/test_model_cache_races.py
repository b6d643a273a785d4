"""Jobs that make the same base at the same time, are killed, or leave files behind."""

import errno
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_api.contract import ExitCode, ModelCacheLayout
from qlora_trainer.core import folder_lock
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.folder_lock import own
from qlora_trainer.core.outcome import Terminated
from qlora_trainer.model.base.cache import ModelCache
from qlora_trainer.steps.prepare import prepare
from tests.support.bad_bases import (
    WEIGHTS,
    cut_constants,
    describe_as_larger,
    overwrite,
    rename_tensors,
    write,
)
from tests.support.failures import failing
from tests.support.fake_hub import Rejection
from tests.support.models.tiny import Recorded
from tests.support.runs.forks import forked
from tests.support.shared_cache import SharedCache, age, base_of
from tests.support.waiting import eventually


def test_concurrent_jobs_wait_for_the_one_that_makes_the_base(cache: SharedCache) -> None:
    """Three processes; the first is held up while it downloads."""
    go_on, started = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> Rejection | None:
        if method == "GET" and path.endswith(WEIGHTS):
            started.set()
            go_on.wait(180)
        return None

    class Told(Recorded):
        def __init__(self) -> None:
            super().__init__()
            self.waits = multiprocessing.Event()

        def progress(self, record: Any, *, force: bool = False) -> None:
            if record.activity.startswith("waiting for another job"):
                self.waits.set()
            super().progress(record, force=force)

    cache.hub.reject = hold
    contexts = [cache.context(f"job-{number}") for number in range(3)]
    records = [Told() for _ in contexts]
    with ExitStack() as running:
        jobs = [running.enter_context(forked(prepare, *job)) for job in zip(contexts, records, strict=True)]
        assert started.wait(180)
        eventually(lambda: sum(each.waits.is_set() for each in records) == 2, seconds=180, every=0.05, what="two wait")
        go_on.set()
        for job in jobs:
            job.join(180)
        assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert cache.hub.fetched.count(WEIGHTS) == 1
    assert (cache.base / WEIGHTS).is_file()
    assert not [path for context in contexts for path in context.workspace.root.rglob("model.safetensors")]


def test_a_job_uses_a_base_that_another_one_has_completed_first(cache: SharedCache) -> None:
    """Without locks on the volume, both make a base, and the loser deletes its base."""
    contexts = iter([cache.context("second")])
    records: list[PrepareRecord] = []
    (cache.folder / "quantized").mkdir()

    def meanwhile(_method: str, path: str) -> Rejection | None:
        context = next(contexts, None) if path.endswith(WEIGHTS) and _method == "GET" else None
        if context is not None:
            hidden = cache.partials[0]
            hidden.rename(cache.folder / "hidden")
            records.append(prepare(context, Recorded()))
            (cache.folder / "hidden").rename(hidden)
        return None

    cache.hub.reject = meanwhile
    first = cache.prepare("first")
    assert cache.hub.fetched.count(WEIGHTS) == 2
    assert first.base_path == records[0].base_path == str(cache.base)
    assert base_of(first).origin == "cache"


def test_the_next_pod_of_a_killed_job_fetches_the_missing_files(cache: SharedCache) -> None:
    parts = cache.split_weights()
    go_on, stuck = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> Rejection | None:
        if method == "GET" and path.endswith(parts[1]):
            stuck.set()
            go_on.wait(180)
        return None

    cache.hub.reject = hold
    with forked(prepare, replace(cache.context(), pod_uid="killed"), Recorded()) as process:
        assert stuck.wait(180)
        process.kill()
        process.join()
    cache.hub.reject = lambda _method, _path: None
    go_on.set()
    assert len(cache.partials) == len([*(cache.folder / "quantized").glob("[!.]*")]) + 1
    cache.prepare()
    assert [name for name in cache.hub.fetched if name in parts] == [*parts, parts[1]]
    assert {path.name for path in cache.base.glob("*.safetensors")} == set(parts)


def begun(partial: Path) -> Path:
    """The folder of the base in that of the pod that makes it."""
    return partial / ".base.partial"


def test_stale_files_of_a_stopped_job_are_reused(cache: SharedCache) -> None:
    partial = cache.leave_partial()
    waited: list[str] = []

    class Told(Recorded):
        def progress(self, record: Any, *, force: bool = False) -> None:
            if record.activity.startswith("waiting for another job to quantize model 0.1/0.2 MiB"):
                waited.append(record.activity)
                age(partial, 130)
            super().progress(record, force=force)

    record = cache.prepare("second", records=Told())
    assert len(waited) == 1
    assert [name for name in cache.hub.fetched if name.endswith(".safetensors")] == ["model-00002-of-00002.safetensors"]
    assert base_of(record).origin == "downloaded"
    assert cache.base.is_dir()


@pytest.mark.parametrize("harm", [overwrite, rename_tensors, cut_constants, describe_as_larger])
def test_damaged_files_of_a_stopped_job_are_made_again(cache: SharedCache, harm: Callable[[Path, str], None]) -> None:
    partial, name = cache.leave_partial(), "model-00001-of-00002.safetensors"
    harm(begun(partial), name)
    age(partial, 130)
    record = cache.prepare("second")
    assert name in cache.hub.fetched
    assert record.base_sha256 == cache.prepare_alone()[1].base_sha256


def test_a_job_does_not_resume_files_that_its_token_cannot_read(cache: SharedCache) -> None:
    partial = cache.leave_partial()
    age(partial, 130)
    cache.hub.reject = lambda _method, path: Rejection(403, "GatedRepo") if "00001-of-00002" in path else None
    with failing(ExitCode.MODEL_UNAVAILABLE, match="is gated and was asked for with no token"):
        cache.prepare("second")
    assert cache.partials == [partial]


def test_a_folder_with_a_live_owner_is_never_taken_or_deleted(cache: SharedCache) -> None:
    """Not even with an old timestamp: a folder of the same model, and of another."""
    partial = cache.leave_partial()
    ownership = own(partial)
    age(partial, 10**6)

    class Stop(Recorded):
        def progress(self, record: Any, *, force: bool = False) -> None:
            if record.activity.startswith("waiting for another job"):
                raise Terminated
            super().progress(record, force=force)

    with pytest.raises(Terminated):
        cache.prepare("second", records=Stop())
    cache.hub.commits["models/acme/tiny"] = "b" * 40
    cache.prepare("third")
    assert cache.partials == [partial]
    ownership.release()
    cache.hub.commits["models/acme/tiny"] = "d" * 40
    cache.prepare("fourth")
    assert cache.partials == []


def test_a_stale_folder_with_a_link_in_it_is_deleted_and_not_written_through(
    cache: SharedCache, tmp_path: Path
) -> None:
    partial = cache.leave_partial()
    (tmp_path / "precious").write_text("precious")
    (begun(partial) / "config.json").symlink_to(tmp_path / "precious")
    age(partial, 10**4)
    record = cache.prepare("second")
    assert (tmp_path / "precious").read_text() == "precious"
    assert base_of(record).origin == "downloaded"
    assert len([name for name in cache.hub.fetched if name.endswith(".safetensors")]) == 2
    assert not any(path.is_symlink() for path in cache.base.iterdir())


def test_a_folder_replaced_by_another_pod_is_not_set_aside(cache: SharedCache) -> None:
    cache.prepare("first")
    one, other = (ModelCache(ModelCacheLayout(cache.folder), name, "pod") for name in ("one", "other"))
    found = one.find(cache.base.name)
    assert found is not None
    other.set_aside(found)
    with other.claim(found.path.name) as place:
        assert place is not None
        begun(place.parent).rename(place)
        write(place / "config.json", b"{}")
        (place / "config.json").rename(place / "generation_config.json")
        assert other.complete(place, found.path.name) == found.path
    one.set_aside(found)
    assert (cache.base / WEIGHTS).is_file()


def test_a_volume_without_locks_holds_a_cache_too(cache: SharedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(folder_lock, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": flock}))
    found = [base_of(cache.prepare(name)) for name in ("first", "second")]
    assert [(base.origin, base.message) for base in found] == [("downloaded", ""), ("cache", "")]
    assert cache.base.is_dir()
