"""Promises of a published folder in every store: in good weather, and for each fault of its server."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
from huggingface_hub import constants

from qlora_api.contract import ExitCode
from qlora_api.sources import parse_source
from qlora_client.files.adapter import copy_published
from qlora_client.files.published import ADAPTER, DamagedError
from qlora_client.files.stores import open_store
from qlora_client.kube.errors import ClusterError
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.stores import bucket, registry_auth
from qlora_trainer.stores.contents import describe_files
from tests.support.failures import failing
from tests.support.runs.published import MANIFEST, rejected
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.support.services.stores import CLAIM, FIELD, Profile, Store, bytes_of, let_retry, of, writes

OTHER = MANIFEST.model_copy(update={"job_uid": "two"})
CONFIG = "adapter_config.json"
NO_KEYS = Secret(Path("/nowhere"), FIELD, None)
CONFIGURATION, UNREACHABLE = ExitCode.BAD_CONFIGURATION, ExitCode.UNREACHABLE


SCHEMES = ("s3", "gs", "az", "oci", "hf")
BUCKETS, SERVED, ALL = of(*SCHEMES[:3]), of(*SCHEMES), of("pvc", *SCHEMES)


def fair(_request: Request) -> None:
    """No fault."""


# Publishing


@ALL
def test_a_folder_is_published_whole_and_once(store: Store) -> None:
    address = store.publish()
    assert address.startswith(store.uri)
    found = store.stored()
    manifest = json.loads(found.pop("manifest.json"))
    assert found == bytes_of(store.contents)
    assert (manifest["jobUid"], set(manifest["files"])) == ("one", set(store.contents))
    before = store.uploads()
    assert store.publish() == address
    assert store.uploads() == before


@BUCKETS
def test_only_objects_that_differ_are_written_and_the_manifest_last(store: Store) -> None:
    store.publish()
    assert store.uploads() == [*store.contents, "manifest.json"]
    store.proxy.seen.clear()
    store.put("README.md", b"# Tinu\n")
    store.publish()
    assert store.uploads() == ["README.md", "manifest.json"]


@SERVED
@pytest.mark.parametrize("fault", [Fault(503), Fault(drop=True)], ids=["an error", "no answer"])
def test_an_interrupted_publication_continues_and_sends_nothing_again(store: Store, fault: Fault) -> None:
    """The server fails from the n-th upload on, for each n."""
    store.publish()
    uploads = len(store.uploads())
    for done in range(uploads):
        store = store.renamed(f"{store.name[:8]}-{done}")

        def rule(request: Request, store: Store = store, done: int = done) -> Fault | None:
            return fault if store.uploaded(request) and len(store.uploads()) > done else None

        store.proxy.rule = rule
        rejected(store.publish, UNREACHABLE)
        store.proxy.rule = fair
        assert "manifest.json" not in store.stored()
        store.proxy.seen.clear()
        store.publish()
        assert len(store.uploads()) == uploads - done
        assert {name: store.stored()[name] for name in store.contents} == bytes_of(store.contents)


@of("pvc", "s3", "gs", "az", "hf")
@pytest.mark.parametrize("name", [ADAPTER, "README.md"])
def test_a_damaged_file_is_replaced(store: Store, name: str) -> None:
    """An artifact of a registry is another one then."""
    store.publish()
    whole = store.stored()
    store.put(name, whole[name][:-1] + b"?")
    store.publish()
    assert store.stored() == whole


@pytest.mark.parametrize(
    ("store", "name"),
    [
        *((scheme, name) for scheme in SCHEMES for name in (ADAPTER, "README.md")),
        *((scheme, "manifest.json") for scheme in SCHEMES if scheme != "oci"),
    ],
    indirect=["store"],
)
def test_files_that_do_not_read_back_are_not_reported_as_published(store: Store, name: str) -> None:
    """The store says that it has them, with the right size."""
    store.proxy.rule = lambda request: Fault(corrupt=store.reads(request, name))
    message = rejected(store.publish, UNREACHABLE)
    assert name in message
    assert "does not read back as" in message
    store.proxy.rule = fair
    store.publish()
    assert bytes_of(store.contents).items() <= store.stored().items()


@SERVED
@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503, None])
def test_a_denied_upload_is_permanent_and_one_that_fails_is_not(store: Store, status: int | None) -> None:
    fault = Fault(drop=True) if status is None else Fault(status)
    store.proxy.rule = lambda request: fault if writes(request) else None
    if status in (401, 403, 404):
        message = rejected(store.publish, CONFIGURATION)
        assert "may not be written with the " in message
        assert f"{FIELD} (HTTP {status}" in message
    else:
        rejected(store.publish, UNREACHABLE)
    store.proxy.rule = fair
    store.publish()


@SERVED
def test_credentials_for_reading_only_are_rejected_before_publication(store: Store) -> None:
    destination = store.destination()
    destination.require_writable()
    assert store.stored() == {}
    assert destination.is_free()
    store.forbid_writing()
    with failing(CONFIGURATION, FIELD):
        destination.require_writable()


@SERVED
def test_without_a_secret_nothing_is_signed(store: Store) -> None:
    """No metadata service gets a request for the node's credentials either."""
    with failing(CONFIGURATION, "with no ", FIELD):
        store.publish(secret=NO_KEYS)
    given = [{name.lower(): value.strip() for name, value in request.headers.items()} for request in store.proxy.seen]
    assert given
    assert {headers.get("authorization", "") for headers in given} <= {"", "Bearer"}


@SERVED
def test_a_missing_secret_is_waited_for(store: Store) -> None:
    with failing(UNREACHABLE) as failure:
        store.destination(store.secret({}))
    assert failure.value.message == f"Secret 'store' with {store.keys} ({FIELD}) does not exist in the job's namespace"


# Other publishers


@ALL
def test_the_adapter_of_another_job_is_never_replaced(store: Store) -> None:
    address = store.publish()
    before = store.stored()
    message = rejected(store.publish, CONFIGURATION, OTHER)
    assert f"the destination {store.uri} holds another adapter, of job 'tiny' (UID one" in message
    assert store.stored() == before
    assert store.publish() == address


@ALL
def test_foreign_files_are_never_replaced(store: Store) -> None:
    store.put("thesis.tex", b"years of work")
    assert "has files that no QLoRAJob published" in rejected(store.publish, CONFIGURATION)
    assert store.stored() == {"thesis.tex": b"years of work"}


@SERVED
def test_the_adapter_of_a_job_that_was_faster_is_never_replaced(store: Store) -> None:
    """Both found the folder free; the other one publishes before this one's first upload."""
    published: list[str] = []

    def overtake(request: Request) -> None:
        if writes(request) and not published:
            store.proxy.rule = fair
            published.append(store.publish())

    store.proxy.rule = overtake
    message = rejected(store.publish, CONFIGURATION, OTHER)
    assert f"the destination {store.uri} holds another adapter, of job 'tiny' (UID one" in message
    assert [store.publish()] == published
    assert {name: store.stored()[name] for name in store.contents} == bytes_of(store.contents)


@of("s3", "gs", "az", "hf")
def test_a_statement_about_earlier_files_is_not_kept(store: Store) -> None:
    store.publish()
    store.put("lineage.intoto.json", b"{}")
    store.put("notes.txt", b"of another user")
    store.publish(MANIFEST.model_copy(update={"spec_sha256": "c" * 64}))
    assert set(store.stored()) == {*store.contents, "manifest.json", "notes.txt"}


@pytest.mark.parametrize(
    ("store", "name"),
    [*((scheme, name) for scheme in SCHEMES[:3] for name in ("manifest.json", CLAIM)), ("hf", "manifest.json")],
    indirect=["store"],
)
def test_a_manifest_that_is_too_large_is_not_fetched(store: Store, name: str) -> None:
    """Any client that may write there can put it. A bucket shows its size as the answer begins, the hub before."""
    store.put(name, MANIFEST.text())
    assert store.destination().holders() == (MANIFEST,)
    store.put(name, MANIFEST.text() + b" " * 2**23)
    store.proxy.rule = lambda request: Fault(cut=2**20) if store.reads(request, name) else None
    store.proxy.seen.clear()
    assert store.destination().holders() == ()
    fetched = [request for request in store.proxy.seen if store.reads(request, name)]
    assert len(fetched) == (not store.uri.startswith("hf://"))


# Reading


def download(store: Store, name: str) -> bytes:
    """The file as the prepare step downloads it."""
    path = store.root / "arrived" / name
    path.parent.mkdir(exist_ok=True)
    store.open().files()[name].download(path, lambda _: None)
    return path.read_bytes()


@SERVED
@pytest.mark.parametrize("place", ["the list", "a file"])
def test_a_burst_of_errors_is_outlasted(store: Store, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    store.publish()
    let_retry(monkeypatch, 4)
    burst = iter([Fault(503), Fault(429), Fault(503)] + [Fault(drop=True)] * (place == "a file"))
    store.proxy.rule = lambda request: (
        next(burst, None) if place == "the list" or store.reads(request, CONFIG) else None
    )
    assert download(store, CONFIG) == b"{}"
    assert next(burst, None) is None


@SERVED
@pytest.mark.parametrize("status", [401, 403, 404, 410, 429, 500, 503, None])
def test_a_denied_download_is_permanent_and_one_that_fails_is_not(store: Store, status: int | None) -> None:
    store.publish()
    fault = Fault(drop=True) if status is None else Fault(status)
    store.proxy.rule = lambda request: fault if store.reads(request, CONFIG) else None
    is_denied = status in (401, 403, 404, 410)
    with failing(ExitCode.MODEL_UNAVAILABLE if is_denied else UNREACHABLE) as failure:
        download(store, CONFIG)
    assert not is_denied or f"HTTP {status}" in failure.value.message
    store.proxy.rule = fair
    assert download(store, CONFIG) == b"{}"


def begin(request: Request) -> int:
    """The first byte that the request asks for."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    return int(headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))


@SERVED
@pytest.mark.parametrize("fault", [Fault(cut=6 * 10**6), Fault(cut=6 * 10**6, stall=True)], ids=["cut", "stalled"])
def test_a_transfer_that_ends_early_is_resumed(store: Store, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """By the hub's client within the attempt, and by ours in the next one."""
    store.publish()
    store.proxy.rule = lambda request: fault if store.reads(request, ADAPTER) and begin(request) == 0 else None
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**20)
    codes = set()
    arrived, seconds = b"", 0.2  # A busy machine may answer late: each attempt has twice the time.
    while not arrived and seconds < 60:
        monkeypatch.setattr(bucket, "STALLED", timedelta(seconds=seconds))
        monkeypatch.setattr(registry_auth, "_TIMEOUTS", (10, seconds))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", seconds)
        try:
            arrived = download(store, ADAPTER)
        except StepFailure as failure:
            codes.add(failure.exit_code)
        seconds *= 2
    assert codes <= {UNREACHABLE}
    assert arrived == bytes_of(store.contents)[ADAPTER]
    assert begin([request for request in store.proxy.seen if store.reads(request, ADAPTER)][-1]) > 0
    assert not [*(store.root / "arrived").glob("*.partial")]


@pytest.mark.parametrize(
    ("store", "name"), [("s3", CONFIG), ("gs", CONFIG), ("oci", CONFIG), ("hf", ADAPTER)], indirect=["store"]
)
def test_content_that_arrives_changed_is_downloaded_again(store: Store, name: str) -> None:
    """The length is right. Azure's store has no digest that the client could compare."""
    store.publish()
    faults = iter([Fault(corrupt=True)])
    store.proxy.rule = lambda request: next(faults, None) if store.reads(request, name) else None
    with failing(UNREACHABLE, "another", "is downloaded again"):
        download(store, name)
    assert download(store, name) == bytes_of(store.contents)[name]


@SERVED
def test_a_file_of_another_size_than_listed_is_downloaded_again(store: Store) -> None:
    store.publish()
    size = len(bytes_of(store.contents)[ADAPTER])
    store.proxy.rule = lambda request: Fault(missing=10 * store.reads(request, ADAPTER))
    with failing(UNREACHABLE, str(size - 10), str(size)):
        download(store, ADAPTER)
    store.proxy.rule = fair
    assert download(store, ADAPTER) == bytes_of(store.contents)[ADAPTER]


@BUCKETS
def test_an_object_that_is_replaced_while_it_is_read_is_read_anew(store: Store) -> None:
    """Parts of both are never put together. A commit and a digest have one content."""
    store.publish()
    whole = bytes_of(store.contents)[ADAPTER]
    cuts = iter([Fault(cut=6 * 10**6)])
    store.proxy.rule = lambda request: next(cuts, None) if store.reads(request, ADAPTER) else None
    with failing(UNREACHABLE):
        download(store, ADAPTER)

    def replace_it(request: Request) -> None:
        if store.reads(request, ADAPTER):
            store.put(ADAPTER, whole[:-1] + b"2")

    store.put(ADAPTER, whole[:-1] + b"1")
    store.proxy.rule = replace_it
    with failing(UNREACHABLE, f"{ADAPTER} was replaced while it was read: it is downloaded again"):
        download(store, ADAPTER)
    store.proxy.rule = fair
    assert download(store, ADAPTER) == whole[:-1] + b"2"


# Credentials


@SERVED
@pytest.mark.parametrize("is_reading", [True, False], ids=["reading", "writing"])
def test_no_credential_follows_a_redirect(store: Store, is_reading: bool) -> None:
    def is_redirected(request: Request) -> bool:
        return store.reads(request, CONFIG) if is_reading else "authorization" in map(str.lower, request.headers)

    if is_reading:
        store.publish()
    with serve_proxy(FaultProxy("", host="127.0.0.2", rule=lambda _request: Fault(404, body=b"{}"))) as elsewhere:
        there = Fault(307, {"Location": f"http://{elsewhere.address}/place"})
        store.proxy.rule = lambda request: there if is_redirected(request) else None
        with pytest.raises(StepFailure):
            download(store, CONFIG) if is_reading else store.publish()
    assert not any("authorization" in map(str.lower, request.headers) for request in elsewhere.seen)
    sent = [f"{request.path} {request.headers}" for request in elsewhere.seen]
    assert not any(value in text for text in sent for value in store.credentials.values())


def fetch(store: Store, profile: Profile, target: Path) -> None:
    """Download as `qlora adapter` does."""
    sha256 = describe_files(store.contents)[ADAPTER].sha256
    with open_store(parse_source(store.uri), profile) as folder:
        copy_published(folder, store.uri, sha256, target, lambda _done, _all: None)


@SERVED
def test_a_user_downloads_an_adapter_from_the_servers_of_the_own_environment(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish()
    for name in store.place:
        monkeypatch.delenv(name)
    with pytest.raises(ClusterError, match="does not exist, or may not be read with ") as denied:
        fetch(store, store.profile, tmp_path / "adapter")
    assert store.login in str(denied.value)
    store.log_in(monkeypatch)
    store.proxy.seen.clear()
    if store.place:
        with pytest.raises(ClusterError, match=r"your credentials may be for another server: set [A-Z_]+=") as unnamed:
            fetch(store, store.profile, tmp_path / "adapter")
        assert all(f"{name}={value}" in str(unnamed.value) for name, value in store.place.items())
        assert store.proxy.seen == []
    for name, value in store.place.items():
        monkeypatch.setenv(name, value)
    # A right to read objects, and none to list them.
    store.proxy.rule = lambda request: Fault(403) if "list-type" in request.path else None
    fetch(store, store.profile, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == store.stored()


@of("s3", "gs", "az", "hf")
def test_a_user_gets_no_file_that_was_changed_after_it_was_published(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.log_in(monkeypatch)
    store.publish()
    store.put(CONFIG, b"[]")
    with pytest.raises(DamagedError, match=r"adapter_config.json is damaged"):
        fetch(store, {}, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
