"""An adapter is served if it is the one that its name, its job's key and the server's base demand, and no other is."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from qlora_api.channel import AdapterName, parse_adapter_name
from qlora_cli import verification
from qlora_cli.verification import Adapter, NotVerified
from qlora_trainer.core.failures import StepFailure
from qlora_vllm.cache import provide, remove_partials
from qlora_vllm.layout import Layout
from qlora_vllm.served_base import ServedBase, served_base
from tests.support.signed_adapter import (
    BASE_REVISION,
    BASE_SHA256,
    WEIGHTS,
    WEIGHTS_FILE,
    digest,
    public_pem,
    signed_statement,
    write_signed_adapter,
)

NAME = AdapterName(namespace="team", job="bot", sha256=digest(WEIGHTS))
MEASURED = ServedBase(sha256=BASE_SHA256)


@dataclass(frozen=True)
class Pod:
    """The plugin's folders, with the adapter of the job `bot` on the claim `adapters`."""

    layout: Layout

    @property
    def adapter(self) -> Path:
        return self.layout.claims / "adapters" / "bot"

    def announce(self, uri: str = "pvc://adapters/bot", sha256: str = NAME.sha256, namespace: str = "team") -> None:
        folder = self.layout.records / namespace
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bot.json").write_text(json.dumps({"name": "bot", "uri": uri, "digest": f"sha256:{sha256}"}))

    def trust(self, namespace: str = "team", pem: bytes | None = None) -> None:
        file = self.layout.key(namespace)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(public_pem() if pem is None else pem)

    def provide(self, name: AdapterName = NAME, base: ServedBase = MEASURED, max_rank: int = 16) -> Path:
        return provide(self.layout, base, max_rank, name)


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    pod = Pod(Layout(tmp_path))
    write_signed_adapter(pod.adapter)
    pod.announce()
    pod.trust()
    return pod


def test_a_signed_adapter_is_copied_to_a_read_only_path_of_its_content(pod: Pod) -> None:
    folder = pod.provide()
    assert (folder / WEIGHTS_FILE).read_bytes() == WEIGHTS
    assert folder.name == NAME.sha256
    assert {oct(path.stat().st_mode & 0o222) for path in (folder, *folder.iterdir())} == {"0o0"}
    # Another content at the address, later, changes nothing for the server.
    (pod.adapter / WEIGHTS_FILE).write_bytes(b"replaced")
    assert (pod.provide() / WEIGHTS_FILE).read_bytes() == WEIGHTS


def foreign_key(pod: Pod) -> None:
    pod.trust(pem=public_pem(Ed25519PrivateKey.generate()))


def no_key(pod: Pod) -> None:
    pod.layout.key("team").unlink()


def unsigned(pod: Pod) -> None:
    (pod.adapter / "lineage.sigstore.json").unlink()


def changed_weights(pod: Pod) -> None:
    (pod.adapter / WEIGHTS_FILE).write_bytes(b"others")


def changed_configuration(pod: Pod) -> None:
    (pod.adapter / "adapter_config.json").write_text('{"r": 16, "lora_alpha": 9999}')


def added_file(pod: Pod) -> None:
    (pod.adapter / "tokenizer.json").write_text("{}")


def linked_weights(pod: Pod) -> None:
    (pod.adapter / WEIGHTS_FILE).rename(pod.adapter.parent / "elsewhere")
    (pod.adapter / WEIGHTS_FILE).symlink_to(pod.adapter.parent / "elsewhere")


def of_another_job(pod: Pod) -> None:
    shutil.rmtree(pod.adapter)
    write_signed_adapter(pod.adapter, job="other")


def of_another_namespace(pod: Pod) -> None:
    shutil.rmtree(pod.adapter)
    write_signed_adapter(pod.adapter, namespace="other")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (foreign_key, "no signature is of this key"),
        (no_key, "this server has no key of the namespace team"),
        (unsigned, "has no signed lineage"),
        (changed_weights, f"{WEIGHTS_FILE} has SHA-256"),
        (changed_configuration, "adapter_config.json has SHA-256"),
        (added_file, "does not state tokenizer.json"),
        (linked_weights, f"{WEIGHTS_FILE} is missing"),
        (of_another_job, "has the adapter of job other in the namespace team"),
        (of_another_namespace, "has the adapter of job bot in the namespace other"),
    ],
)
def test_an_adapter_that_is_not_what_its_name_says_is_not_served(
    pod: Pod, change: Callable[[Pod], None], why: str
) -> None:
    change(pod)
    with pytest.raises(NotVerified, match=why):
        pod.provide()
    assert not [path for path in pod.layout.cache.rglob("*") if path.is_file()]


def test_an_adapter_of_another_base_or_of_too_high_a_rank_is_not_served(pod: Pod) -> None:
    with pytest.raises(NotVerified, match=rf"base with SHA-256 {BASE_SHA256}, and this server has a{{64}}"):
        pod.provide(base=ServedBase(sha256="a" * 64))
    with pytest.raises(NotVerified, match=rf"base of revision {BASE_REVISION}, and this server has 1{{40}}"):
        pod.provide(base=ServedBase(revision="1" * 40))
    with pytest.raises(NotVerified, match=r"its rank is 16, and this server allows 8 \(--max-lora-rank\)"):
        pod.provide(max_rank=8)
    assert pod.provide(base=ServedBase(revision=BASE_REVISION)).is_dir()


def test_a_kept_adapter_that_was_damaged_is_fetched_again(pod: Pod) -> None:
    file = pod.provide() / WEIGHTS_FILE
    file.chmod(0o644)
    file.write_bytes(b"damaged")
    assert (pod.provide() / WEIGHTS_FILE).read_bytes() == WEIGHTS


def test_another_servers_base_or_key_counts_for_a_kept_adapter_too(pod: Pod) -> None:
    pod.provide()
    with pytest.raises(NotVerified, match="this server allows 8"):
        pod.provide(max_rank=8)
    foreign_key(pod)
    with pytest.raises(NotVerified, match="no signature is of this key"):
        pod.provide()


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("pvc://elsewhere/bot", "the claim elsewhere is not mounted"),
        ("pvc://adapters/out", "outside of its volume"),
        ("pvc://adapters/../../keys", "is not an address"),
        ("ftp://host/bot", "is not an address"),
    ],
)
def test_an_address_that_cannot_be_read_is_an_error(pod: Pod, uri: str, why: str) -> None:
    (pod.layout.claims / "adapters" / "out").symlink_to(pod.layout.root)
    pod.announce(uri)
    with pytest.raises((ValueError, StepFailure), match=why):
        pod.provide()


def test_an_adapter_without_an_address_is_an_error(pod: Pod) -> None:
    pod.announce(sha256="1" * 64)
    with pytest.raises(ValueError, match="neither an entry of the job bot nor a channel in"):
        pod.provide()
    pod.trust("other")
    with pytest.raises(ValueError, match="records/other has the address"):
        pod.provide(AdapterName(namespace="other", job="bot", sha256=NAME.sha256))
    (pod.layout.records / "team" / "bot.json").write_text("[]")
    with pytest.raises(ValueError, match="is no entry of"):
        pod.provide()


def test_the_statement_of_an_artifact_stays_with_its_files(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry has it next to the files, and the server may restart without the registry."""
    pod.announce("oci://registry.example.org/team/bot:v1")
    files = {path.name: digest(path.read_bytes()) for path in pod.adapter.iterdir() if "lineage" not in path.name}
    own = signed_statement({**files, "oci://registry.example.org/team/bot": "f" * 64})

    def downloaded(_address: str, folder: Path, _most: int | None) -> Adapter:
        for name in files:
            shutil.copyfile(pod.adapter / name, folder / name)
        others = signed_statement({"oci://registry.example.org/team/other": "e" * 64})
        return Adapter(folder, (others, own), (), "f" * 64)

    monkeypatch.setattr("qlora_vllm.cache.download", downloaded)
    folder = pod.provide()
    monkeypatch.delattr("qlora_vllm.cache.download")
    assert pod.provide() == folder


def test_a_larger_adapter_than_the_room_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        location, version = "s3://bucket/bot", "1"
        sizes = {WEIGHTS_FILE: 2**20}  # noqa: RUF012 - as the protocol has it

        def fetch(self, *_: object) -> None:
            raise AssertionError("downloaded")

    monkeypatch.setattr("qlora_trainer.model.source.downloads.open_remote_model", lambda *_: Large())
    with pytest.raises(OSError, match="has 1,048,576 bytes, and there is room for 1,000"):
        verification.download("s3://bucket/bot", tmp_path, 1000)


def test_what_a_killed_server_has_begun_to_download_is_removed(pod: Pod) -> None:
    kept = pod.provide()
    begun = pod.layout.cache / ".partial-1"
    begun.mkdir()
    remove_partials(pod.layout)
    assert kept.is_dir()
    assert not begun.exists()


@pytest.mark.parametrize(
    "name",
    [
        "bot",
        "team/bot",
        f"team/bot@{NAME.sha256}",
        f"team/bot@sha256:{NAME.sha256[:12]}",
        f"../bot@sha256:{NAME.sha256}",
        f"team/../bot@sha256:{NAME.sha256}",
        f"team/bot@sha256:{NAME.sha256}\n",
    ],
)
def test_only_the_name_of_one_adapter_for_ever_is_one(name: str) -> None:
    with pytest.raises(ValueError, match="names of adapters are NAMESPACE/JOB@sha256:DIGEST"):
        parse_adapter_name(name)
    assert parse_adapter_name(f"team/bot@sha256:{NAME.sha256}") == NAME


def published(folder: Path, uid: str) -> str:
    manifest = {"jobUid": uid, "jobName": "", "fingerprint": BASE_SHA256, "specSha256": "", "baseModel": "hf://org/m"}
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"baseRevision": "r", "libraries": {}, "files": {}}))
    return str(folder)


def test_a_server_on_a_published_base_needs_no_setting(tmp_path: Path) -> None:
    for uid in ("base", "base-bfloat16"):
        assert served_base(published(tmp_path / uid, uid), None, None) == ServedBase(sha256=BASE_SHA256)


def test_another_base_is_known_by_its_commit_or_by_the_stated_revision(tmp_path: Path) -> None:
    assert served_base("org/model", "1" * 40, None) == ServedBase(revision="1" * 40)
    assert served_base("/models/llama", None, "sha256:1") == ServedBase(revision="sha256:1")
    for model, revision in (("org/model", None), ("org/model", "main"), (published(tmp_path / "adapter", "u"), None)):
        with pytest.raises(ValueError, match=r"which adapters fit .* is not known: serve a base that"):
            served_base(model, revision, None)
