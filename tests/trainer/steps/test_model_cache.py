"""4-bit bases that jobs share: made once, and given only to jobs that may read the model."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_trainer.core.completion import PrepareRecord, PublishRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.filesystem import bytes_below
from qlora_trainer.model.base import cache as cache_module
from qlora_trainer.model.base.artifact import MANIFEST
from qlora_trainer.model.base.conversion import BaseConversion
from qlora_trainer.steps.clean import clean
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from tests.support.bad_bases import WEIGHTS, overwrite, overwrite_with_manifest
from tests.support.failures import failing
from tests.support.fake_hub import Rejection
from tests.support.models.four_bit import quantized, settings
from tests.support.models.mxfp4 import save_gpt_oss
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.shared_cache import SharedCache, base_of, contents, only_base
from tests.support.training import run
from tests.trainer.conftest import MakeContext


def test_ten_jobs_on_one_base_download_and_quantize_once(cache: SharedCache) -> None:
    contexts = [cache.context(f"job-{number}") for number in range(10)]
    outcomes = [prepare(contexts[0], Recorded())]
    made = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.base.iterdir()}
    outcomes += [prepare(context, Recorded()) for context in contexts[1:]]
    assert cache.hub.fetched.count(WEIGHTS) == 1
    assert made == {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.base.iterdir()}
    assert {record.base_path for record in outcomes} == {str(cache.base)}
    assert [base_of(record).origin for record in outcomes] == ["downloaded"] + ["cache"] * 9
    size = (cache.repository / WEIGHTS).stat().st_size
    assert base_of(outcomes[0]).bytes_fetched > size > base_of(outcomes[1]).bytes_fetched > 0
    for context in contexts:
        assert not context.workspace.base.exists()
        assert not [*context.workspace.models.rglob("*.safetensors")]
        assert bytes_below(context.workspace.root) < size
    alone, record = cache.prepare_alone()
    assert {base_of(outcome).sha256 for outcome in outcomes} == {record.base_sha256} == {base_of(record).sha256}
    own = contents(alone.workspace.base)
    assert {name for name, content in contents(cache.base).items() if own[name] != content} == {MANIFEST}


def test_the_cells_of_a_sweep_share_the_folder_of_the_first(cache: SharedCache, tmp_path: Path) -> None:
    shared = tmp_path / "workspaces" / "sweep-0a1b2c3d"
    contexts = [cache.context(f"sweep-0{number}", {"lora": {"rank": 4 + number}}) for number in range(2)]
    cells = [replace(context, mounts=replace(context.mounts, model_cache=shared)) for context in contexts]
    outcomes = [base_of(prepare(cell, Recorded())) for cell in cells]
    assert cache.hub.fetched.count(WEIGHTS) == 1
    assert [(base.origin, base.message) for base in outcomes] == [("downloaded", ""), ("cache", "")]
    assert not any(cell.workspace.base.exists() for cell in cells)
    assert only_base(shared)


@pytest.fixture
def volume_model(tmp_path: Path, tiny_llama: Path) -> Path:
    """A model on a volume, for a test to change, and rows on another one."""
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")])
    return shutil.copytree(tiny_llama, tmp_path / "volume" / "tiny")


def test_the_cells_of_a_sweep_share_the_base_of_a_model_on_a_volume_too(
    make_context: MakeContext, tmp_path: Path, volume_model: Path
) -> None:
    shared = tmp_path / "workspaces" / "rates.sweep"

    def prepared(name: str) -> PrepareRecord:
        context = make_context({"lora": {"rank": 4}}, model=volume_model)
        mounts = replace(context.mounts, model_cache=shared)
        workspace = WorkspaceLayout(tmp_path / "workspaces" / name)
        return prepare(replace(context, workspace=workspace, mounts=mounts, pod_uid=name), Recorded())

    first, second = prepared("rates-00"), prepared("rates-01")
    assert [base_of(record).origin for record in (first, second)] == ["volume", "cache"]
    assert first.base_path == second.base_path == str(only_base(shared))
    assert first.model_revision == second.model_revision
    assert not (tmp_path / "workspaces" / "rates-00" / "base").exists()

    overwrite(volume_model)
    third = prepared("rates-02")
    assert base_of(third).origin == "volume", "other bytes at the same address are another model"
    assert third.base_path != first.base_path
    assert third.base_sha256 != first.base_sha256


def test_a_model_that_changes_while_it_is_quantized_is_not_shared(
    make_context: MakeContext, tmp_path: Path, volume_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, convert = tmp_path / "rates.sweep", BaseConversion.convert

    def changed(self: BaseConversion, path: Path, sha256: str) -> None:
        overwrite(path.parent, path.name)
        convert(self, path, sha256)

    monkeypatch.setattr(BaseConversion, "convert", changed)
    context = make_context({"lora": {"rank": 4}}, model=volume_model)
    context = replace(context, mounts=replace(context.mounts, model_cache=shared))
    with failing(ExitCode.MODEL_UNAVAILABLE, match=r"pvc://models/tiny changed while it was read"):
        prepare(context, Recorded())
    assert [path.name for path in (shared / "quantized").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "make",
    [lambda model, to: quantized(model, to, settings()), lambda _model, to: save_gpt_oss(to)],
    ids=["bitsandbytes", "mxfp4"],
)
def test_a_model_published_in_4_bit_is_shared_too(
    cache: SharedCache, tiny_llama: Path, make: Callable[[Path, Path], Path]
) -> None:
    repository = cache.repository
    shutil.rmtree(repository)
    make(tiny_llama, repository)
    first, second = (cache.prepare(name) for name in ("first", "second"))
    assert [base_of(record).origin for record in (first, second)] == ["downloaded", "cache"]
    assert first.base_path == second.base_path == str(cache.base)
    _, record = cache.prepare_alone()
    assert record.base_sha256 == second.base_sha256 == first.base_sha256
    assert cache.hub.fetched.count(WEIGHTS) == 2


def test_another_quantization_or_another_release_of_a_library_is_another_base(
    cache: SharedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's reads never change for another."""
    kinds: list[dict[str, Any]] = [{}, {"doubleQuant": False}, {"type": "fp4"}]
    records = [cache.prepare(f"job-{n}", {"quantization": kind}) for n, kind in enumerate(kinds)]
    monkeypatch.setattr(cache_module, "installed", lambda _name: "99.0+cpu")
    records.append(cache.prepare("newer"))
    monkeypatch.setattr(cache_module, "installed", lambda _name: "99.0+cu130")
    assert cache.prepare("on-a-gpu").base_path == records[-1].base_path
    assert {Path(record.base_path) for record in records} == set((cache.folder / "quantized").glob("[0-9a-f]*"))
    assert len({record.base_path for record in records}) == 4
    assert [base_of(record).origin for record in records] == ["downloaded"] * 4


def published(context: StepContext) -> PublishRecord:
    """Publish the job."""
    return publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))


def test_a_job_trains_and_publishes_from_the_cache_and_clean_keeps_it(cache: SharedCache) -> None:
    """With a cache that loses the weights before the last step."""
    context = cache.context(spec={"output": {"merged": {}}})
    base = base_of(prepare(context, Recorded()))
    assert (base.origin, base.message) == ("downloaded", "")
    run(context)
    (cache.base / WEIGHTS).unlink()
    with failing(ExitCode.MODEL_UNAVAILABLE, "no longer whole in the model cache", "set a new spec.retry.request"):
        published(context)
    assert (context.workspace.adapter / "adapter_model.safetensors").is_file()
    prepare(context, Recorded())
    published(context)
    clean(context.workspace)
    assert (context.workspace.merged / WEIGHTS).is_file()
    assert (cache.base / WEIGHTS).is_file()


def test_an_adapter_is_published_without_the_base_that_it_was_trained_on(cache: SharedCache) -> None:
    """The adapter is the result: it is not lost with a file that is not read."""
    context = cache.context()
    prepare(context, Recorded())
    run(context)
    shutil.rmtree(cache.base)
    published(context)
    assert (context.workspace.adapter / "adapter_model.safetensors").is_file()


def test_training_does_not_start_on_a_base_that_has_changed_in_the_cache(cache: SharedCache) -> None:
    context = cache.context()
    prepare(context, Recorded())
    (cache.base / "adapter_config.json").write_text("{}")
    with failing(ExitCode.MODEL_UNAVAILABLE, match=r"its manifest and its files differ in adapter_config\.json"):
        run(context)


def test_a_training_on_a_replaced_base_keeps_no_files(cache: SharedCache) -> None:
    """Its manifest fits, but its sum is not the one that prepare recorded."""
    context = cache.context()
    prepare(context, Recorded())
    overwrite_with_manifest(cache.base)
    with failing(ExitCode.UNSAFE_ARTIFACT, match="but prepare recorded"):
        run(context)
    assert not context.workspace.trained.exists()


def test_a_token_without_access_is_rejected_although_the_model_is_cached(cache: SharedCache, tmp_path: Path) -> None:
    cache.hub.token = "hf_abcdefghijklmnop"
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text(cache.hub.token)
    cache.prepare("owner")
    (tmp_path / "secrets" / "token").write_text("hf_ofanotheruser")
    with failing(ExitCode.MODEL_UNAVAILABLE):
        cache.prepare("other")
    assert not cache.context("other").workspace.completion("prepare").exists()


@pytest.mark.parametrize("closed", [lambda path: True, lambda path: path.endswith(WEIGHTS)], ids=["all", "weights"])
def test_files_of_a_gated_model_are_requested_with_the_jobs_token(
    cache: SharedCache, closed: Callable[[str], bool]
) -> None:
    """The listing of a gated repository is public, its files are not."""
    cache.prepare("owner")
    cache.hub.reject = lambda _method, path: (
        Rejection(403, "GatedRepo") if "/resolve/" in path and closed(path) else None
    )
    with failing(ExitCode.MODEL_UNAVAILABLE, match="is gated and was asked for with no token"):
        cache.prepare("other")


def test_a_branch_that_has_moved_is_downloaded_and_the_older_commit_stays(cache: SharedCache, tiny_qwen2: Path) -> None:
    old = cache.prepare("first")
    shutil.copyfile(tiny_qwen2 / WEIGHTS, cache.repository / WEIGHTS)
    shutil.copyfile(tiny_qwen2 / "config.json", cache.repository / "config.json")
    cache.hub.commits["models/acme/tiny"] = "b" * 40
    new = cache.prepare("second")
    assert (new.model_revision, base_of(new).origin) == ("b" * 40, "downloaded")
    assert old.base_sha256 != new.base_sha256
    assert {Path(old.base_path), Path(new.base_path)} == set((cache.folder / "quantized").glob("[0-9a-f]*"))


def test_pods_of_another_user_with_the_same_group_can_read_and_replace(cache: SharedCache) -> None:
    cache.folder.chmod(0o2775)
    before = os.umask(0o077)
    try:
        cache.prepare("first")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o7777 for path in cache.base.iterdir()} == {0o444}
    assert (cache.folder / "quantized").stat().st_mode & 0o7777 == cache.base.stat().st_mode & 0o7777 == 0o2775
    assert (cache.folder / "quantized" / ".lock").stat().st_mode & 0o7777 == 0o664


def test_clean_deletes_nothing_in_the_cache(cache: SharedCache) -> None:
    context = cache.context()
    prepare(context, Recorded())
    context.workspace.base.symlink_to(cache.base)
    clean(context.workspace)
    assert (cache.base / WEIGHTS).is_file()
