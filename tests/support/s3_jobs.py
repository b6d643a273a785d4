"""Jobs over a real S3 server behind a proxy with faults, and what they must not show."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.steps.prepare import prepare
from tests.support.failures import failing
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.servers import ACCESS_KEY, BUCKET, SECRET_KEY
from tests.support.services.fault_proxy import Fault, FaultProxy, Request

SESSION_TOKEN = "canary-session-token"
SECRET = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
MODEL: dict[str, Any] = {"model": {"source": f"s3://{BUCKET}/models/tiny", "secretRef": {"name": "store"}}}
ROWS = [chat_row("Which pods?", "kubectl get pods")] * 3


@dataclass(frozen=True)
class S3Jobs:
    """Prepares jobs whose model, or data, are in the bucket."""

    root: Path
    """The test's folder."""
    proxy: FaultProxy
    bucket: S3Store
    """The bucket itself, without the proxy."""
    make_context: Callable[..., StepContext]
    records: Recorded

    def give_secret(self, part: str, **more: str) -> None:
        """Mount the job's Secret for its model, data or output, with changes."""
        folder = self.root / "credentials" / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for key, value in (SECRET | more).items():
            (folder / key).write_text(f"{value}\n")

    def put_rows(self, *names: str) -> bytes:
        """Put data there, three rows a file, and return the content of one."""
        content = write_rows(self.root / "rows.jsonl", ROWS).read_bytes()
        for name in names:
            obstore.put(self.bucket, name, content)
        return content

    def context(self, spec: dict[str, Any] | None = None, *, cached_as: str = "") -> StepContext:
        """A job with the model of the bucket; `cached_as`: its name, among jobs that share a cache for models."""
        context = self.make_context(MODEL if spec is None else spec)
        if not cached_as:
            return context
        (self.root / "cache").mkdir(exist_ok=True)
        mounts = replace(context.mounts, model_cache=self.root / "cache")
        layout = WorkspaceLayout(self.root / "workspaces" / cached_as)
        return replace(context, workspace=layout, mounts=mounts, pod_uid=cached_as)

    def prepare(self, context: StepContext | None = None) -> PrepareRecord:
        """Run the step; no output and no file of it has a credential."""
        context = context or self.context()
        record = prepare(context, self.records)
        require_no_canary(context.workspace.root, self.records.stream.getvalue())
        return record

    def reject(self, code: ExitCode, context: StepContext | None = None) -> str:
        """The message of prepare when it ends with `code`, without a credential in it."""
        context = context or self.context()
        with failing(code) as failure:
            prepare(context, self.records)
        require_no_canary(context.workspace.root, failure.value.message, self.records.stream.getvalue())
        return failure.value.message


def of_weights(request: Request) -> bool:
    """Whether the request reads the model's weights."""
    return request.method == "GET" and request.path.partition("?")[0].endswith("model.safetensors")


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
