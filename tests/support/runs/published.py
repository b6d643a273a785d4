"""A job that has been published, its context, and what its publication wrote."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.spec.job import QLoRAJobDocument
from qlora_trainer.core.completion import PublishRecord
from qlora_trainer.core.context import Mounts, StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.publish import publish
from qlora_trainer.stores.contents import Manifest
from tests.support.commands.command import Files
from tests.support.models.tiny import JOB_UID, POD_UID, Recorded
from tests.support.servers import LOGIN

Publish = Callable[..., str]
"""Publishes an adapter with another manifest, or MANIFEST, and returns its address."""

_MOUNTS = Mounts()


def context(
    files: Files, *, uid: str = JOB_UID, registries: tuple[str, ...] = (), mounts: Mounts = _MOUNTS
) -> StepContext:
    """Return the step's arguments for these files, whose claims replace `mounts`'."""
    document = {**files.document, "metadata": {"name": "tiny", "uid": uid}}
    return StepContext(
        document=QLoRAJobDocument.model_validate(document),
        workspace=WorkspaceLayout(files.workspace),
        mounts=replace(mounts, claims={"models": files.models, "data": files.data}),
        device="cpu",
        pod_uid=POD_UID,
        attempt=1,
        workspace_uri="pvc://work/tiny-7d0c2f5e",
        registries=registries,
    )


def published(
    files: Files, *, uid: str = JOB_UID, registries: tuple[str, ...] = (), mounts: Mounts = _MOUNTS
) -> PublishRecord:
    """The step, done in this process."""
    return publish(
        context(files, uid=uid, registries=registries, mounts=mounts),
        Recorded(),
        now=lambda: datetime(2026, 1, 2, tzinfo=UTC),
    )


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
