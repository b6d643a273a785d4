"""Models, data and adapters in an object store, over a real S3 server, in good weather and in bad."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import obstore
import pytest
from obstore.store import S3Store
from safetensors.torch import save_file

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.read.files import DataFiles
from qlora_trainer.data.read.hub_splits import training_part
from qlora_trainer.data.read.locate import find_data
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.objects import ObjectFolder, StoredObject
from tests.support.models.four_bit import large_weights, require_made_of
from tests.support.models.tiny import Recorded, write_rows
from tests.support.s3_jobs import (
    MODEL,
    ROWS,
    SECRET,
    SESSION_TOKEN,
    answering,
    give_secret,
    rejection,
    require_no_canary,
)
from tests.support.servers import BUCKET, SECRET_KEY
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.trainer.conftest import MakeContext


def test_a_model_is_downloaded_without_unused_files(
    make_context: MakeContext, records: Recorded, store: FaultProxy, model: str, tiny_llama: Path
) -> None:
    context = make_context(MODEL)
    record = prepare(context, records)
    folder = context.workspace.root / record.model_path
    assert record.model_revision.startswith("sha256:")
    for name in ("config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tiny_llama / name).read_bytes()
    require_made_of(context, record, (tiny_llama / "model.safetensors").read_bytes())
    fetched = [path.rpartition("/")[2] for path in store.lines("GET") if model in path and "list-type" not in path]
    assert not set(fetched) & {"pytorch_model.bin", "adapter_config.json", "params.json"}
    assert fetched[-1] == "model.safetensors"
    require_no_canary(context.workspace.root, records.stream.getvalue())

    asked = len(store.seen)
    assert prepare(context, records) == record
    assert len(store.seen) == asked


@pytest.mark.usefixtures("model")
def test_the_revision_is_that_of_the_content(
    make_context: MakeContext, records: Recorded, tiny_llama: Path, store: FaultProxy
) -> None:
    """The same files on a volume have the same revision."""
    stored = prepare(make_context(MODEL), records)
    shutil.rmtree(make_context().workspace.root)
    assert prepare(make_context(), records).model_revision == stored.model_revision


def in_cache(context: StepContext, root: Path, name: str) -> StepContext:
    """The same job under another name, with a cache for models."""
    (root / "cache").mkdir(exist_ok=True)
    return replace(
        context,
        workspace=WorkspaceLayout(root / "workspaces" / name),
        mounts=replace(context.mounts, model_cache=root / "cache"),
        pod_uid=name,
    )


def weights_read(store: FaultProxy) -> int:
    return sum(path.endswith("model.safetensors") for path in store.lines("GET"))


@pytest.mark.usefixtures("model")
def test_jobs_that_share_a_cache_read_the_weights_once(
    make_context: MakeContext, records: Recorded, store: FaultProxy, tmp_path: Path
) -> None:
    first, second = (prepare(in_cache(make_context(MODEL), tmp_path, name), records) for name in ("first", "second"))
    assert weights_read(store) == 1
    assert first.base_path == second.base_path
    assert first.model_revision == second.model_revision
    assert second.base is not None
    assert second.base.origin == "cache"
    volume = prepare(make_context(), records)
    assert volume.model_revision == first.model_revision
    assert volume.base == BaseStatus(
        origin="volume", sha256=first.base_sha256, seconds=volume.base.seconds if volume.base else 0
    )


@pytest.mark.usefixtures("model")
def test_a_key_that_may_list_and_not_read_the_weights_gets_nothing_from_the_cache(
    make_context: MakeContext, records: Recorded, store: FaultProxy, tmp_path: Path
) -> None:
    prepare(in_cache(make_context(MODEL), tmp_path, "first"), records)

    def deny(request: Request) -> Fault | None:
        return answering(403, "AccessDenied") if request.path.endswith("model.safetensors") else None

    store.rule = deny
    message = rejection(in_cache(make_context(MODEL), tmp_path, "second"), records, ExitCode.MODEL_UNAVAILABLE)
    assert "may not be read" in message


def test_objects_of_another_address_are_not_taken_for_those_of_the_cache(
    make_context: MakeContext, records: Recorded, store: FaultProxy, bucket: S3Store, model: str, tmp_path: Path
) -> None:
    """Even with equal sizes and ETags: a store need not derive them from the content."""
    prepare(in_cache(make_context(MODEL), tmp_path, "first"), records)
    for name, found in (
        ObjectFolder(
            ObjectStoreSource(BUCKET, model), Secret(tmp_path / "credentials" / "model", "f", "s"), reject=bad_dataset
        )
        .list()
        .items()
    ):
        obstore.put(bucket, f"models/copy/{name}", obstore.get(bucket, f"{model}/{found.name}").bytes())
    copied = {"model": {**MODEL["model"], "source": f"s3://{BUCKET}/models/copy"}}
    record = prepare(in_cache(make_context(copied), tmp_path, "second"), records)
    assert record.base is not None
    assert record.base.origin == "downloaded"
    assert weights_read(store) == 2


def test_data_for_training_and_evaluation_are_read(
    make_context: MakeContext, records: Recorded, store: FaultProxy, bucket: S3Store, tmp_path: Path
) -> None:
    obstore.put(bucket, "rows/train.jsonl", write_rows(tmp_path / "rows.jsonl", ROWS))
    dataset = {
        "source": f"s3://{BUCKET}/rows/train.jsonl",
        "eval": {"source": f"s3://{BUCKET}/rows/train.jsonl"},
        "secretRef": {"name": "store"},
    }
    context = make_context({"dataset": dataset})
    record = prepare(context, records)
    assert (record.dataset.used_rows, record.dataset.eval_rows) == (3, 3)
    require_no_canary(context.workspace.root, records.stream.getvalue())
    wrong = {"dataset": {**dataset, "sha256": "0" * 64}}
    assert "but spec.dataset.sha256 is 000" in rejection(make_context(wrong), records, ExitCode.BAD_DATASET)
    missing = {"dataset": {**dataset, "source": f"s3://{BUCKET}/rows/none.jsonl"}}
    assert "rows/none.jsonl does not exist, or may not be read" in rejection(
        make_context(missing), records, ExitCode.BAD_DATASET
    )


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (answering(401, "Unauthorized"), ExitCode.MODEL_UNAVAILABLE, "HTTP 401 (Unauthorized)"),
        (answering(403, "AccessDenied"), ExitCode.MODEL_UNAVAILABLE, "HTTP 403 (AccessDenied)"),
        (answering(404, "NoSuchBucket"), ExitCode.MODEL_UNAVAILABLE, "HTTP 404 (NoSuchBucket)"),
        (answering(400, "ExpiredToken"), ExitCode.MODEL_UNAVAILABLE, "HTTP 400 (ExpiredToken)"),
        (answering(301, "PermanentRedirect"), ExitCode.BAD_CONFIGURATION, "is not at http"),
        (answering(429, "SlowDown", **{"Retry-After": "0"}), ExitCode.UNREACHABLE, "HTTP 429 (SlowDown)"),
        (answering(500, "InternalError"), ExitCode.UNREACHABLE, "HTTP 500 (InternalError)"),
        (answering(503, "SlowDown"), ExitCode.UNREACHABLE, "HTTP 503 (SlowDown)"),
        (Fault(200, body=b"busy"), ExitCode.UNREACHABLE, "cannot be reached, or broke off"),
    ],
)
def test_a_rejection_is_permanent_and_a_server_error_is_not(
    make_context: MakeContext,
    records: Recorded,
    store: FaultProxy,
    tmp_path: Path,
    fault: Fault,
    code: ExitCode,
    words: str,
) -> None:
    give_secret(tmp_path, "model", {**SECRET, "AWS_SESSION_TOKEN": SESSION_TOKEN})
    store.rule = lambda _request: fault
    message = rejection(make_context(MODEL), records, code)
    assert words in message
    if code is ExitCode.MODEL_UNAVAILABLE:
        assert "may not be listed with the credentials of spec.model.secretRef" in message


@pytest.mark.usefixtures("store", "model")
def test_a_wrong_key_is_rejected_by_the_real_server(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    give_secret(tmp_path, "model", {**SECRET, "AWS_SECRET_ACCESS_KEY": "wrong"})
    message = rejection(make_context(MODEL), records, ExitCode.MODEL_UNAVAILABLE)
    assert "HTTP 403 (SignatureDoesNotMatch)" in message


def test_a_second_address_of_the_store_is_rejected(
    make_context: MakeContext, records: Recorded, store: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    message = rejection(make_context(MODEL), records, ExitCode.BAD_CONFIGURATION)
    assert message.startswith(f"AWS_ENDPOINT_URL_S3 is set, but not to http://{store.address}")
    assert "set AWS_ENDPOINT_URL, and unset the other" in message


def test_no_credential_follows_a_redirect(
    make_context: MakeContext, records: Recorded, store: FaultProxy, tmp_path: Path
) -> None:
    give_secret(tmp_path, "model", {**SECRET, "AWS_SESSION_TOKEN": SESSION_TOKEN})
    with serve_proxy(FaultProxy("", host="127.0.0.2", rule=lambda _request: Fault(200))) as elsewhere:
        redirect = Fault(307, {"Location": f"http://{elsewhere.address}/{BUCKET}"})
        store.rule = lambda _request: redirect
        message = rejection(make_context(MODEL), records, ExitCode.BAD_CONFIGURATION)
    assert "redirects s3://team/models/tiny to another host, where credentials are never sent" in message
    assert elsewhere.seen == []
    assert {request.headers["x-amz-security-token"] for request in store.seen} == {SESSION_TOKEN}
    assert not any(canary in request.path for request in store.seen for canary in (SECRET_KEY, SESSION_TOKEN))


@pytest.mark.parametrize("is_replaced", [False, True], ids=["kept", "replaced"])
def test_data_of_an_interrupted_attempt_are_loaded_once_unless_they_were_replaced(
    make_context: MakeContext,
    records: Recorded,
    store: FaultProxy,
    bucket: S3Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_replaced: bool,
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS).read_bytes()
    for name in ("a", "b"):
        obstore.put(bucket, f"many/{name}.jsonl", rows)
    context = make_context({"dataset": {"source": f"s3://{BUCKET}/many", "secretRef": {"name": "store"}}})
    store.rule = lambda request: answering(503, "SlowDown") if "many/b.jsonl" in request.path else None
    rejection(context, records, ExitCode.UNREACHABLE)
    store.rule = lambda _request: None
    if is_replaced:
        obstore.put(bucket, "many/a.jsonl", rows.swapcase())
    else:
        # As on a volume that the two files fill.
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=len(rows)))
    files = find_stored(context).files
    assert [file.path.read_bytes() for file in files] == [rows.swapcase() if is_replaced else rows, rows]


def find_stored(context: StepContext) -> DataFiles:
    """The job's data, downloaded where prepare has them."""
    source = context.spec.dataset.training_sources["spec.dataset"]
    return find_data(
        source.source,
        training_part(source),
        StoreAccess(context.mounts, lambda: pytest.fail("no hub is needed"), context.secret("dataset")),
        context.workspace.data / ".download-train.partial",
    )


def of_weights(request: Request) -> bool:
    return request.method == "GET" and request.path.partition("?")[0].endswith("model.safetensors")


def test_the_weights_of_an_interrupted_attempt_are_resumed(
    make_context: MakeContext,
    records: Recorded,
    store: FaultProxy,
    bucket: S3Store,
    model: str,
    tmp_path: Path,
    tiny_llama: Path,
) -> None:
    """Within an attempt by the client, and in the next one by us. The weights have 20 MB."""
    save_file(large_weights(tiny_llama), tmp_path / "large.safetensors")
    obstore.put(bucket, f"{model}/model.safetensors", tmp_path / "large.safetensors")
    cuts = iter([Fault(cut=9 * 10**6), Fault(cut=2 * 10**6)])
    store.rule = lambda request: next(cuts, answering(503, "SlowDown")) if of_weights(request) else None
    context = make_context(MODEL)
    rejection(context, records, ExitCode.UNREACHABLE)
    (partial,) = context.workspace.models.glob("*.partial/*.partial")
    kept = partial.stat().st_size
    assert 8 * 10**6 < kept <= 11 * 10**6

    store.seen.clear()
    store.rule = lambda _request: None
    record = prepare(context, records)
    assert [request.headers["range"] for request in store.seen if of_weights(request)] == [f"bytes={kept}-"]
    require_made_of(context, record, (tmp_path / "large.safetensors").read_bytes())
    assert not [*context.workspace.root.rglob("*.partial")]


def test_an_etag_that_is_no_digest_is_no_reason_to_reject(store: FaultProxy, tmp_path: Path) -> None:
    """A store that encrypts with private keys gives such ETags."""
    headers = {"ETag": f'"{"0" * 32}"', "Last-Modified": "Wed, 01 Jul 2026 00:00:00 GMT"}
    store.rule = lambda _request: Fault(200, headers, b"{}")
    secret = Secret(tmp_path / "credentials" / "dataset", "spec.dataset.secretRef", "store")
    folder = ObjectFolder(ObjectStoreSource(BUCKET, "rows"), secret, reject=bad_dataset)
    folder.download(StoredObject("a.jsonl", 2, headers["ETag"]), tmp_path / "a.jsonl", lambda _done: None)
    assert (tmp_path / "a.jsonl").read_bytes() == b"{}"
