"""A real S3 server behind a proxy with faults, a model in it, and the folder of a small adapter."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from qlora_trainer.stores import bucket as store_settings
from qlora_trainer.stores.contents import Contents
from tests.support.models.tiny import write_rows
from tests.support.s3_jobs import ROWS, SECRET, give_secret
from tests.support.servers import s3_bucket, s3_server
from tests.support.services.fault_proxy import FaultProxy, serve_proxy


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    """A folder of an adapter; its weights take several parts of an upload."""
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"weights" * 1_300_000)
    return {"README.md": b"# Tiny\n", "adapter_config.json": b"{}", weights.name: weights}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def store(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    """Serve the profile's store by a proxy, with the job's Secrets and no retry delay."""
    for name in SECRET:
        monkeypatch.delenv(name, raising=False)
    for part in ("model", "dataset", "output"):
        give_secret(tmp_path, part)
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    soon = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2}
    monkeypatch.setattr(store_settings, "RETRY", {**store_settings.RETRY, "backoff": soon})
    with serve_proxy(FaultProxy(s3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.address}")
        yield proxy


@pytest.fixture
def bucket(s3: str) -> S3Store:
    """The bucket itself, without the proxy."""
    return s3_bucket(s3)


@pytest.fixture
def model(bucket: S3Store, tiny_llama: Path) -> str:
    """Address below the bucket of a tiny model, with files that must never be read."""
    for page in obstore.list(bucket, "models/"):
        obstore.delete(bucket, [entry["path"] for entry in page])
    for path in tiny_llama.iterdir():
        obstore.put(bucket, f"models/tiny/{path.name}", path)
    obstore.put(bucket, "models/tiny/pytorch_model.bin", b"pickle")
    obstore.put(bucket, "models/tiny/adapter_config.json", b"{}")
    obstore.put(bucket, "models/tiny/original/params.json", b"{}")
    return "models/tiny"
