"""Uploads a published adapter's run to trackers, without failing the step."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from qlora_api import contract
from qlora_api.contract import WorkspaceLayout
from qlora_api.printable import one_line, shortened
from qlora_api.spec.output import TrackedRun, TrackingStatus
from qlora_api.status import AdapterStatus
from qlora_trainer.core.completion import PublishRecord
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.file_names import HISTORY_FILE
from qlora_trainer.core.records import redact
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.publishing.uploads import FinishedRun, read_points, upload_to_mlflow, upload_to_wandb
from qlora_trainer.stores.endpoints import server_address

_MESSAGE_LENGTH = 256
_LOCAL_UID = "local"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tracker:
    """A tool with a server."""

    server_variable: str
    """Of the environment, which an operator sets from the profile."""
    credentials: tuple[str, ...]
    """The keys of the Secret, which are also the variables that the tool reads."""
    upload: Callable[[str, Mapping[str, str], FinishedRun], str]


_TRACKERS = {
    "mlflow": _Tracker(
        contract.ENV_MLFLOW_SERVER,
        ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
        upload_to_mlflow,
    ),
    "wandb": _Tracker(contract.ENV_WANDB_SERVER, ("WANDB_API_KEY",), upload_to_wandb),
}


def upload_run(
    job: TrainedJob,
    record: PublishRecord,
    secret: Secret,
    workspace: WorkspaceLayout,
    namespace: str,
    say: Callable[[str], None],
) -> TrackingStatus | None:
    """Upload the run to each tracker that has a server, unless the record has it; None without any.

    Every error is in the result: the adapter is published, and the history is in the workspace.
    """
    done = {} if record.tracking is None else record.tracking.model_dump(exclude_none=True)
    finished = partial(_finished_run, job, record.adapter, workspace, namespace)
    found: dict[str, TrackedRun] = {}
    for name in job.spec.training.report_to:
        tracker = _TRACKERS.get(name)
        if tracker is None or not os.environ.get(tracker.server_variable):
            continue
        if done.get(name, {}).get("url"):
            found[name] = TrackedRun.model_validate(done[name])
            continue
        say(f"uploading the run to {name}")
        found[name] = _upload(tracker, secret, finished)
    return TrackingStatus(**found) if found else None


def _upload(tracker: _Tracker, secret: Secret, finished: Callable[[], FinishedRun]) -> TrackedRun:
    values: dict[str, str] = {}
    try:
        server = server_address(os.environ, tracker.server_variable) or ""
        values = {key: value for key in tracker.credentials if (value := secret.value(key))}
        return TrackedRun(url=tracker.upload(server, values, finished()))
    except Exception as error:  # noqa: BLE001 - whatever a tracker's client raises must not cost the job its success
        text = str(error) or type(error).__name__
        for value in values.values():
            text = text.replace(value, "[redacted]")
        text = one_line(redact(text))
    logger.warning("the run could not be uploaded: %s", text)
    return TrackedRun(message=shortened(text, _MESSAGE_LENGTH))


def _finished_run(job: TrainedJob, adapter: AdapterStatus, workspace: WorkspaceLayout, namespace: str) -> FinishedRun:
    spec, dataset = job.spec, job.prepared.dataset
    named = None if spec.output.tracking is None else spec.output.tracking.experiment
    return FinishedRun(
        # On a laptop all jobs have the same UID; what determines the adapter differs.
        uid=job.trained.fingerprint[:32] if job.uid == _LOCAL_UID else job.uid,
        name=job.name,
        experiment=named or namespace,
        settings={"model": spec.model.source, **spec.lora.dump(), **spec.training.dump()},
        tags={
            "qlora.namespace": namespace,
            "qlora.baseRevision": job.prepared.model_revision,
            "qlora.dataSha256": dataset.sha256,
            "qlora.adapter": adapter.uri,
            "qlora.adapterSha256": adapter.sha256,
        },
        points=read_points(workspace.report / HISTORY_FILE),
    )
