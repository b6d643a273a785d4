"""The manifest of a small adapter, and its rejection, for the tests of every destination."""

from collections.abc import Callable

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.stores.contents import Manifest
from tests.support.servers import LOGIN

Publish = Callable[..., str]
"""Publishes the adapter with another manifest, or MANIFEST, and returns its address."""

MANIFEST = Manifest(
    job_uid="one",
    job_name="tiny",
    fingerprint="a" * 64,
    spec_sha256="b" * 64,
    base_model="hf://acme/tiny",
    base_revision="c0ffee",
    libraries={},
    files={},
)


def rejected(publish: Publish, code: ExitCode, manifest: Manifest = MANIFEST) -> str:
    """The message of a publication that ends with `code`, without a credential in it."""
    with pytest.raises(StepFailure) as failure:
        publish(manifest)
    message = failure.value.message
    assert failure.value.exit_code is code, message
    assert "canary" not in message.lower()
    assert LOGIN not in message
    return message
