"""A folder of a store, by the scheme of its address."""

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from qlora_trainer.stores.contents import Contents
from tests.support.services.stores import Store, let_retry, serve_store

REAL = {"s3": "s3", "oci": "real_registry"}
"""Fixtures of the servers that are no fakes."""


@pytest.fixture
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Contents
) -> Iterator[Store]:
    """Serve an empty folder, in the environment of a step. Nothing is sent twice, and no credential in an address."""
    real = REAL.get(request.param)
    upstream = request.getfixturevalue(real) if real else ""
    for name in os.environ:
        if name.startswith(("HF_", "AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    let_retry(monkeypatch, 0)
    with serve_store(request.param, upstream, tmp_path, contents) as store:
        for name, value in store.place.items():
            monkeypatch.setenv(name, value)
        yield store.renamed(uuid4().hex[:8])
        addresses = [request.path for request in store.proxy.seen]
    assert not [value for value in store.credentials.values() if any(value in address for address in addresses)]
