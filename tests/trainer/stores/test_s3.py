"""Models, data and adapters in an object store, over a real S3 server, in good weather and in bad."""

import shutil
from dataclasses import replace
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.stores.objects import ObjectFolder
from tests.support.models.four_bit import require_made_of
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
from tests.support.servers import ACCESS_KEY, BUCKET, SECRET_KEY
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
