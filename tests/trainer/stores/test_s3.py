"""Models, data and adapters in an object store, over a real S3 server, in good weather and in bad."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
import pytest
from obstore.store import S3Store
from safetensors.torch import save_file

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_dataset
from qlora_trainer.data.read.files import DataFiles
from qlora_trainer.data.read.hub_splits import training_part
from qlora_trainer.data.read.locate import find_data
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.stores import bucket as store_settings
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.objects import ObjectFolder, StoredObject
from tests.support.models.four_bit import large_weights, require_made_of
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.servers import ACCESS_KEY, BUCKET, SECRET_KEY, s3_bucket, s3_server
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.trainer.conftest import MakeContext

SESSION_TOKEN = "canary-session-token"
SECRET = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
MODEL: dict[str, Any] = {"model": {"source": f"s3://{BUCKET}/models/tiny", "secretRef": {"name": "store"}}}
ROWS = [chat_row("Which pods?", "kubectl get pods")] * 3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def store(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    """The object store of the profile, behind a proxy. The Secrets of model, data and output exist."""
    for name in SECRET:
        monkeypatch.delenv(name, raising=False)
    for part in ("model", "dataset", "output"):
        give_secret(tmp_path, part)
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    with serve_proxy(FaultProxy(s3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        yield proxy


def give_secret(root: Path, part: str, values: dict[str, str] | None = None) -> None:
    """The files of a mounted Secret."""
    folder = root / "credentials" / part
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for key, value in (SECRET if values is None else values).items():
        (folder / key).write_text(f"{value}\n")


@pytest.fixture
def bucket(s3: str) -> S3Store:
    """The bucket itself, without the proxy."""
    return s3_bucket(s3)


@pytest.fixture
def model(bucket: S3Store, tiny_llama: Path) -> str:
    """Address below the bucket of a tiny model, with files that must never be read."""
    clear(bucket, "models/")
    for path in tiny_llama.iterdir():
        obstore.put(bucket, f"models/tiny/{path.name}", path)
    obstore.put(bucket, "models/tiny/pytorch_model.bin", b"pickle")
    obstore.put(bucket, "models/tiny/adapter_config.json", b"{}")
    obstore.put(bucket, "models/tiny/original/params.json", b"{}")
    return "models/tiny"


def clear(bucket: S3Store, prefix: str) -> None:
    for page in obstore.list(bucket, prefix):
        obstore.delete(bucket, [entry["path"] for entry in page])


def rejection(context: StepContext, records: Recorded, code: ExitCode) -> str:
    """The message of prepare when it ends with `code`, without a credential in it."""
    with pytest.raises(StepFailure) as failure:
        prepare(context, records)
    assert failure.value.exit_code is code, failure.value.message
    require_no_canary(context.workspace.root, failure.value.message, records.stream.getvalue())
    return failure.value.message


def require_no_canary(folder: Path, *texts: str) -> None:
    """No output or file of a step holds a credential."""
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for content in (*contents, *(text.encode() for text in texts)):
        for canary in (ACCESS_KEY, SECRET_KEY, SESSION_TOKEN):
            assert canary.encode() not in content


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
    """Even if sizes and ETags are the same: a store need not make them from the content."""
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


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other without delay."""
    soon = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2}
    monkeypatch.setattr(store_settings, "RETRY", {**store_settings.RETRY, "backoff": soon})


def answering(status: int, code: str, **headers: str) -> Fault:
    """S3's answer when it rejects, quoting the request."""
    canaries = f"{ACCESS_KEY} {SECRET_KEY} {SESSION_TOKEN}"
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{canaries}</Message></Error>"
    return Fault(status, {"Content-Type": "application/xml", **headers}, body.encode())


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


@pytest.mark.usefixtures("store", "model")
def test_a_missing_secret_is_waited_for(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    give_secret(tmp_path, "model", {"AWS_ACCESS_KEY_ID": ACCESS_KEY})
    message = rejection(make_context(MODEL), records, ExitCode.UNREACHABLE)
    assert message.startswith("Secret 'store' with AWS_SECRET_ACCESS_KEY (spec.model.secretRef) does not exist")


def test_without_a_secret_nothing_is_signed_and_no_metadata_service_is_used(
    make_context: MakeContext, records: Recorded, store: FaultProxy, model: str
) -> None:
    spec = {"model": {"source": f"s3://{BUCKET}/{model}"}}
    message = rejection(make_context(spec), records, ExitCode.MODEL_UNAVAILABLE)
    assert "with no credentials (spec.model.secretRef)" in message
    assert not any("authorization" in map(str.lower, request.headers) for request in store.seen)


def test_a_store_that_does_not_answer_is_tried_again(
    make_context: MakeContext, records: Recorded, store: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    message = rejection(make_context(MODEL), records, ExitCode.UNREACHABLE)
    assert message.startswith("http://127.0.0.1:9 cannot be reached")


def test_a_second_address_of_the_store_is_rejected(
    make_context: MakeContext, records: Recorded, store: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    message = rejection(make_context(MODEL), records, ExitCode.BAD_CONFIGURATION)
    assert message.startswith(f"AWS_ENDPOINT_URL_S3 is set, but not to http://{store.address}")
    assert "set AWS_ENDPOINT_URL, and unset the other" in message


def test_a_burst_of_errors_is_outlasted(
    make_context: MakeContext, records: Recorded, store: FaultProxy, model: str
) -> None:
    burst = iter([answering(503, "SlowDown")] * 3 + [answering(429, "SlowDown")])
    store.rule = lambda _request: next(burst, None)
    assert prepare(make_context(MODEL), records).model_revision.startswith("sha256:")


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


def test_partly_downloaded_data_need_room_for_the_rest_only(
    make_context: MakeContext,
    records: Recorded,
    store: FaultProxy,
    bucket: S3Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("a", "b"):
        obstore.put(bucket, f"many/{name}.jsonl", write_rows(tmp_path / "rows.jsonl", ROWS))
    size = (tmp_path / "rows.jsonl").stat().st_size
    context = make_context({"dataset": {"source": f"s3://{BUCKET}/many", "secretRef": {"name": "store"}}})
    store.rule = lambda request: answering(503, "SlowDown") if "many/b.jsonl" in request.path else None
    rejection(context, records, ExitCode.UNREACHABLE)
    store.rule = lambda _request: None
    # As on a volume that the two files fill.
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=size))
    downloaded = find_stored(context)
    assert [file.path.read_bytes() for file in downloaded.files] == [(tmp_path / "rows.jsonl").read_bytes()] * 2


def test_data_replaced_between_two_attempts_are_read_in_their_new_version(
    make_context: MakeContext, records: Recorded, store: FaultProxy, bucket: S3Store, tmp_path: Path
) -> None:
    obstore.put(bucket, "many/a.jsonl", write_rows(tmp_path / "rows.jsonl", ROWS))
    obstore.put(bucket, "many/b.jsonl", tmp_path / "rows.jsonl")
    context = make_context({"dataset": {"source": f"s3://{BUCKET}/many", "secretRef": {"name": "store"}}})
    store.rule = lambda request: answering(503, "SlowDown") if "many/b.jsonl" in request.path else None
    rejection(context, records, ExitCode.UNREACHABLE)
    store.rule = lambda _request: None
    corrected = (tmp_path / "rows.jsonl").read_bytes().swapcase()
    obstore.put(bucket, "many/a.jsonl", corrected)
    assert find_stored(context).files[0].path.read_bytes() == corrected


def find_stored(context: StepContext) -> DataFiles:
    """The job's data, downloaded where prepare has them."""
    source = context.spec.dataset.training_sources["spec.dataset"]
    return find_data(
        source.source,
        training_part(source),
        StoreAccess(context.mounts, lambda: pytest.fail("no hub is needed"), context.secret("dataset")),
        context.workspace.data / ".download-train.partial",
    )


@pytest.fixture
def large(bucket: S3Store, model: str, tmp_path: Path, tiny_llama: Path) -> bytes:
    """The model's weights made 20 MB large."""
    save_file(large_weights(tiny_llama), tmp_path / "large.safetensors")
    obstore.put(bucket, f"{model}/model.safetensors", tmp_path / "large.safetensors")
    return (tmp_path / "large.safetensors").read_bytes()


def of_weights(request: Request) -> bool:
    return request.method == "GET" and request.path.partition("?")[0].endswith("model.safetensors")


def test_a_cut_download_resumes(make_context: MakeContext, records: Recorded, store: FaultProxy, large: bytes) -> None:
    """Within an attempt by the client, and in the next one by us."""
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
    require_made_of(context, record, large)
    assert not [*context.workspace.root.rglob("*.partial")]


def test_a_stalled_transfer_is_aborted_and_resumed(
    make_context: MakeContext, records: Recorded, store: FaultProxy, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_settings, "STALLED", timedelta(milliseconds=200))
    stalls = iter([Fault(cut=9 * 10**6, stall=True)])
    store.rule = lambda request: next(stalls, None) if of_weights(request) else None
    context = make_context(MODEL)
    record = prepare(context, records)
    require_made_of(context, record, large)
    assert len([request for request in store.seen if of_weights(request)]) == 2


def test_parts_of_two_versions_are_never_put_together(
    make_context: MakeContext, records: Recorded, store: FaultProxy, large: bytes, bucket: S3Store, model: str
) -> None:
    cuts = iter([Fault(cut=9 * 10**6)])
    store.rule = lambda request: next(cuts, answering(503, "SlowDown")) if of_weights(request) else None
    rejection(make_context(MODEL), records, ExitCode.UNREACHABLE)
    store.rule = lambda _request: None
    replaced = large[:-1] + bytes([large[-1] ^ 1])
    obstore.put(bucket, f"{model}/model.safetensors", replaced)
    context = make_context(MODEL)
    record = prepare(context, records)
    require_made_of(context, record, replaced)


def test_a_file_that_is_replaced_while_it_is_read_is_loaded_again(
    make_context: MakeContext, records: Recorded, store: FaultProxy, large: bytes, bucket: S3Store, model: str
) -> None:
    def replace(request: Request) -> Fault | None:
        if of_weights(request):
            obstore.put(bucket, f"{model}/model.safetensors", large[:-1] + b"x")
        return None

    store.rule = replace
    message = rejection(make_context(MODEL), records, ExitCode.UNREACHABLE)
    assert "model.safetensors was replaced while it was read: it is downloaded again" in message


def test_a_file_that_arrives_changed_is_loaded_again(
    make_context: MakeContext, records: Recorded, store: FaultProxy, model: str, tiny_llama: Path
) -> None:
    """Its length is right, and the ETag of an object that was uploaded in one part is its MD5."""
    faults = iter([Fault(corrupt=True)])
    store.rule = lambda request: next(faults, None) if of_weights(request) else None
    context = make_context(MODEL)
    message = rejection(context, records, ExitCode.UNREACHABLE)
    assert f"{model}/model.safetensors arrived with another MD5 than its ETag: it is downloaded again" in message
    record = prepare(context, records)
    require_made_of(context, record, (tiny_llama / "model.safetensors").read_bytes())


def test_an_etag_that_is_no_digest_is_no_reason_to_reject(store: FaultProxy, tmp_path: Path) -> None:
    """A store that encrypts with private keys gives such ETags."""
    headers = {"ETag": f'"{"0" * 32}"', "Last-Modified": "Wed, 01 Jul 2026 00:00:00 GMT"}
    store.rule = lambda _request: Fault(200, headers, b"{}")
    secret = Secret(tmp_path / "credentials" / "dataset", "spec.dataset.secretRef", "store")
    folder = ObjectFolder(ObjectStoreSource(BUCKET, "rows"), secret, reject=bad_dataset)
    folder.download(StoredObject("a.jsonl", 2, headers["ETag"]), tmp_path / "a.jsonl", lambda _done: None)
    assert (tmp_path / "a.jsonl").read_bytes() == b"{}"


def test_a_file_of_another_size_than_listed_is_rejected(
    make_context: MakeContext, records: Recorded, store: FaultProxy, large: bytes
) -> None:
    whole = {"ETag": '"e"', "Last-Modified": "Wed, 01 Jul 2026 00:00:00 GMT"}
    store.rule = lambda request: Fault(200, whole, large[:-10]) if of_weights(request) else None
    message = rejection(make_context(MODEL), records, ExitCode.UNREACHABLE)
    assert f"arrived with {len(large) - 10} bytes instead of {len(large)}" in message
