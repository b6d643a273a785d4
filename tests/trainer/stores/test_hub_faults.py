"""Downloads from a hub that is in trouble, slow, wrong or sends its readers elsewhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from safetensors.torch import save_file

from qlora_api.contract import ExitCode
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.stores import hub as hub_module
from tests.support.fake_hub import COMMIT, FakeHub, Rejection
from tests.support.models.four_bit import large_weights, require_made_of
from tests.support.models.tiny import Recorded
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.support.services.hub_jobs import MODEL, rejection, tiny_hub
from tests.trainer.conftest import MakeContext

TOKEN = "hf_canarytokenthatreads"


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the model acme/tiny; requests are retried without delay."""
    monkeypatch.setattr(hub_module, "_WAITS", (0, 0, 0, 0))
    with tiny_hub(tmp_path, tiny_llama, monkeypatch) as served:
        yield served


@pytest.fixture
def proxy(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The way to the hub."""
    with serve_proxy(FaultProxy(hub.endpoint.removeprefix("http://"))) as served:
        monkeypatch.setenv("HF_ENDPOINT", f"http://{served.address}")
        yield served


def weights(hub: FakeHub) -> Path:
    return hub.repositories["models/acme/tiny"] / "model.safetensors"


def of_weights(request: Request) -> bool:
    return request.method == "GET" and request.path.endswith("/model.safetensors")


def test_a_cut_download_resumes(make_context: MakeContext, records: Recorded, hub: FakeHub) -> None:
    """The client writes parts of 10 MB: it keeps one of the 15 MB before the cut."""
    save_file(large_weights(weights(hub).parent), weights(hub))
    cuts = iter([15 * 10**6])
    hub.truncate = lambda name: next(cuts, None) if name == "model.safetensors" else None
    prepare(make_context(MODEL), records)
    assert hub.ranges == [f"model.safetensors bytes={DOWNLOAD_CHUNK_SIZE}-"]


def test_a_second_attempt_keeps_the_files_of_the_first(
    make_context: MakeContext, records: Recorded, hub: FakeHub
) -> None:
    reject_weights = True

    def reject(method: str, path: str) -> Rejection | None:
        # Answering the client's first question about the file makes it fail immediately, without the client's retries.
        return Rejection(500) if reject_weights and method == "GET" and path.endswith("model.safetensors") else None

    hub.reject = reject
    rejection(make_context, records, ExitCode.UNREACHABLE)
    reject_weights = False
    hub.requests.clear()
    record = prepare(make_context(MODEL), records)
    assert hub.fetched == ["model.safetensors"]
    assert record.model_path == f"model/{COMMIT}"


def test_a_file_that_arrives_changed_is_loaded_again(
    make_context: MakeContext, records: Recorded, hub: FakeHub
) -> None:
    hub.corrupt = lambda name: name == "model.safetensors"
    message = rejection(make_context, records, ExitCode.UNREACHABLE)
    assert "model.safetensors arrived with another SHA-256 than the hub lists" in message
    hub.corrupt = lambda _name: False
    assert prepare(make_context(MODEL), records).model_revision == COMMIT


@pytest.mark.parametrize("part", ["/api/models/", "/resolve/"])
def test_a_burst_of_errors_is_outlasted(make_context: MakeContext, records: Recorded, hub: FakeHub, part: str) -> None:
    burst = iter([Rejection(503)] * 3)
    hub.reject = lambda method, path: next(burst, None) if method == "GET" and part in path else None
    assert prepare(make_context(MODEL), records).model_revision == COMMIT
    assert next(burst, None) is None


@pytest.mark.parametrize("at", ["HEAD", "GET"])
def test_no_token_follows_a_download_to_another_host(
    make_context: MakeContext, records: Recorded, hub: FakeHub, tmp_path: Path, at: str
) -> None:
    """The real hub answers HEAD on a large file with its signed address."""
    hub.token = TOKEN
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text(TOKEN)
    content = weights(hub).read_bytes()
    with serve_proxy(FaultProxy("", host="127.0.0.2", rule=lambda _request: Fault(200, body=content))) as elsewhere:
        address = f"http://{elsewhere.address}/signed"
        if at == "HEAD":
            hub.elsewhere = lambda name: address if name == "model.safetensors" else None
        else:
            hub.reject = lambda method, path: (
                Rejection(302, location=address) if method == "GET" and path.endswith("/model.safetensors") else None
            )
        context = make_context({"model": {"source": "hf://acme/tiny", "tokenSecretRef": {"name": "hub"}}})
        record = prepare(context, records)
    require_made_of(context, record, content)
    assert hub.tokens == {TOKEN}
    assert elsewhere.lines("GET") == ["/signed"]
    assert not any(TOKEN in str(request.headers) for request in elsewhere.seen)


def test_a_stalled_transfer_is_resumed(
    make_context: MakeContext, records: Recorded, hub: FakeHub, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    save_file(large_weights(weights(hub).parent), weights(hub))
    stalls = iter([Fault(cut=15 * 10**6, stall=True)])
    proxy.rule = lambda request: next(stalls, None) if of_weights(request) else None
    context = make_context(MODEL)
    record = prepare(context, records)
    assert hub.ranges == [f"model.safetensors bytes={DOWNLOAD_CHUNK_SIZE}-"]
    require_made_of(context, record, weights(hub).read_bytes())


@pytest.mark.parametrize("more", [-10, 10])
def test_a_file_of_another_size_than_listed_is_loaded_again(
    make_context: MakeContext, records: Recorded, hub: FakeHub, more: int
) -> None:
    size = weights(hub).stat().st_size
    hub.pointers[weights(hub)] = {"sha256": "0" * 64, "size": size + more}
    message = rejection(make_context, records, ExitCode.UNREACHABLE)
    assert (
        f"model.safetensors arrived with {size} bytes, but the hub lists {size + more}: it is downloaded again"
        in message
    )
    hub.pointers.clear()
    assert prepare(make_context(MODEL), records).model_revision == COMMIT
