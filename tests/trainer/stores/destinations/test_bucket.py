"""Adapters published to an object store: whole, verified, once, and without overwriting others."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_api.contract import ExitCode
from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.model.adapter.merge import write_merged
from qlora_trainer.publishing import merged_model as publish_merged
from qlora_trainer.steps.publish import publish as publish_step
from qlora_trainer.stores import bucket as store_settings
from qlora_trainer.stores.contents import SHARED_BASE, Contents, Manifest, PublishedFile, describe_files
from qlora_trainer.stores.destinations.bucket import ObjectDestination
from qlora_trainer.stores.destinations.destination import publish_folder
from qlora_trainer.stores.objects import ObjectFolder
from tests.support.commands.command import Files
from tests.support.models.tiny import Recorded
from tests.support.runs.published import MANIFEST, Publish, rejected
from tests.support.servers import ACCESS_KEY, BUCKET, SECRET_KEY, s3_bucket
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.support.training import prepared, run


@pytest.fixture
def bucket(s3: str) -> S3Store:
    store = s3_bucket(s3)
    for page in obstore.list(store):
        obstore.delete(store, [entry["path"] for entry in page])
    return store


@pytest.fixture
def store(s3: str, bucket: S3Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The object store of the profile, empty, behind a proxy."""
    monkeypatch.setattr(store_settings, "RETRY", {"max_retries": 0})
    with serve_proxy(FaultProxy(s3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        yield proxy


@pytest.fixture
def publish(tmp_path: Path, store: FaultProxy, contents: Contents) -> Publish:
    """Publishes the adapter to s3://team/adapters/tiny."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "AWS_ACCESS_KEY_ID").write_text(ACCESS_KEY)
    (credentials / "AWS_SECRET_ACCESS_KEY").write_text(SECRET_KEY)
    secret = Secret(credentials, "spec.output.secretRef", "store")
    files = describe_files(contents)

    def run(manifest: Manifest = MANIFEST) -> str:
        destination = ObjectDestination(ObjectStoreSource(BUCKET, "adapters/tiny"), secret)
        return publish_folder(destination, contents, manifest.model_copy(update={"files": files}))

    return run


def stored(bucket: S3Store) -> dict[str, bytes]:
    """Everything in the bucket."""
    names = [entry["path"] for page in obstore.list(bucket) for entry in page]
    return {name: bytes(obstore.get(bucket, name).bytes()) for name in names}


def pulled(bucket: S3Store, path: str, folder: Path) -> Path:
    """`folder`, with the objects under a path of the bucket."""
    folder.mkdir()
    for name, content in stored(bucket).items():
        (folder / name.removeprefix(f"{path}/")).write_bytes(content)
    return folder


def written(store: FaultProxy) -> list[str]:
    """Names of the objects whose upload has started, in order."""
    begun = [request for request in store.seen if request.method == "PUT" and "partNumber" not in request.path]
    begun += [request for request in store.seen if request.method == "POST" and "?uploads" in request.path]
    begun.sort(key=store.seen.index)
    return [request.path.partition("?")[0].removeprefix(f"/{BUCKET}/adapters/tiny/") for request in begun]


def test_credentials_without_write_access_are_rejected_and_nothing_is_left(
    publish: Publish, store: FaultProxy, bucket: S3Store, tmp_path: Path
) -> None:
    secret = Secret(tmp_path / "credentials", "spec.output.secretRef", "store")
    destination = ObjectDestination(ObjectStoreSource(BUCKET, "adapters/tiny"), secret)
    destination.require_writable()
    assert stored(bucket) == {}
    store.rule = lambda request: Fault(403) if request.method == "PUT" else None
    with pytest.raises(StepFailure) as failure:
        destination.require_writable()
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    # A check that was killed half way occupies nothing.
    obstore.put(bucket, "adapters/tiny/.write-check", b"")
    assert destination.is_free()


def test_the_files_are_stored_under_their_names_and_the_manifest_is_written_last(
    publish: Publish, store: FaultProxy, bucket: S3Store, contents: Contents
) -> None:
    assert publish() == "s3://team/adapters/tiny"
    found = stored(bucket)
    manifest = json.loads(found.pop("adapters/tiny/manifest.json"))
    assert found == {
        f"adapters/tiny/{name}": content if isinstance(content, bytes) else content.read_bytes()
        for name, content in contents.items()
    }
    assert manifest["jobUid"] == "one"
    assert written(store) == [".manifest.partial.json", *contents, "manifest.json"]


def test_publishing_again_writes_nothing(publish: Publish, store: FaultProxy) -> None:
    publish()
    store.seen.clear()
    publish()
    assert written(store) == []


@pytest.mark.parametrize("place", range(1, 5))
def test_an_interrupted_upload_continues_without_resending_objects(
    publish: Publish, store: FaultProxy, bucket: S3Store, contents: Contents, place: int
) -> None:
    """The store fails from the `place`-th object on."""
    names = [".manifest.partial.json", *contents, "manifest.json"]
    failing = set(names[place:])

    def rule(request: Request) -> Fault | None:
        ends = request.path.partition("?")[0].rpartition("/")[2]
        return Fault(503) if request.method in ("PUT", "POST") and ends in failing else None

    store.rule = rule
    rejected(publish, ExitCode.UNREACHABLE)
    assert "adapters/tiny/manifest.json" not in stored(bucket)
    store.rule = lambda _request: None
    store.seen.clear()
    publish()
    assert written(store) == [names[0], *names[place:]]
    assert sorted(stored(bucket)) == sorted(f"adapters/tiny/{name}" for name in names[1:])


def test_a_damaged_object_is_replaced(publish: Publish, store: FaultProxy, bucket: S3Store) -> None:
    publish()
    whole = stored(bucket)
    damaged = whole["adapters/tiny/adapter_model.safetensors"]
    obstore.put(bucket, "adapters/tiny/adapter_model.safetensors", damaged[:-1] + bytes([damaged[-1] ^ 1]))
    store.seen.clear()
    publish()
    assert stored(bucket) == whole
    assert "README.md" not in written(store)


def test_files_that_do_not_read_back_are_not_reported_as_published(
    publish: Publish, store: FaultProxy, bucket: S3Store
) -> None:
    """Size and ETag are right; a byte is not."""
    store.rule = lambda request: Fault(corrupt=request.method == "GET" and request.path.endswith("README.md"))
    message = rejected(publish, ExitCode.UNREACHABLE)
    assert "s3://team/adapters/tiny/README.md does not read back as it was written" in message
    assert "adapters/tiny/manifest.json" not in stored(bucket)


@pytest.mark.parametrize("finished", [True, False])
def test_the_adapter_of_another_job_is_never_replaced(
    publish: Publish, store: FaultProxy, bucket: S3Store, finished: bool
) -> None:
    if not finished:
        store.rule = lambda request: Fault(503 if request.path.endswith("README.md") else None)
        rejected(publish, ExitCode.UNREACHABLE)
        store.rule = lambda _request: None
    else:
        publish()
    before = stored(bucket)
    message = rejected(publish, ExitCode.BAD_CONFIGURATION, MANIFEST.model_copy(update={"job_uid": "two"}))
    assert "the destination s3://team/adapters/tiny holds another adapter, of job 'tiny' (UID one" in message
    assert stored(bucket) == before


TWO = MANIFEST.model_copy(update={"job_uid": "two"})
BASE = MANIFEST.model_copy(update={"job_uid": SHARED_BASE})
TOKENIZER = {"tokenizer.json": PublishedFile(sha256="c" * 64, size=1)}


@pytest.mark.parametrize(
    ("name", "other", "own", "words"),
    [
        (".manifest.partial.json", TWO, MANIFEST, "holds another adapter, of job 'tiny' (UID two"),
        (
            ".manifest.partial.json",
            BASE.model_copy(update={"files": TOKENIZER}),
            BASE,
            "holds this base with another tokenizer",
        ),
        ("manifest.json", TWO, MANIFEST, "holds another adapter, of job 'tiny' (UID two"),
    ],
    ids=["a claim", "a claim of a base", "a publication"],
)
def test_concurrent_jobs_do_not_mix(
    publish: Publish, store: FaultProxy, bucket: S3Store, name: str, other: Manifest, own: Manifest, words: str
) -> None:
    """The other job writes between this one's check of the free folder and its claim."""

    def rule(request: Request) -> Fault | None:
        if request.method == "PUT" and request.path.endswith(".manifest.partial.json"):
            obstore.put(bucket, f"adapters/tiny/{name}", other.text())
        return None

    store.rule = rule
    message = rejected(publish, ExitCode.BAD_CONFIGURATION, own)
    assert f"the destination s3://team/adapters/tiny {words}" in message
    assert stored(bucket) == {f"adapters/tiny/{name}": other.text()}


def test_foreign_objects_are_never_replaced(publish: Publish, bucket: S3Store) -> None:
    obstore.put(bucket, "adapters/tiny/thesis.tex", b"years of work")
    assert "has files that no QLoRAJob published" in rejected(publish, ExitCode.BAD_CONFIGURATION)
    assert stored(bucket) == {"adapters/tiny/thesis.tex": b"years of work"}


def test_a_store_without_conditional_writes_is_a_permanent_failure(publish: Publish, store: FaultProxy) -> None:
    store.rule = lambda request: Fault(501 if "if-none-match" in map(str.lower, request.headers) else None)
    assert "it must support conditional writes (If-None-Match)" in rejected(publish, ExitCode.BAD_CONFIGURATION)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_bucket_that_may_not_be_written_is_a_permanent_failure(
    publish: Publish, store: FaultProxy, status: int
) -> None:
    store.rule = lambda request: Fault(status if request.method == "PUT" else None)
    message = rejected(publish, ExitCode.BAD_CONFIGURATION)
    assert "may not be written with the credentials of spec.output.secretRef" in message


def test_the_step_publishes_with_the_credentials_of_its_secret(
    finished: Files, tmp_path: Path, store: FaultProxy, bucket: S3Store
) -> None:
    """The command of a pod; a server loads the files without renaming anything."""
    files = finished.copied(tmp_path / "job").with_spec({"output": {"destination": f"s3://{BUCKET}/tuned"}})
    done = files.run("publish", AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY)
    assert done.exit_code == 0, done.stdout + done.stderr
    adapter = done.result.adapter
    assert adapter is not None
    assert (adapter.uri, adapter.rank) == (f"s3://{BUCKET}/tuned", 4)
    folder = pulled(bucket, "tuned", tmp_path / "pulled")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert load_file(folder / "adapter_model.safetensors").keys()
    said = [done.stdout, done.stderr, done.termination]
    left = [path.read_bytes().decode(errors="replace") for path in files.root.rglob("*") if path.is_file()]
    for canary in (ACCESS_KEY, SECRET_KEY):
        assert not any(canary in text for text in (*said, *left))


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's credentials are those of this machine's user."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


def trained_with(output: str, folder: Path, model: Path) -> tuple[str, StepContext]:
    """The address of a further output of a job that is trained, and the job."""
    address = f"s3://{BUCKET}/{output}"
    context = prepared(folder / "workspace", model, {"output": {output: {"destination": address}}})
    run(context)
    return address, context


@pytest.mark.usefixtures("keys")
def test_a_merged_model_loads_from_the_store(
    tmp_path: Path, tiny_llama: Path, store: FaultProxy, bucket: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several files with an index, as larger ones are."""
    monkeypatch.setattr(publish_merged, "write_merged", partial(write_merged, shard_bytes=10**5))
    address, context = trained_with("merged", tmp_path, tiny_llama)
    record = publish_step(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    folder = pulled(bucket, "merged", tmp_path / "pulled")
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert len([*folder.glob("model-*-of-*.safetensors")]) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert record.merged is not None
    assert record.merged.uri == address
    assert record.merged.size_bytes == sum(parameter.nbytes for parameter in model.parameters())
    store.seen.clear()
    assert publish_step(context, Recorded(), now=lambda: datetime(2026, 1, 3, tzinfo=UTC)) == record
    assert written(store) == []


@pytest.mark.usefixtures("keys")
def test_a_base_loads_from_the_store_and_is_written_once(
    tmp_path: Path, tiny_llama: Path, store: FaultProxy, bucket: S3Store
) -> None:
    address, context = trained_with("base", tmp_path, tiny_llama)
    record = publish_step(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert record.base is not None
    assert record.base.uri == address
    _, report = AutoModelForCausalLM.from_pretrained(
        pulled(bucket, "base", tmp_path / "pulled"), output_loading_info=True
    )
    assert not {kind: names for kind, names in report.items() if names}
    store.seen.clear()
    context.workspace.completion("publish").unlink()
    assert publish_step(context, Recorded(), now=lambda: datetime(2026, 1, 3, tzinfo=UTC)) == record
    assert written(store) == []


@pytest.mark.usefixtures("keys")
def test_two_jobs_may_write_the_same_base_concurrently_from_mirrors(
    tmp_path: Path, tiny_llama: Path, store: FaultProxy, bucket: S3Store
) -> None:
    """The other job writes its manifest before this one reads back the one it wrote."""
    address, context = trained_with("base", tmp_path, tiny_llama)

    def rule(request: Request) -> Fault | None:
        own = stored(bucket).get("base/manifest.json")
        if own is not None and request.method == "GET" and request.path.endswith("base/manifest.json"):
            obstore.put(bucket, "base/manifest.json", json.dumps(json.loads(own) | {"baseModel": "hf://a/b"}).encode())
        return None

    store.rule = rule
    record = publish_step(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert record.base is not None
    assert record.base.uri == address
    assert json.loads(stored(bucket)["base/manifest.json"])["baseModel"] == "hf://a/b"


def test_a_folder_of_objects_is_listed_without_its_neighbors(
    bucket: S3Store, store: FaultProxy, tmp_path: Path
) -> None:
    obstore.put(bucket, "rows/a.jsonl", b"{}")
    obstore.put(bucket, "rows-of-others/b.jsonl", b"{}")
    for key, value in (("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY)):
        (tmp_path / key).write_text(value)
    secret = Secret(tmp_path, "spec.dataset.secretRef", "store")
    assert list(ObjectFolder(ObjectStoreSource(BUCKET, "rows"), secret, reject=bad_configuration).list()) == ["a.jsonl"]


def test_a_statement_about_earlier_files_is_not_kept(publish: Publish, bucket: S3Store) -> None:
    publish()
    obstore.put(bucket, "adapters/tiny/lineage.intoto.json", b"{}")
    obstore.put(bucket, "adapters/tiny/notes.txt", b"of somebody else")
    publish(MANIFEST.model_copy(update={"spec_sha256": "c" * 64}))
    assert "adapters/tiny/lineage.intoto.json" not in stored(bucket)
    assert "adapters/tiny/notes.txt" in stored(bucket)
