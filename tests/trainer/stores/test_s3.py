"""Models and data in an object store, over a real S3 server, in good weather and in bad."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import obstore
import pytest
from safetensors.torch import save_file

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import ExitCode
from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.read.hub_splits import training_part
from qlora_trainer.data.read.locate import find_data
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.objects import ObjectFolder, StoredObject
from tests.support.models.four_bit import large_weights, require_made_of
from tests.support.models.tiny import Recorded, write_rows
from tests.support.s3_jobs import MODEL, ROWS, SECRET, SESSION_TOKEN, S3Jobs, answering, of_weights
from tests.support.servers import BUCKET, SECRET_KEY, s3_bucket
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.support.services.stores import let_retry
from tests.trainer.conftest import MakeContext


@pytest.fixture
def jobs(
    s3: str,
    tiny_llama: Path,
    tmp_path: Path,
    make_context: MakeContext,
    records: Recorded,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[S3Jobs]:
    """Jobs over a tiny model in the bucket, next to files that must never be read."""
    for name in SECRET:
        monkeypatch.delenv(name, raising=False)
    bucket = s3_bucket(s3)
    for page in obstore.list(bucket):
        obstore.delete(bucket, [entry["path"] for entry in page])
    for path in tiny_llama.iterdir():
        obstore.put(bucket, f"models/tiny/{path.name}", path)
    obstore.put(bucket, "models/tiny/pytorch_model.bin", b"pickle")
    obstore.put(bucket, "models/tiny/adapter_config.json", b"{}")
    obstore.put(bucket, "models/tiny/original/params.json", b"{}")
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    let_retry(monkeypatch, 4)
    with serve_proxy(FaultProxy(s3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        jobs = S3Jobs(tmp_path, proxy, bucket, make_context, records)
        for part in ("model", "dataset", "output"):
            jobs.give_secret(part)
        yield jobs


def weights_read(jobs: S3Jobs) -> int:
    return sum(map(of_weights, jobs.proxy.seen))


def test_a_model_is_downloaded_without_unused_files(jobs: S3Jobs, tiny_llama: Path) -> None:
    context, record = jobs.context(), jobs.prepare()
    folder = context.workspace.root / record.model_path
    assert record.model_revision.startswith("sha256:")
    for name in ("config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tiny_llama / name).read_bytes()
    require_made_of(context, record, (tiny_llama / "model.safetensors").read_bytes())
    read = [path for path in jobs.proxy.lines("GET") if "models/tiny" in path and "list-type" not in path]
    fetched = [path.rpartition("/")[2] for path in read]
    assert not set(fetched) & {"pytorch_model.bin", "adapter_config.json", "params.json"}
    assert fetched[-1] == "model.safetensors"

    asked = len(jobs.proxy.seen)
    assert jobs.prepare() == record
    assert len(jobs.proxy.seen) == asked


def test_jobs_that_share_a_cache_read_the_weights_once(jobs: S3Jobs) -> None:
    """The same files on a volume have the same revision."""
    first, second = (jobs.prepare(jobs.context(cached_as=name)) for name in ("first", "second"))
    assert weights_read(jobs) == 1
    assert first.base_path == second.base_path
    assert first.model_revision == second.model_revision
    assert second.base is not None
    assert second.base.origin == "cache"
    volume = jobs.prepare(jobs.context({}))
    assert volume.model_revision == first.model_revision
    seconds = volume.base.seconds if volume.base else 0
    assert volume.base == BaseStatus(origin="volume", sha256=first.base_sha256, seconds=seconds)


def test_a_key_that_may_list_and_not_read_the_weights_gets_nothing_from_the_cache(jobs: S3Jobs) -> None:
    jobs.prepare(jobs.context(cached_as="first"))

    def deny(request: Request) -> Fault | None:
        return answering(403, "AccessDenied") if request.path.endswith("model.safetensors") else None

    jobs.proxy.rule = deny
    assert "may not be read" in jobs.reject(ExitCode.MODEL_UNAVAILABLE, jobs.context(cached_as="second"))


def test_objects_of_another_address_are_not_taken_for_those_of_the_cache(jobs: S3Jobs) -> None:
    """Even with equal sizes and ETags: a store need not derive them from the content."""
    jobs.prepare(jobs.context(cached_as="first"))
    for entry in [entry for page in obstore.list(jobs.bucket, "models/tiny/") for entry in page]:
        copy = entry["path"].replace("models/tiny", "models/copy")
        obstore.put(jobs.bucket, copy, obstore.get(jobs.bucket, entry["path"]).bytes())
    copied = {"model": {**MODEL["model"], "source": f"s3://{BUCKET}/models/copy"}}
    record = jobs.prepare(jobs.context(copied, cached_as="second"))
    assert record.base is not None
    assert record.base.origin == "downloaded"
    assert weights_read(jobs) == 2


def test_data_for_training_and_evaluation_are_read(jobs: S3Jobs) -> None:
    jobs.put_rows("rows/train.jsonl")
    address = f"s3://{BUCKET}/rows/train.jsonl"
    dataset = {"source": address, "eval": {"source": address}, "secretRef": {"name": "store"}}
    record = jobs.prepare(jobs.context({"dataset": dataset}))
    assert (record.dataset.used_rows, record.dataset.eval_rows) == (3, 3)
    for change, words in (
        ({"sha256": "0" * 64}, "but spec.dataset.sha256 is 000"),
        ({"source": f"s3://{BUCKET}/rows/none.jsonl"}, "rows/none.jsonl does not exist, or may not be read"),
    ):
        assert words in jobs.reject(ExitCode.BAD_DATASET, jobs.context({"dataset": dataset | change}))


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (answering(404, "NoSuchBucket"), ExitCode.MODEL_UNAVAILABLE, "HTTP 404 (NoSuchBucket)"),
        (answering(400, "ExpiredToken"), ExitCode.MODEL_UNAVAILABLE, "HTTP 400 (ExpiredToken)"),
        (answering(301, "PermanentRedirect"), ExitCode.BAD_CONFIGURATION, "is not at http"),
        (answering(429, "SlowDown", **{"Retry-After": "0"}), ExitCode.UNREACHABLE, "HTTP 429 (SlowDown)"),
        (Fault(200, body=b"busy"), ExitCode.UNREACHABLE, "cannot be reached, or broke off"),
    ],
)
def test_the_stores_own_word_for_a_failure_is_shown(jobs: S3Jobs, fault: Fault, code: ExitCode, words: str) -> None:
    jobs.give_secret("model", AWS_SESSION_TOKEN=SESSION_TOKEN)
    jobs.proxy.rule = lambda _request: fault
    message = jobs.reject(code)
    assert words in message
    if code is ExitCode.MODEL_UNAVAILABLE:
        assert "may not be listed with the credentials of spec.model.secretRef" in message


def test_a_wrong_key_is_rejected_by_the_real_server(jobs: S3Jobs) -> None:
    jobs.give_secret("model", AWS_SECRET_ACCESS_KEY="wrong")
    assert "HTTP 403 (SignatureDoesNotMatch)" in jobs.reject(ExitCode.MODEL_UNAVAILABLE)


def test_a_second_address_of_the_store_is_rejected(jobs: S3Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    message = jobs.reject(ExitCode.BAD_CONFIGURATION)
    assert message.startswith(f"AWS_ENDPOINT_URL_S3 is set, but not to http://{jobs.proxy.address}")
    assert "set AWS_ENDPOINT_URL, and unset the other" in message


def test_no_session_token_follows_a_redirect(jobs: S3Jobs) -> None:
    jobs.give_secret("model", AWS_SESSION_TOKEN=SESSION_TOKEN)
    with serve_proxy(FaultProxy("", host="127.0.0.2", rule=lambda _request: Fault(200))) as elsewhere:
        redirect = Fault(307, {"Location": f"http://{elsewhere.address}/{BUCKET}"})
        jobs.proxy.rule = lambda _request: redirect
        message = jobs.reject(ExitCode.BAD_CONFIGURATION)
    assert "redirects s3://team/models/tiny to another host, where credentials are never sent" in message
    assert elsewhere.seen == []
    assert {request.headers["x-amz-security-token"] for request in jobs.proxy.seen} == {SESSION_TOKEN}
    assert not any(key in request.path for request in jobs.proxy.seen for key in (SECRET_KEY, SESSION_TOKEN))


@pytest.mark.parametrize("is_replaced", [False, True], ids=["kept", "replaced"])
def test_data_of_an_interrupted_attempt_are_loaded_once_unless_they_were_replaced(
    jobs: S3Jobs, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    rows = jobs.put_rows("many/a.jsonl", "many/b.jsonl")
    context = jobs.context({"dataset": {"source": f"s3://{BUCKET}/many", "secretRef": {"name": "store"}}})
    jobs.proxy.rule = lambda request: answering(503, "SlowDown") if "many/b.jsonl" in request.path else None
    jobs.reject(ExitCode.UNREACHABLE, context)
    jobs.proxy.rule = lambda _request: None
    if is_replaced:
        obstore.put(jobs.bucket, "many/a.jsonl", rows.swapcase())
    else:
        # As on a volume that the two files fill.
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=len(rows)))
    source = context.spec.dataset.training_sources["spec.dataset"]
    access = StoreAccess(context.mounts, lambda: pytest.fail("no hub is needed"), context.secret("dataset"))
    place = context.workspace.data / ".download-train.partial"
    found = find_data(source.source, training_part(source), access, place)
    assert [file.path.read_bytes() for file in found.files] == [rows.swapcase() if is_replaced else rows, rows]


def test_the_weights_of_an_interrupted_attempt_are_resumed(jobs: S3Jobs, tiny_llama: Path) -> None:
    """Within an attempt by the client, and in the next one by us. The weights have 20 MB."""
    large = jobs.root / "large.safetensors"
    save_file(large_weights(tiny_llama), large)
    obstore.put(jobs.bucket, "models/tiny/model.safetensors", large)
    cuts = iter([Fault(cut=9 * 10**6), Fault(cut=2 * 10**6)])
    jobs.proxy.rule = lambda request: next(cuts, answering(503, "SlowDown")) if of_weights(request) else None
    context = jobs.context()
    jobs.reject(ExitCode.UNREACHABLE)
    (partial,) = context.workspace.models.glob("*.partial/*.partial")
    kept = partial.stat().st_size
    assert 8 * 10**6 < kept <= 11 * 10**6

    jobs.proxy.seen.clear()
    jobs.proxy.rule = lambda _request: None
    record = jobs.prepare()
    ranges = [request.headers["range"] for request in jobs.proxy.seen if of_weights(request)]
    assert ranges == [f"bytes={kept}-"]
    require_made_of(context, record, large.read_bytes())
    assert not [*context.workspace.root.rglob("*.partial")]


def test_an_etag_that_is_no_digest_is_no_reason_to_reject(jobs: S3Jobs) -> None:
    """A store that encrypts with private keys gives such ETags."""
    headers = {"ETag": f'"{"0" * 32}"', "Last-Modified": "Wed, 01 Jul 2026 00:00:00 GMT"}
    jobs.proxy.rule = lambda _request: Fault(200, headers, b"{}")
    secret, path = jobs.context().secret("dataset"), jobs.root / "a.jsonl"
    folder = ObjectFolder(ObjectStoreSource(BUCKET, "rows"), secret, reject=bad_dataset)
    folder.download(StoredObject("a.jsonl", 2, headers["ETag"]), path, lambda _done: None)
    assert path.read_bytes() == b"{}"
