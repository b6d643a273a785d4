"""A real S3 server, and the folder of a small adapter."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_trainer.stores.contents import Contents
from tests.support.servers import s3_server


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
