"""4-bit bases that jobs share: made once, verified when read, and never in the way of a job."""

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import ExitCode, ModelCacheLayout, WorkspaceLayout
from qlora_trainer.core import folder_lock
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure, StopRequest
from qlora_trainer.core.filesystem import bytes_below, file_sha256
from qlora_trainer.core.folder_lock import exclusive, own
from qlora_trainer.core.outcome import Terminated
from qlora_trainer.model.base import cache as cache_module
from qlora_trainer.model.base import cached_base
from qlora_trainer.model.base.artifact import MANIFEST
from qlora_trainer.model.base.cache import ModelCache
from qlora_trainer.model.base.conversion import BaseConversion
from qlora_trainer.steps.clean import clean
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.train import train
from qlora_trainer.stores.contents import describe_files
from tests.support.commands.command import Done, new_files
from tests.support.fake_hub import FakeHub, Rejection
from tests.support.models.four_bit import quantized, settings
from tests.support.models.mxfp4 import save_gpt_oss
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.runs.bad_disk import bad_disk
from tests.support.services.hub_jobs import MODEL, tiny_hub
from tests.support.waiting import eventually
from tests.trainer.conftest import MakeContext

WEIGHTS = "model.safetensors"
JobOf = Callable[..., StepContext]


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the model acme/tiny."""
    monkeypatch.setattr(cached_base, "_WAIT_SECONDS", 0.02)
    with tiny_hub(tmp_path, tiny_llama, monkeypatch) as served:
        yield served


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache's volume."""
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def job(make_context: MakeContext, tmp_path: Path, cache: Path) -> JobOf:
    """Makes the context of a job of that name, in a new pod, over the cache."""

    def make(name: str = "first", spec: dict[str, Any] | None = None, pod: str = "pod") -> StepContext:
        context = make_context({**MODEL, **(spec or {})})
        metadata = context.document.metadata.model_copy(update={"name": name, "uid": name})
        return replace(
            context,
            document=context.document.model_copy(update={"metadata": metadata}),
            workspace=WorkspaceLayout(tmp_path / "workspaces" / name),
            mounts=replace(context.mounts, model_cache=cache),
            pod_uid=f"{name}-{pod}",
        )

    return make


def base_of(record: PrepareRecord) -> BaseStatus:
    assert record.base is not None
    return record.base


def cached(cache: Path) -> Path:
    """The one base in the cache, which holds nothing else."""
    (folder,) = (path for path in (cache / "quantized").iterdir() if path.name != ".lock")
    assert not folder.name.startswith(".")
    return folder


def partials(cache: Path) -> list[Path]:
    return sorted((cache / "quantized").glob("*.partial"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ten_jobs_on_one_base_download_and_quantize_once(job: JobOf, hub: FakeHub, cache: Path) -> None:
    contexts = [job(f"job-{number}") for number in range(10)]
    outcomes = [prepare(contexts[0], Recorded())]
    made = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cached(cache).iterdir()}
    outcomes += [prepare(context, Recorded()) for context in contexts[1:]]
    assert hub.fetched.count(WEIGHTS) == 1
    assert made == {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cached(cache).iterdir()}
    assert {record.base_path for record in outcomes} == {str(cached(cache))}
    assert [base_of(record).origin for record in outcomes] == ["downloaded"] + ["cache"] * 9
    repository = hub.repositories["models/acme/tiny"]
    size = (repository / WEIGHTS).stat().st_size
    assert base_of(outcomes[0]).bytes_fetched > size > base_of(outcomes[1]).bytes_fetched > 0
    for context in contexts:
        assert not context.workspace.base.exists()
        assert not [*context.workspace.models.rglob("*.safetensors")]
        assert bytes_below(context.workspace.root) < size
    alone = replace(job("alone"), mounts=replace(contexts[0].mounts, model_cache=None))
    record = prepare(alone, Recorded())
    assert {base_of(outcome).sha256 for outcome in outcomes} == {record.base_sha256} == {base_of(record).sha256}
    own = contents(alone.workspace.base)
    assert {name for name, content in contents(cached(cache)).items() if own[name] != content} == {MANIFEST}


def test_the_cells_of_a_sweep_share_the_folder_of_the_first(job: JobOf, hub: FakeHub, tmp_path: Path) -> None:
    shared = tmp_path / "workspaces" / "sweep-0a1b2c3d"
    contexts = [job(f"sweep-0{number}", {"lora": {"rank": 4 + number}}) for number in range(2)]
    cells = [replace(context, mounts=replace(context.mounts, model_cache=shared)) for context in contexts]
    outcomes = [base_of(prepare(cell, Recorded())) for cell in cells]
    assert hub.fetched.count(WEIGHTS) == 1
    assert [(base.origin, base.message) for base in outcomes] == [("downloaded", ""), ("cache", "")]
    assert not any(cell.workspace.base.exists() for cell in cells)
    assert cached(shared)


def test_the_cells_of_a_sweep_share_the_base_of_a_model_on_a_volume_too(
    make_context: MakeContext, tmp_path: Path, tiny_llama: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")])
    model = shutil.copytree(tiny_llama, tmp_path / "volume" / "tiny")
    shared = tmp_path / "workspaces" / "rates.sweep"

    def prepared(name: str) -> PrepareRecord:
        context = make_context({"lora": {"rank": 4}}, model=model)
        mounts = replace(context.mounts, model_cache=shared)
        workspace = WorkspaceLayout(tmp_path / "workspaces" / name)
        return prepare(replace(context, workspace=workspace, mounts=mounts, pod_uid=name), Recorded())

    first, second = prepared("rates-00"), prepared("rates-01")
    assert [base_of(record).origin for record in (first, second)] == ["volume", "cache"]
    assert first.base_path == second.base_path == str(cached(shared))
    assert first.model_revision == second.model_revision
    assert not (tmp_path / "workspaces" / "rates-00" / "base").exists()

    weights = bytearray((model / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (model / WEIGHTS).write_bytes(weights)
    third = prepared("rates-02")
    assert base_of(third).origin == "volume", "other bytes at the same address are another model"
    assert third.base_path != first.base_path
    assert third.base_sha256 != first.base_sha256


def test_a_model_that_changes_while_it_is_quantized_is_not_shared(
    make_context: MakeContext, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")])
    model = shutil.copytree(tiny_llama, tmp_path / "volume" / "tiny")
    shared, convert = tmp_path / "rates.sweep", BaseConversion.convert

    def changed(self: BaseConversion, path: Path, sha256: str) -> None:
        weights = bytearray(path.read_bytes())
        weights[-1] ^= 1
        path.write_bytes(weights)
        convert(self, path, sha256)

    monkeypatch.setattr(BaseConversion, "convert", changed)
    context = make_context({"lora": {"rank": 4}}, model=model)
    context = replace(context, mounts=replace(context.mounts, model_cache=shared))
    with pytest.raises(StepFailure, match=r"pvc://models/tiny changed while it was read") as failure:
        prepare(context, Recorded())
    assert failure.value.exit_code is ExitCode.MODEL_UNAVAILABLE
    assert [path.name for path in (shared / "quantized").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "make",
    [lambda model, to: quantized(model, to, settings()), lambda _model, to: save_gpt_oss(to)],
    ids=["bitsandbytes", "mxfp4"],
)
def test_a_model_published_in_4_bit_is_shared_too(
    job: JobOf, hub: FakeHub, cache: Path, tiny_llama: Path, make: Callable[[Path, Path], Path]
) -> None:
    repository = hub.repositories["models/acme/tiny"]
    shutil.rmtree(repository)
    make(tiny_llama, repository)
    first, second = (prepare(job(name), Recorded()) for name in ("first", "second"))
    assert [base_of(record).origin for record in (first, second)] == ["downloaded", "cache"]
    assert first.base_path == second.base_path == str(cached(cache))
    alone = job("alone")
    record = prepare(replace(alone, mounts=replace(alone.mounts, model_cache=None)), Recorded())
    assert record.base_sha256 == second.base_sha256 == first.base_sha256
    assert hub.fetched.count(WEIGHTS) == 2


def test_another_quantization_or_another_release_of_a_library_is_another_base(
    job: JobOf, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's reads never change for another."""
    kinds: list[dict[str, Any]] = [{}, {"doubleQuant": False}, {"type": "fp4"}]
    records = [prepare(job(f"job-{n}", {"quantization": kind}), Recorded()) for n, kind in enumerate(kinds)]
    monkeypatch.setattr(cache_module, "installed", lambda _name: "99.0+cpu")
    records.append(prepare(job("newer"), Recorded()))
    monkeypatch.setattr(cache_module, "installed", lambda _name: "99.0+cu130")
    assert prepare(job("on-a-gpu"), Recorded()).base_path == records[-1].base_path
    assert {Path(record.base_path) for record in records} == set((cache / "quantized").glob("[0-9a-f]*"))
    assert len({record.base_path for record in records}) == 4
    assert [base_of(record).origin for record in records] == ["downloaded"] * 4


def test_a_job_trains_and_publishes_from_the_cache_and_clean_keeps_it(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    """Each step as a process, and with a cache that loses the weights before the last."""
    files = new_files(tmp_path / "job", tmp_path, MODEL | {"training": {"maxSteps": 8}, "output": {"merged": {}}})

    def run(step: str) -> Done:
        return files.run(step, QLORA_MODEL_CACHE=str(cache))

    prepared = run("prepare").result
    assert prepared.base is not None
    assert (prepared.base.origin, prepared.base.message) == ("downloaded", "")
    assert run("train").exit_code == 0
    (cached(cache) / WEIGHTS).unlink()
    unpublished = run("publish")
    assert unpublished.exit_code == ExitCode.MODEL_UNAVAILABLE
    assert "no longer whole in the model cache" in unpublished.result.message
    assert "raise spec.retry.request" in unpublished.result.message
    assert (files.workspace / "adapter" / "adapter_model.safetensors").is_file()
    for step in ("prepare", "publish", "clean"):
        done = run(step)
        assert done.exit_code == 0, done.stdout + done.stderr
    assert (files.workspace / "merged" / WEIGHTS).is_file()
    assert (cached(cache) / WEIGHTS).is_file()


def test_an_adapter_is_published_without_the_base_that_it_was_trained_on(
    hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    """The adapter is the result: it is not lost with a file that is not read."""
    files = new_files(tmp_path / "job", tmp_path, MODEL | {"training": {"maxSteps": 8}})
    for step in ("prepare", "train"):
        assert files.run(step, QLORA_MODEL_CACHE=str(cache)).exit_code == 0
    shutil.rmtree(cached(cache))
    done = files.run("publish", QLORA_MODEL_CACHE=str(cache))
    assert done.exit_code == 0, done.stdout + done.stderr
    assert (files.workspace / "adapter" / "adapter_model.safetensors").is_file()


def test_training_does_not_start_on_a_base_that_has_changed_in_the_cache(job: JobOf, hub: FakeHub, cache: Path) -> None:
    context = job()
    prepare(context, Recorded())
    (cached(cache) / "adapter_config.json").write_text("{}")
    with pytest.raises(StepFailure, match=r"its manifest and its files differ in adapter_config\.json") as failure:
        train(context, Recorded(), stop=StopRequest(), now=lambda: datetime.now(UTC), monotonic=lambda: 0.0)
    assert failure.value.exit_code is ExitCode.MODEL_UNAVAILABLE


def test_a_training_on_a_replaced_base_keeps_no_files(job: JobOf, hub: FakeHub, cache: Path) -> None:
    """With a manifest that fits, after prepare: the sum is the one that prepare recorded."""
    context = job()
    prepare(context, Recorded())
    with_a_matching_manifest(cached(cache))
    with pytest.raises(StepFailure, match="but prepare recorded") as failure:
        train(context, Recorded(), stop=StopRequest(), now=lambda: datetime.now(UTC), monotonic=lambda: 0.0)
    assert failure.value.exit_code is ExitCode.UNSAFE_ARTIFACT
    assert not context.workspace.trained.exists()


# Permission


def test_a_token_without_access_is_rejected_although_the_model_is_cached(
    job: JobOf, hub: FakeHub, tmp_path: Path
) -> None:
    hub.token = "hf_abcdefghijklmnop"
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text(hub.token)
    prepare(job("owner"), Recorded())
    (tmp_path / "secrets" / "token").write_text("hf_ofanotheruser")
    with pytest.raises(StepFailure) as failure:
        prepare(job("other"), Recorded())
    assert failure.value.exit_code is ExitCode.MODEL_UNAVAILABLE
    assert not job("other").workspace.completion("prepare").exists()


@pytest.mark.parametrize("closed", [lambda path: True, lambda path: path.endswith(WEIGHTS)], ids=["all", "weights"])
def test_files_of_a_gated_model_are_requested_with_the_jobs_token(
    job: JobOf, hub: FakeHub, closed: Callable[[str], bool]
) -> None:
    """The listing of a gated repository is public, its files are not."""
    prepare(job("owner"), Recorded())
    hub.reject = lambda _method, path: Rejection(403, "GatedRepo") if "/resolve/" in path and closed(path) else None
    with pytest.raises(StepFailure, match="is gated and was asked for with no token") as failure:
        prepare(job("other"), Recorded())
    assert failure.value.exit_code is ExitCode.MODEL_UNAVAILABLE


def test_a_branch_that_has_moved_is_downloaded_and_the_older_commit_stays(
    job: JobOf, hub: FakeHub, cache: Path, tiny_qwen2: Path
) -> None:
    old = prepare(job("first"), Recorded())
    shutil.copyfile(tiny_qwen2 / WEIGHTS, hub.repositories["models/acme/tiny"] / WEIGHTS)
    shutil.copyfile(tiny_qwen2 / "config.json", hub.repositories["models/acme/tiny"] / "config.json")
    hub.commits["models/acme/tiny"] = "b" * 40
    new = prepare(job("second"), Recorded())
    assert (new.model_revision, base_of(new).origin) == ("b" * 40, "downloaded")
    assert old.base_sha256 != new.base_sha256
    assert {Path(old.base_path), Path(new.base_path)} == set((cache / "quantized").glob("[0-9a-f]*"))


# Damage


def overwritten(folder: Path, name: str = WEIGHTS) -> None:
    content = (folder / name).read_bytes()
    write(folder / name, content[:-1] + bytes([content[-1] ^ 1]))


def with_a_matching_manifest(folder: Path) -> None:
    """As a user with knowledge of the format would."""
    overwritten(folder)
    in_manifest(folder, WEIGHTS)


def with_another_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes()) | {"rms_norm_eps": 0.5}
    write(folder / "config.json", json.dumps(config).encode())
    in_manifest(folder, "config.json")


def with_one_more_setting(folder: Path) -> None:
    write(folder / "generation_config.json", b'{"temperature": 9}')
    in_manifest(folder, "generation_config.json")


def with_tensors_of_another_model(folder: Path, name: str = WEIGHTS) -> None:
    tensors = load_file(folder / name)
    (folder / name).unlink()
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, folder / name)
    in_manifest(folder, name)


def replaced(folder: Path, name: str, role: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the first of the layers' tensors of that role, in the valid format."""
    tensors = load_file(folder / name)
    chosen = min(tensor for tensor in tensors if f".weight.{role}" in tensor)
    (folder / name).unlink()
    save_file(tensors | {chosen: change(tensors[chosen])}, folder / name)
    in_manifest(folder, name)


def with_too_few_constants(folder: Path, name: str = WEIGHTS) -> None:
    """A kernel would read memory outside the tensor."""
    replaced(folder, name, "absmax", lambda tensor: tensor[:1].clone())


def with_constants_of_another_type(folder: Path) -> None:
    replaced(folder, WEIGHTS, "nested_absmax", lambda tensor: tensor.half())


def without_constants(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    chosen = min(tensor for tensor in tensors if tensor.endswith(".absmax"))
    save_file({name: tensor for name, tensor in tensors.items() if name != chosen}, folder / WEIGHTS)
    in_manifest(folder, WEIGHTS)


def described_as_larger(folder: Path, name: str = WEIGHTS) -> None:
    """The lengths of all tensors fit; the description does not."""

    def larger(tensor: torch.Tensor) -> torch.Tensor:
        described = json.loads(bytes(tensor.tolist()))
        described["shape"][0] *= 4
        return torch.tensor([*json.dumps(described).encode().ljust(len(tensor))], dtype=torch.uint8)

    replaced(folder, name, "quant_state", larger)


def with_another_table(folder: Path) -> None:
    replaced(folder, WEIGHTS, "quant_map", lambda tensor: tensor * 2)


def of_another_original(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sources"][WEIGHTS] = "0" * 64
    write(folder / MANIFEST, json.dumps(manifest).encode())


def of_another_quantization(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["quantization"]["type"] = "fp4"
    write(folder / MANIFEST, json.dumps(manifest).encode())


def in_manifest(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = describe_files({name: folder / name})[name].dump()
    write(folder / MANIFEST, json.dumps(manifest).encode())


def shortened(folder: Path) -> None:
    write(folder / WEIGHTS, (folder / WEIGHTS).read_bytes()[:-1])


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def without_a_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def with_a_broken_manifest(folder: Path) -> None:
    write(folder / MANIFEST, b"{")


def with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def with_a_file_of_a_bad_name(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff\n\x1b[2J" + b"x" * 200)).write_text("")


def with_a_link(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent.parent / "elsewhere")


def with_a_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def a_link_itself(folder: Path) -> None:
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


def a_file_itself(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def write(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        overwritten,
        with_another_configuration,
        with_one_more_setting,
        with_tensors_of_another_model,
        with_too_few_constants,
        with_constants_of_another_type,
        without_constants,
        described_as_larger,
        with_another_table,
        of_another_original,
        of_another_quantization,
        shortened,
        without_weights,
        without_a_manifest,
        with_a_broken_manifest,
        with_an_adapter,
        with_a_file_of_a_bad_name,
        with_a_link,
        with_a_pipe,
        a_link_itself,
        a_file_itself,
    ],
)
def test_a_cached_base_that_was_changed_is_made_again(
    job: JobOf, hub: FakeHub, cache: Path, harm: Callable[[Path], None]
) -> None:
    first = prepare(job("first"), Recorded())
    sound = contents(cached(cache))
    harm(cached(cache))
    record = prepare(job("second"), Recorded())
    assert base_of(record).origin == "downloaded"
    assert base_of(record).message.startswith("the base in the cache was damaged (")
    assert record.base_sha256 == first.base_sha256
    assert contents(cached(cache)) == sound
    assert not [path for path in cached(cache).iterdir() if path.is_symlink()]


def test_the_checksum_detects_a_planted_base_with_other_numbers(job: JobOf, hub: FakeHub, cache: Path) -> None:
    """No server publishes a base's sum: a process with access to the claim can plant one."""
    first = prepare(job("first"), Recorded())
    with_a_matching_manifest(cached(cache))
    second = prepare(job("second"), Recorded())
    assert base_of(second).origin == "cache"
    assert base_of(second).sha256 != base_of(first).sha256


def in_two_parts(hub: FakeHub) -> list[str]:
    """Lay out the weights of the hub's model in two files; returns their names."""
    repository = hub.repositories["models/acme/tiny"]
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    tensors = sorted(load_file(repository / WEIGHTS).items())
    (repository / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        held = dict(tensors[number::2])
        save_file(held, repository / part)
        weight_map |= dict.fromkeys(held, part)
    (repository / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return parts


def test_intact_files_of_a_damaged_base_are_kept(job: JobOf, hub: FakeHub, cache: Path) -> None:
    parts = in_two_parts(hub)
    prepare(job("first"), Recorded())
    write(cached(cache) / parts[1], (cached(cache) / parts[1]).read_bytes()[::-1])
    assert parts[1] in base_of(prepare(job("second"), Recorded())).message
    assert [name for name in hub.fetched if name in parts] == [*parts, parts[1]]


@contextmanager
def unreadable(cache: Path, number: int) -> Iterator[None]:
    """Let no file of the cache's be hashed, as after a fault of its volume."""

    def failing(path: Path, *more: Any) -> str:
        if cache in path.parents:
            raise OSError(number, os.strerror(number), str(path))
        return file_sha256(path, *more)

    with patch.object(cache_module, "file_sha256", failing):
        yield


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_base_that_one_job_cannot_read_stays_for_the_others(
    job: JobOf, hub: FakeHub, cache: Path, number: int
) -> None:
    prepare(job("first"), Recorded())
    before = cached(cache).stat().st_ino
    with unreadable(cache, number):
        record = prepare(job("second"), Recorded())
    assert record.base_path == "base"
    assert f"the model cache cannot be used ({os.strerror(number)})" in base_of(record).message
    assert cached(cache).stat().st_ino == before
    assert base_of(prepare(job("third"), Recorded())).origin == "cache"


def test_training_is_retried_while_the_cache_does_not_answer(
    job: JobOf, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = job()
    prepare(context, Recorded())

    def failing(_folder: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(cache_module, "manifest_of", failing)
    with pytest.raises(StepFailure, match=r"Stale file handle.*; the step is retried") as failure:
        train(context, Recorded(), stop=StopRequest(), now=lambda: datetime.now(UTC), monotonic=lambda: 0.0)
    assert failure.value.exit_code is ExitCode.UNREACHABLE


# Concurrently, and killed


def test_concurrent_jobs_wait_for_the_one_that_makes_the_base(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    """Three processes; the first is held up while it downloads."""
    go_on, started = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> Rejection | None:
        if method == "GET" and path.endswith(WEIGHTS):
            started.set()
            go_on.wait(180)
        return None

    hub.reject = hold
    files = [new_files(tmp_path / f"job-{number}", tmp_path, MODEL) for number in range(3)]
    running = [
        file.start("prepare", QLORA_MODEL_CACHE=str(cache), QLORA_POD_UID=f"pod-{n}") for n, file in enumerate(files)
    ]
    assert started.wait(180)
    logs = [file.workspace / "records" / "prepare.log" for file in files]
    eventually(lambda: all(log.exists() for log in logs), seconds=60, every=0.05, what="three steps that run")
    go_on.set()
    for process in running:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stdout + stderr
    assert hub.fetched.count(WEIGHTS) == 1
    assert (cached(cache) / WEIGHTS).is_file()
    assert not [path for file in files for path in file.workspace.rglob("model.safetensors")]


def test_a_job_uses_a_base_that_another_one_has_completed_first(job: JobOf, hub: FakeHub, cache: Path) -> None:
    """As on a volume without locks: both make one, and the loser deletes the one it made."""
    contexts = iter([job("second")])
    records: list[PrepareRecord] = []
    (cache / "quantized").mkdir()

    def meanwhile(_method: str, path: str) -> Rejection | None:
        context = next(contexts, None) if path.endswith(WEIGHTS) and _method == "GET" else None
        if context is not None:
            hidden = partials(cache)[0]
            hidden.rename(cache / "hidden")
            records.append(prepare(context, Recorded()))
            (cache / "hidden").rename(hidden)
        return None

    hub.reject = meanwhile
    first = prepare(job("first"), Recorded())
    assert hub.fetched.count(WEIGHTS) == 2
    assert first.base_path == records[0].base_path == str(cached(cache))
    assert base_of(first).origin == "cache"


def test_the_next_pod_of_a_killed_job_fetches_the_missing_files(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    parts = in_two_parts(hub)
    go_on, stuck = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> Rejection | None:
        if method == "GET" and path.endswith(parts[1]):
            stuck.set()
            go_on.wait(60)
        return None

    hub.reject = hold
    files = new_files(tmp_path / "job", tmp_path, MODEL)
    process = files.start("prepare", QLORA_MODEL_CACHE=str(cache), QLORA_POD_UID="killed")
    assert stuck.wait(60), process.communicate()
    process.kill()
    process.communicate()
    hub.reject = lambda _method, _path: None
    go_on.set()
    assert len(partials(cache)) == len([*(cache / "quantized").glob("[!.]*")]) + 1
    done = files.run("prepare", QLORA_MODEL_CACHE=str(cache))
    assert done.exit_code == 0, done.stdout + done.stderr
    assert [name for name in hub.fetched if name in parts] == [*parts, parts[1]]
    assert {path.name for path in cached(cache).glob("*.safetensors")} == set(parts)


def aged(partial: Path, seconds: float) -> None:
    """As if the folder had been idle for so long."""
    for path in (partial / ".owner", partial):
        if path.exists():
            at = path.stat().st_mtime - seconds
            os.utime(path, (at, at))


def begun(partial: Path) -> Path:
    """The folder of the base in that of the pod that makes it."""
    return partial / ".base.partial"


def left_behind(job: JobOf, hub: FakeHub, cache: Path) -> Path:
    """Files of a job that was stopped between the two files of the weights, and no longer holds a lock."""
    parts = in_two_parts(hub)
    hub.corrupt = lambda path: path.endswith(parts[1])
    with pytest.raises(StepFailure):
        prepare(job("stopped"), Recorded())
    hub.corrupt = lambda _path: False
    hub.requests.clear()
    (partial,) = partials(cache)
    return partial


def test_stale_files_of_a_stopped_job_are_reused(job: JobOf, hub: FakeHub, cache: Path) -> None:
    partial = left_behind(job, hub, cache)
    waited: list[str] = []

    class Told(Recorded):
        def progress(self, record: Any, *, force: bool = False) -> None:
            if record.activity.startswith("waiting for another job to quantize model 0.1/0.2 MiB"):
                waited.append(record.activity)
                aged(partial, 130)
            super().progress(record, force=force)

    record = prepare(job("second"), Told())
    assert len(waited) == 1
    assert [name for name in hub.fetched if name.endswith(".safetensors")] == ["model-00002-of-00002.safetensors"]
    assert base_of(record).origin == "downloaded"
    cached(cache)


@pytest.mark.parametrize(
    "harm", [overwritten, with_tensors_of_another_model, with_too_few_constants, described_as_larger]
)
def test_damaged_files_of_a_stopped_job_are_made_again(
    job: JobOf, hub: FakeHub, cache: Path, harm: Callable[[Path, str], None]
) -> None:
    partial, name = left_behind(job, hub, cache), "model-00001-of-00002.safetensors"
    harm(begun(partial), name)
    aged(partial, 130)
    record = prepare(job("second"), Recorded())
    assert name in hub.fetched
    alone = replace(job("alone"), mounts=replace(job().mounts, model_cache=None))
    assert record.base_sha256 == prepare(alone, Recorded()).base_sha256


def test_a_job_does_not_resume_files_that_its_token_cannot_read(job: JobOf, hub: FakeHub, cache: Path) -> None:
    partial = left_behind(job, hub, cache)
    aged(partial, 130)
    hub.reject = lambda _method, path: Rejection(403, "GatedRepo") if "00001-of-00002" in path else None
    with pytest.raises(StepFailure, match="is gated and was asked for with no token") as failure:
        prepare(job("second"), Recorded())
    assert failure.value.exit_code is ExitCode.MODEL_UNAVAILABLE
    assert partials(cache) == [partial]


def test_a_folder_with_a_live_owner_is_never_taken_or_deleted(job: JobOf, hub: FakeHub, cache: Path) -> None:
    """Not even with an old timestamp: a folder of the same model, and of another."""
    partial = left_behind(job, hub, cache)
    ownership = own(partial)
    aged(partial, 10**6)

    class Stop(Recorded):
        def progress(self, record: Any, *, force: bool = False) -> None:
            if record.activity.startswith("waiting for another job"):
                raise Terminated
            super().progress(record, force=force)

    with pytest.raises(Terminated):
        prepare(job("second"), Stop())
    hub.commits["models/acme/tiny"] = "b" * 40
    prepare(job("third"), Recorded())
    assert partials(cache) == [partial]
    ownership.release()
    hub.commits["models/acme/tiny"] = "d" * 40
    prepare(job("fourth"), Recorded())
    assert partials(cache) == []


def test_a_stale_folder_with_a_link_in_it_is_deleted_and_not_written_through(
    job: JobOf, hub: FakeHub, cache: Path, tmp_path: Path
) -> None:
    partial = left_behind(job, hub, cache)
    (tmp_path / "precious").write_text("precious")
    (begun(partial) / "config.json").symlink_to(tmp_path / "precious")
    aged(partial, 10**4)
    record = prepare(job("second"), Recorded())
    assert (tmp_path / "precious").read_text() == "precious"
    assert base_of(record).origin == "downloaded"
    assert len([name for name in hub.fetched if name.endswith(".safetensors")]) == 2
    assert not any(path.is_symlink() for path in cached(cache).iterdir())


def test_a_folder_replaced_by_another_pod_is_not_set_aside(job: JobOf, hub: FakeHub, cache: Path) -> None:
    prepare(job("first"), Recorded())
    one, other = (ModelCache(ModelCacheLayout(cache), name, "pod") for name in ("one", "other"))
    found = one.find(cached(cache).name)
    assert found is not None
    other.set_aside(found)
    with other.claim(found.path.name) as place:
        assert place is not None
        begun(place.parent).rename(place)
        write(place / "config.json", b"{}")
        (place / "config.json").rename(place / "generation_config.json")
        assert other.complete(place, found.path.name) == found.path
    one.set_aside(found)
    assert (cached(cache) / WEIGHTS).is_file()


def test_a_volume_without_locks_holds_a_cache_too(
    job: JobOf, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(folder_lock, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": flock}))
    found = [base_of(prepare(job(name), Recorded())) for name in ("first", "second")]
    assert [(base.origin, base.message) for base in found] == [("downloaded", ""), ("cache", "")]
    cached(cache)


# A cache that cannot be used


def test_a_full_cache_is_reported_and_the_base_goes_into_the_workspace(
    job: JobOf, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: usage(path)._replace(free=1000) if cache in (path, *Path(path).parents) else usage(path),
    )
    records = Recorded()
    record = prepare(job(), records)
    assert record.base_path == "base"
    assert base_of(record).message == (
        "the model cache cannot be used (it has 0.0 MiB free, and the base needs 0.2 MiB): the base was made in the "
        "workspace"
    )
    assert any("the model cache cannot be used (" in line["activity"] for line in records.written)
    assert partials(cache) == []


@contextmanager
def broken(cache: Path, failing: int, number: int) -> Iterator[None]:
    """Let every operation on the cache's volume fail from number `failing` on."""
    fsync = os.fsync
    with bad_disk(cache, failing, number, stays_full=True), patch.object(os, "fsync", fsync):
        yield


@pytest.mark.parametrize(
    ("failing", "number"),
    [
        (1, errno.EROFS),
        (2, errno.EACCES),
        (4, errno.ENOSPC),
        (9, errno.EDQUOT),
        (14, errno.ENOSPC),
        (14, errno.EIO),
        (16, errno.ENOLCK),
    ],
)
def test_a_cache_that_cannot_be_written_costs_the_job_nothing(
    job: JobOf, hub: FakeHub, cache: Path, failing: int, number: int
) -> None:
    with broken(cache, failing, number):
        record = prepare(job(), Recorded())
    assert record.base_path == "base"
    assert f"the model cache cannot be used ({os.strerror(number)})" in base_of(record).message
    assert partials(cache) == []


@pytest.mark.parametrize("found", ["nothing", "damaged"])
def test_a_pod_that_hangs_with_the_caches_lock_makes_the_others_use_their_own(
    job: JobOf, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(cache_module, "_LONGEST_WAIT_SECONDS", 0.2)
    if found == "damaged":
        prepare(job("first"), Recorded())
        write(cached(cache) / WEIGHTS, b"")
    else:
        (cache / "quantized").mkdir(parents=True)
    with exclusive(cache / "quantized" / ".lock", longest_wait=1):
        record = prepare(job("second"), Recorded())
    assert record.base_path == "base"
    assert base_of(record).message == (
        "the model cache cannot be used (another process holds a lock for more than 0 s): the base was made in the "
        "workspace"
    )
    assert base_of(prepare(job("third"), Recorded())).origin == "downloaded"
    assert base_of(prepare(job("fourth"), Recorded())).origin == "cache"


def test_without_room_in_cache_and_workspace_no_weights_are_downloaded(
    job: JobOf, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(
        StepFailure, match=r"workspace volume has 0.0 MiB free.*; the model cache cannot be used: it has"
    ) as failure:
        prepare(job(), Recorded())
    assert failure.value.exit_code is ExitCode.STORAGE_FULL
    assert WEIGHTS not in hub.fetched


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ESTALE, ExitCode.UNREACHABLE), (errno.EDQUOT, ExitCode.STORAGE_FULL)]
)
@pytest.mark.parametrize("call", ["find", "claim"])
def test_a_fault_of_the_cache_is_retried_by_a_job_whose_workspace_has_no_room(
    job: JobOf, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: ExitCode, call: str
) -> None:
    """Detected before the download, or only before the base is made."""
    usage, one_file = shutil.disk_usage, (hub.repositories["models/acme/tiny"] / WEIGHTS).stat().st_size
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: (
            usage(path) if cache in (path, *Path(path).parents) else usage(path)._replace(free=one_file + 1000)
        ),
    )

    def failing(*_arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ModelCache, {"find": "_require_no_link", "claim": "_claim"}[call], failing)
    with pytest.raises(
        StepFailure, match=f"MiB free.*; the model cache cannot be used: {os.strerror(number)}"
    ) as failure:
        prepare(job(), Recorded())
    assert failure.value.exit_code is code
    assert WEIGHTS not in hub.fetched


def test_a_cache_that_can_only_be_read_is_read(job: JobOf, hub: FakeHub, cache: Path) -> None:
    prepare(job("first"), Recorded())
    with broken(cache, 1, errno.EROFS):
        assert base_of(prepare(job("second"), Recorded())).origin == "cache"


def test_a_cache_whose_folder_is_a_link_is_not_used(job: JobOf, hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (cache / "quantized").symlink_to(tmp_path / "outside")
    assert "quantized is a symbolic link" in base_of(prepare(job(), Recorded())).message
    assert [*(tmp_path / "outside").iterdir()] == []


# Files


def test_pods_of_another_user_with_the_same_group_can_read_and_replace(job: JobOf, hub: FakeHub, cache: Path) -> None:
    cache.chmod(0o2775)
    before = os.umask(0o077)
    try:
        prepare(job("first"), Recorded())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o7777 for path in cached(cache).iterdir()} == {0o444}
    assert (cache / "quantized").stat().st_mode & 0o7777 == cached(cache).stat().st_mode & 0o7777 == 0o2775
    assert (cache / "quantized" / ".lock").stat().st_mode & 0o7777 == 0o664


def test_clean_deletes_nothing_in_the_cache(job: JobOf, hub: FakeHub, cache: Path) -> None:
    context = job()
    prepare(context, Recorded())
    context.workspace.base.symlink_to(cached(cache))
    clean(context.workspace)
    assert (cached(cache) / WEIGHTS).is_file()
