"""Adapters, merged models and bases in an object store: claims of folders, and what a server loads from there."""

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_api.contract import ExitCode
from qlora_trainer.model.architecture.dequantized_model import write_model
from qlora_trainer.publishing import merged_model as publish_merged
from qlora_trainer.steps.publish import publish
from qlora_trainer.stores.contents import SHARED_BASES, Manifest, PublishedFile
from tests.support.commands.command import Files
from tests.support.models.tiny import Recorded
from tests.support.runs.published import MANIFEST, rejected
from tests.support.servers import ACCESS_KEY, SECRET_KEY
from tests.support.services.fault_proxy import Fault, Request
from tests.support.services.stores import CLAIM, PROBE, Store, of
from tests.support.training import prepared, run

pytestmark = of("s3")
TWO = MANIFEST.model_copy(update={"job_uid": "two"})
BASE = MANIFEST.model_copy(update={"job_uid": SHARED_BASES["quantized"]})
OTHER_BASE = BASE.model_copy(update={"files": {"tokenizer.json": PublishedFile(sha256="c" * 64, size=1)}})


def test_a_check_that_was_killed_half_way_occupies_nothing(store: Store) -> None:
    store.put(PROBE, b"")
    assert store.destination().is_free()


def test_an_unfinished_adapter_of_another_job_is_never_replaced(store: Store) -> None:
    store.proxy.rule = lambda request: Fault(503 if request.path.endswith("README.md") else None)
    rejected(store.publish, ExitCode.UNREACHABLE)
    store.proxy.rule = lambda _request: None
    before = store.stored()
    message = rejected(store.publish, ExitCode.BAD_CONFIGURATION, TWO)
    assert f"{store.uri} holds another adapter, of job 'tiny' (UID one" in message
    assert store.stored() == before


@pytest.mark.parametrize(
    ("name", "other", "own", "words"),
    [
        (CLAIM, TWO, MANIFEST, "holds another adapter, of job 'tiny' (UID two"),
        (CLAIM, OTHER_BASE, BASE, "holds this base with another tokenizer"),
        ("manifest.json", TWO, MANIFEST, "holds another adapter, of job 'tiny' (UID two"),
    ],
    ids=["a claim", "a claim of a base", "a publication"],
)
def test_concurrent_jobs_do_not_mix(store: Store, name: str, other: Manifest, own: Manifest, words: str) -> None:
    """The other job writes between this one's check of the free folder and its claim."""

    def overtake(request: Request) -> None:
        if request.method == "PUT" and request.path.endswith(CLAIM):
            store.put(name, other.text())

    store.proxy.rule = overtake
    message = rejected(store.publish, ExitCode.BAD_CONFIGURATION, own)
    assert f"the destination {store.uri} {words}" in message
    assert store.stored() == {name: other.text()}


def test_a_store_without_conditional_writes_is_a_permanent_failure(store: Store) -> None:
    store.proxy.rule = lambda request: Fault(501 if "if-none-match" in map(str.lower, request.headers) else None)
    message = rejected(store.publish, ExitCode.BAD_CONFIGURATION)
    assert "it must support conditional writes (If-None-Match)" in message


def test_a_store_that_quotes_the_request_shows_no_key_of_it(trained: Files, store: Store) -> None:
    """As S3 does about an invalid key or signature. The keys are in the step's environment."""

    def quote(request: Request) -> Fault:
        return Fault(403, body=f"<Error><Code>Unknown</Code>{request.headers} {SECRET_KEY}</Error>".encode())

    store.proxy.rule = quote
    files = trained.with_spec({"output": {"destination": store.uri}})
    done = files.run("publish", **store.place, **store.credentials)
    left = [path.read_bytes().decode(errors="replace") for path in files.root.rglob("*") if path.is_file()]
    for key in store.credentials.values():
        assert not any(key in text for text in (done.stdout, done.stderr, done.termination, *left))
    assert (done.exit_code, "HTTP 403 (Unknown)" in done.result.message) == (ExitCode.BAD_CONFIGURATION, True)
    assert any(ACCESS_KEY in str(request.headers) for request in store.proxy.seen)


def test_a_folder_of_objects_is_listed_without_its_neighbors(store: Store) -> None:
    store.put("a.jsonl", b"{}")
    store.renamed(f"{store.name}-of-others").put("b.jsonl", b"{}")
    assert list(store.open().files()) == ["a.jsonl"]


def pulled(store: Store, folder: Path) -> Path:
    """`folder`, with the objects of the store's."""
    folder.mkdir()
    for name, content in store.stored().items():
        (folder / name).write_bytes(content)
    return folder


def require_complete(folder: Path) -> AutoModelForCausalLM:
    """The model of a folder, which has each of its weights and no other."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not {kind: names for kind, names in report.items() if names}
    return model


def test_an_adapter_a_merged_model_and_a_base_load_from_the_store(
    tmp_path: Path, tiny_llama: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is in several files, as larger ones are. Another job writes the same base, from a mirror."""
    monkeypatch.setattr(publish_merged, "write_model", partial(write_model, shard_bytes=10**5))
    store.log_in(monkeypatch)
    merged, base = store.renamed(f"{store.name}-merged"), store.renamed(f"{store.name}-base")
    output = {"destination": store.uri, "merged": {"destination": merged.uri}, "base": {"destination": base.uri}}
    context = prepared(tmp_path / "workspace", tiny_llama, {"output": output})
    run(context)

    def overtake(request: Request) -> None:
        """Before this job reads back the manifest that it has written."""
        if base.reads(request, "manifest.json") and (own := base.stored().get("manifest.json")) is not None:
            base.put("manifest.json", json.dumps(json.loads(own) | {"baseModel": "hf://a/b"}).encode())

    store.proxy.rule, records = overtake, Recorded()
    record = publish(context, records, now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert json.loads(base.stored()["manifest.json"])["baseModel"] == "hf://a/b"
    store.proxy.rule = lambda _request: None
    assert record.adapter.uri == store.uri
    assert record.merged is not None
    assert record.base is not None
    assert (record.merged.uri, record.base.uri) == (merged.uri, base.uri)
    folder = pulled(store, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert load_file(folder / "adapter_model.safetensors").keys()
    folder = pulled(merged, tmp_path / "merged")
    assert len([*folder.glob("model-*-of-*.safetensors")]) > 1
    assert record.merged.size_bytes == sum(weight.nbytes for weight in require_complete(folder).parameters())
    require_complete(pulled(base, tmp_path / "base"))

    left = [path.read_bytes() for path in context.workspace.root.rglob("*") if path.is_file()]
    for key in (ACCESS_KEY, SECRET_KEY):
        assert not any(key.encode() in content for content in (*left, records.stream.getvalue().encode()))
    store.proxy.seen.clear()
    context.workspace.completion("publish").unlink()
    assert publish(context, Recorded(), now=lambda: datetime(2026, 1, 3, tzinfo=UTC)) == record
    assert store.uploads() == merged.uploads() == base.uploads() == []
