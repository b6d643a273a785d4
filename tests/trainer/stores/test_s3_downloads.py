"""Downloads from an object store that is cut off, slow or wrong."""

import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import obstore
import pytest
from obstore.store import S3Store
from safetensors.torch import save_file

from qlora_api.contract import ExitCode
from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data.read.files import DataFiles
from qlora_trainer.data.read.hub_splits import training_part
from qlora_trainer.data.read.locate import find_data
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.stores import bucket as store_settings
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.objects import ObjectFolder, StoredObject
from tests.support.models.four_bit import large_weights, require_made_of
from tests.support.models.tiny import Recorded, write_rows
from tests.support.s3_jobs import (
    MODEL,
    ROWS,
    answering,
    rejection,
)
from tests.support.servers import BUCKET
from tests.support.services.fault_proxy import Fault, FaultProxy, Request
from tests.trainer.conftest import MakeContext


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
    """Its length is right, but the ETag of a single-part upload is its MD5."""
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
