"""The choice among several statements; see also test_lineage.py for signatures."""

from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from qlora_api.lineage import (
    Lineage,
    LineageBase,
    LineageData,
    LineageJob,
    LineageResult,
    LineageTrainer,
    Statement,
    Subject,
)
from qlora_cli import verify as verify_module
from qlora_cli.verify import Adapter, NotVerified, verify
from qlora_trainer.publishing.signing import sign

ADDRESS = "oci://registry.example.org/team/adapter:v1"
OWN, OTHER = "a" * 64, "b" * 64
WEIGHTS = b"weights"
KEY = Ed25519PrivateKey.generate()


def bundle(artifact: str, content: bytes = WEIGHTS) -> bytes:
    """Sign a statement about the artifact with this SHA-256, and about this content."""
    predicate = Lineage(
        job=LineageJob(name=f"of-{artifact[0]}", namespace="team", uid="u"),
        base=LineageBase(source="hf://org/model", revision="c0ffee", sha256="0" * 64),
        data=LineageData(sources=("hf://org/rows",), sha256="0" * 64, prepared="0" * 64, rows=1, eval_rows=0),
        trainer=LineageTrainer(libraries={}),
        settings={},
        fingerprint="0" * 64,
        spec_sha256="0" * 64,
        result=LineageResult(steps=1, adapter_step=1, attempts=1, loss=1.0),
    )
    file = Subject(name="adapter_model.safetensors", digest={"sha256": sha256(content).hexdigest()})
    subject = (file, Subject(name=ADDRESS, digest={"sha256": artifact}))
    return sign(Statement(subject=subject, predicate=predicate).model_dump_json(by_alias=True).encode(), KEY)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "signing.pub"
    file.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return file


def attach(monkeypatch: pytest.MonkeyPatch, *bundles: bytes, looked_at: int | None = None) -> None:
    """Let the artifact at ADDRESS have these statements, in this order."""

    def downloaded(_address: str, folder: Path) -> Adapter:
        (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
        return Adapter(folder, bundles, (), OWN, looked_at)

    monkeypatch.setattr(verify_module, "_downloaded", downloaded)


def test_statements_of_the_same_key_about_other_artifacts_hide_none(monkeypatch: pytest.MonkeyPatch, key: Path) -> None:
    attach(monkeypatch, bundle(OTHER, b"others"), bundle(OWN))
    found = verify(ADDRESS, key)
    assert (found.lineage.job.name, found.by_key) == ("of-a", True)


def test_statements_about_other_artifacts_only_verify_nothing(monkeypatch: pytest.MonkeyPatch, key: Path) -> None:
    attach(monkeypatch, bundle(OTHER))
    with pytest.raises(NotVerified, match=f"about another artifact than sha256:{OWN}$"):
        verify(ADDRESS, key)
    attach(monkeypatch, bundle(OTHER), looked_at=1)
    with pytest.raises(NotVerified, match=r"about another artifact .*; only the first 1 of what is attached"):
        verify(ADDRESS, key)
