"""An adapter appears complete and as in the status, or not at all."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qlora_client.files import adapter as adapter_module
from qlora_client.files.adapter import copy_published, download_adapter
from qlora_client.files.published import ADAPTER, MANIFEST, DamagedError, OnBytes, PublishedFile
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError, RejectedError

WEIGHTS = b"weights" * 1000
CONTENTS = {ADAPTER: WEIGHTS, "adapter_config.json": b"{}", "README.md": b"# card"}


def described(content: bytes) -> dict[str, object]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def manifest(contents: Mapping[str, bytes] = CONTENTS) -> bytes:
    return json.dumps({"files": {name: described(content) for name, content in contents.items()}}).encode()


SHA256 = str(described(WEIGHTS)["sha256"])


@dataclass
class Stored:
    """A folder somewhere."""

    contents: dict[str, bytes] = field(default_factory=lambda: {**CONTENTS, MANIFEST: manifest()})
    interrupt: bool = False

    def read(self, name: str, most: int) -> bytes:
        return self.contents[name]

    def fetch(self, files: Mapping[str, PublishedFile], into: Path, on_bytes: OnBytes) -> None:
        for name in files:
            if self.interrupt:
                raise KeyboardInterrupt
            if name in self.contents:
                (into / name).write_bytes(self.contents[name])
                on_bytes(len(self.contents[name]))


def copy(stored: Stored, target: Path) -> None:
    copy_published(stored, "s3://team/a", SHA256, target, lambda _done, _all: None)


def test_the_folder_has_every_file_of_the_manifest(tmp_path: Path) -> None:
    copy(Stored(), tmp_path / "new" / "adapter")
    found = {path.name: path.read_bytes() for path in (tmp_path / "new" / "adapter").iterdir()}
    assert found == {**CONTENTS, MANIFEST: manifest()}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({ADAPTER: WEIGHTS[:-1] + b"x"}, f"s3://team/a/{ADAPTER} is damaged"),
        ({ADAPTER: WEIGHTS[:-1]}, f"{ADAPTER} is damaged: it has 6999 bytes"),
        ({"adapter_config.json": b"[]"}, "adapter_config.json is damaged"),
        ({"adapter_config.json": None}, "adapter_config.json is missing"),
        ({MANIFEST: manifest({**CONTENTS, ADAPTER: b"other"})}, "has another adapter: .* the job's status"),
        ({MANIFEST: manifest({"README.md": b"x"})}, "lists no adapter_model.safetensors"),
        ({MANIFEST: manifest({**CONTENTS, "../.bashrc": b"x"})}, "'../.bashrc', which is no name"),
        ({MANIFEST: manifest({**CONTENTS, ".bashrc": b"x"})}, "'.bashrc', which is no name"),
        ({MANIFEST: manifest({**CONTENTS, MANIFEST: b"x"})}, "'manifest.json', which is no name"),
        ({MANIFEST: b"{}"}, "is not a manifest of published files"),
        ({MANIFEST: b"[" * 100_000}, "is not a manifest of published files"),
        ({MANIFEST: b'{"files": {"a": {"sha256": "00", "size": 1}}}'}, "found the SHA-256 '00'"),
    ],
)
def test_files_unlike_the_published_ones_are_rejected_and_leave_nothing(
    tmp_path: Path, change: dict[str, bytes | None], message: str
) -> None:
    stored = Stored()
    for name, content in change.items():
        stored.contents.pop(name)
        if content is not None:
            stored.contents[name] = content
    with pytest.raises(DamagedError, match=message):
        copy(stored, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        copy(Stored(interrupt=True), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_before_any_download(tmp_path: Path) -> None:
    stored = Stored(interrupt=True)
    files = json.loads(stored.contents[MANIFEST])
    files["files"]["README.md"]["size"] = 2**60
    stored.contents[MANIFEST] = json.dumps(files).encode()
    with pytest.raises(ClusterError, match=r"the files have 1,152,921,504,606,853,978 bytes, and .* free"):
        copy(stored, tmp_path / "adapter")


def job(**status: object) -> Job:
    return Job({"metadata": {"name": "demo", "namespace": "team", "uid": "u"}, "spec": {}, "status": status})


PUBLISHED = job(phase="Succeeded", adapter={"uri": "s3://team/a", "sha256": SHA256})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    def closed(*_: object) -> None:
        raise AssertionError("the destination is not read")

    monkeypatch.setattr(adapter_module, "open_folder", closed)
    return Cluster.__new__(Cluster)


def test_existing_files_are_verified_and_not_fetched_again(cluster: Cluster, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    copy(Stored(), target)
    assert download_adapter(cluster, PUBLISHED, target) is False
    (target / "adapter_config.json").write_bytes(b"[]")
    with pytest.raises(RejectedError, match="exists and does not hold this adapter"):
        download_adapter(cluster, PUBLISHED, target)


def test_a_folder_with_other_files_is_not_touched(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RejectedError, match="--output"):
        download_adapter(cluster, PUBLISHED, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_job_without_an_adapter_names_the_reason(cluster: Cluster, tmp_path: Path) -> None:
    conditions = [{"type": "Failed", "status": "True", "message": "the held-out loss is 2.1, must be 2.0 or less"}]
    with pytest.raises(ClusterError, match=r"demo is Failed and has published no adapter: the held-out loss is 2.1"):
        download_adapter(cluster, job(phase="Failed", conditions=conditions), tmp_path / "adapter")
