"""A folder with a small adapter, as a job publishes it, and the key that has signed it."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from qlora_api.lineage import (
    SIGNED_FILE,
    Lineage,
    LineageBase,
    LineageData,
    LineageJob,
    LineageResult,
    LineageTrainer,
    Statement,
    Subject,
)
from qlora_trainer.publishing.signing import sign

WEIGHTS = b"weights"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_SHA256, BASE_REVISION = "b" * 64, "c0ffee"
KEY = Ed25519PrivateKey.generate()


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def public_pem(key: Ed25519PrivateKey = KEY) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signed_statement(
    files: Mapping[str, str], job: str = "bot", namespace: str = "team", key: Ed25519PrivateKey = KEY
) -> bytes:
    """Sign a statement about files, or artifacts, by the SHA-256 of each."""
    predicate = Lineage(
        job=LineageJob(name=job, namespace=namespace, uid="u"),
        base=LineageBase(source="hf://org/model", revision=BASE_REVISION, sha256=BASE_SHA256),
        data=LineageData(sources=("hf://org/rows",), sha256="0" * 64, prepared="0" * 64, rows=1, eval_rows=0),
        trainer=LineageTrainer(libraries={}),
        settings={},
        fingerprint="0" * 64,
        spec_sha256="0" * 64,
        result=LineageResult(steps=1, adapter_step=1, attempts=1, loss=1.0),
    )
    subject = tuple(Subject(name=name, digest={"sha256": each}) for name, each in files.items())
    return sign(Statement(subject=subject, predicate=predicate).model_dump_json(by_alias=True).encode(), key)


def write_signed_adapter(
    folder: Path, *, rank: int = 16, job: str = "bot", namespace: str = "team", key: Ed25519PrivateKey = KEY
) -> Path:
    """Write the files of an adapter of a job into a new folder, which is returned."""
    files = {WEIGHTS_FILE: WEIGHTS, "adapter_config.json": json.dumps({"r": rank, "rank_pattern": {}}).encode()}
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    stated = {name: digest(content) for name, content in files.items()}
    (folder / SIGNED_FILE).write_bytes(signed_statement(stated, job, namespace, key))
    return folder
