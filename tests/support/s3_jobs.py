"""Jobs with a model in an object store, and what they must not show."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import Recorded, chat_row
from tests.support.servers import ACCESS_KEY, BUCKET, SECRET_KEY
from tests.support.services.fault_proxy import Fault

SESSION_TOKEN = "canary-session-token"
SECRET = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
MODEL: dict[str, Any] = {"model": {"source": f"s3://{BUCKET}/models/tiny", "secretRef": {"name": "store"}}}
ROWS = [chat_row("Which pods?", "kubectl get pods")] * 3


def give_secret(root: Path, part: str, values: dict[str, str] | None = None) -> None:
    """The files of a mounted Secret."""
    folder = root / "credentials" / part
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for key, value in (SECRET if values is None else values).items():
        (folder / key).write_text(f"{value}\n")


def rejection(context: StepContext, records: Recorded, code: ExitCode) -> str:
    """The message of prepare when it ends with `code`, without a credential in it."""
    with pytest.raises(StepFailure) as failure:
        prepare(context, records)
    assert failure.value.exit_code is code, failure.value.message
    require_no_canary(context.workspace.root, failure.value.message, records.stream.getvalue())
    return failure.value.message


def require_no_canary(folder: Path, *texts: str) -> None:
    """No output or file of a step holds a credential."""
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for content in (*contents, *(text.encode() for text in texts)):
        for canary in (ACCESS_KEY, SECRET_KEY, SESSION_TOKEN):
            assert canary.encode() not in content


def answering(status: int, code: str, **headers: str) -> Fault:
    """S3's answer when it rejects, quoting the request."""
    canaries = f"{ACCESS_KEY} {SECRET_KEY} {SESSION_TOKEN}"
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{canaries}</Message></Error>"
    return Fault(status, {"Content-Type": "application/xml", **headers}, body.encode())
