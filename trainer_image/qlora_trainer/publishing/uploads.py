"""Uploads the history of a finished run to MLflow and Weights & Biases, through their clients.

The measurements come from `metrics.jsonl`. It has each step once, however often the run was interrupted. An upload can
be repeated: it finds the run that an earlier one has begun, and sends the same points again.
"""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING

from qlora_trainer.history.trackers import grouped

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_MLFLOW_BATCH = 1000
"""Points that MLflow's REST API takes in a request.

It takes 100 parameters, and a job has fewer.
"""
_MLFLOW_VALUE_LENGTH = 500
"""Characters of a parameter that every MLflow server accepts."""
_RUN_TAG = "qlora.job"
_MLFLOW_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # Waits of 2, 4, 8 and 16 seconds, for a server that is unreachable, overloaded or failing.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "2",
    # The server could ask for a wait of hours, while the pod does nothing.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    # To another host they would take the credentials along.
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",
}
_MLFLOW_SECONDS = 180
"""Time limit to begin a request to MLflow. Each is tried for three minutes."""
_WANDB_SECONDS = 180
"""Time limit of the client of Weights & Biases, which would retry for days."""
logger = logging.getLogger(__name__)


class UploadError(Exception):
    """The tool rejected the run. Its client's message may have an address."""


@dataclass(frozen=True)
class FinishedRun:
    """A run to upload."""

    uid: str
    """UID of its job: the same for each attempt, and of no other run."""
    name: str
    experiment: str
    settings: Mapping[str, object]
    tags: Mapping[str, str]
    points: Sequence[tuple[int, Mapping[str, float]]]
    """Optimizer step, and its measurements by the names that tools group them by."""


def read_points(metrics: Path) -> list[tuple[int, dict[str, float]]]:
    """The points of a run's `metrics.jsonl`.

    Raises OSError, and ValueError for a line that is not a metric.
    """
    points = []
    for number, line in enumerate(metrics.read_bytes().splitlines(), start=1):
        try:
            entry = json.loads(line)
            points.append((int(entry["step"]), {name: float(value) for name, value in grouped(entry).items()}))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{metrics}:{number}: {error!r}") from error
    return points


def upload_to_mlflow(server: str, credentials: Mapping[str, str], run: FinishedRun) -> str:
    """Upload the run and return the address of its page. `credentials`: MLflow's variables for them, by name.

    Raises UploadError when the server rejects a request, or has not taken the run within six minutes.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    with _environment({**_MLFLOW_PATIENCE, "MLFLOW_DISABLE_TELEMETRY": "true", **credentials}):
        try:
            return _to_mlflow(MlflowClient(tracking_uri=server), server, run, monotonic)
        except MlflowException as error:
            raise UploadError(str(error)) from error


def _to_mlflow(client: "MlflowClient", server: str, run: FinishedRun, clock: Callable[[], float]) -> str:
    """`clock` gives seconds."""
    from mlflow.entities import Metric, Param

    end = clock() + _MLFLOW_SECONDS

    def require_time() -> None:
        if clock() > end:
            raise UploadError(f"{server} has not taken the run within {_MLFLOW_SECONDS} seconds")

    experiment = _mlflow_experiment(client, run.experiment)
    begun = _mlflow_run(client, experiment, run)
    identity, started = begun.info.run_id, begun.info.start_time
    require_time()
    parameters = [Param(name, str(value)[:_MLFLOW_VALUE_LENGTH]) for name, value in run.settings.items()]
    client.log_batch(identity, params=parameters)
    # The server takes a point only once with the same time, which therefore is that of the run.
    points = [Metric(name, value, started, step) for step, figures in run.points for name, value in figures.items()]
    for first in range(0, len(points), _MLFLOW_BATCH):
        require_time()
        client.log_batch(identity, metrics=points[first : first + _MLFLOW_BATCH])
    client.set_terminated(identity, "FINISHED")
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs/{identity}"


def _mlflow_run(client: "MlflowClient", experiment: str, run: FinishedRun) -> "Run":
    """The run that an earlier upload has begun, with current tags, or a new one.

    Of several, made by concurrent attempts, it is the oldest, and the others are ended.
    """
    tags = {_RUN_TAG: run.uid, **run.tags}
    same = client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{run.uid}'", order_by=["attributes.start_time ASC"])
    if not same:
        return client.create_run(experiment, run_name=run.name, tags=tags)
    first, *others = same
    for name, value in tags.items():
        if first.data.tags.get(name) != value:
            client.set_tag(first.info.run_id, name, value)
    for other in others:
        if other.info.status == "RUNNING":
            client.set_terminated(other.info.run_id, "KILLED")
    return first


def _mlflow_experiment(client: "MlflowClient", name: str) -> str:
    """The id of the experiment of this name, made if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            # Another run may have made it since.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def upload_to_wandb(server: str, credentials: Mapping[str, str], run: FinishedRun) -> str:
    """Upload the run and return the address of its page. `credentials`: the tool's variables for them, by name.

    Raises UploadError when the client has not uploaded it within three minutes, or the server rejects it.
    """
    with TemporaryDirectory(prefix="wandb-") as folder:
        written = _wandb_files(Path(folder), run)
        quiet = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "false", "WANDB_DIR": folder}
        settings = {**os.environ, **quiet, "WANDB_BASE_URL": server, "WANDB_MODE": "online", **credentials}
        # The service that has written the files would get the credentials and an error of the upload.
        settings.pop("WANDB_SERVICE", None)
        command = [sys.executable, "-m", "wandb", "sync", "--include-synced", str(written)]
        try:
            done = subprocess.run(
                command, env=settings, cwd=folder, capture_output=True, text=True, timeout=_WANDB_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise UploadError(f"{server} has not taken the run within {_WANDB_SECONDS} seconds") from error
        output = done.stdout + done.stderr
    page = re.search(rf"https?://\S+/runs/{re.escape(run.uid)}", output)
    if done.returncode != 0 or page is None:
        logger.info("wandb sync: %s", output)
        # The last line has the error, those before it what was done.
        raise UploadError(output.strip().rpartition("\n")[2] or f"wandb sync ended with exit code {done.returncode}")
    return page[0]


def _wandb_files(folder: Path, run: FinishedRun) -> Path:
    """The run as the tool itself writes it without a server: the folder to upload."""
    import wandb

    with _environment({"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_DISABLE_GIT": "true"}):
        written = wandb.init(
            project=run.experiment,
            name=run.name,
            id=run.uid,
            config={**run.settings, **run.tags},
            dir=str(folder),
            reinit="create_new",
            settings=wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True),
        )
        for step, figures in run.points:
            written.log(dict(figures), step=step)
        written.finish(exit_code=0)
    return next(folder.glob("wandb/offline-run-*"))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set the variables that the tools read when called, then restore the old ones."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
