"""QLoRAClient: jobs from Python, with the method names of Kubeflow's TrainerClient."""

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_api.kubernetes_values import DNS_LABEL_WORDS
from qlora_api.spec.job import API_VERSION, KIND, QLoRAJobDocument, QLoRAJobSpec
from qlora_api.status import Phase, StepName
from qlora_client.client_types import Comparison, Plan, QLoRAJob
from qlora_client.comparison import Compared, differing_settings, draw_histories, results
from qlora_client.files.adapter import download_adapter
from qlora_client.history import read_histories
from qlora_client.jobs.job import Job
from qlora_client.jobs.logs import read_logs
from qlora_client.jobs.names import generated_name
from qlora_client.jobs.pods import Event, events_of
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError, MissingError, UnreachableError
from qlora_client.kube.resources import JOBS
from qlora_client.planning import GpuOfPlan, make_plan

_LOGGER = logging.getLogger("qlora_client")
_PHASES: tuple[Phase, ...] = get_args(Phase)
_STEPS: tuple[StepName, ...] = get_args(StepName)


class ClusterBackendConfig(BaseModel):
    """A cluster with the operator, reached as kubectl reaches it.

    Attributes:
        namespace: Namespace of the jobs; that of the context if not set.
        context: Context of the kubeconfig; the current one if not set.
        config_file: The kubeconfig; as kubectl finds it if not set. In a pod without one, its service account.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespace: str | None = None
    context: str | None = None
    config_file: Path | str | None = None


class QLoRAClient:
    """Creates QLoRAJobs in a cluster and follows them.

    Methods raise ValueError for arguments that cannot be right, TimeoutError, OSError for a file of this machine, and
    RuntimeError for everything else; the message is one sentence with the remedy. Reasons for waiting are logged by the
    logger `qlora_client`.
    """

    def __init__(
        self,
        backend_config: ClusterBackendConfig | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect; sends nothing yet.

        Args:
            backend_config: The cluster; the kubeconfig's current context if not set.
            sleep: Waits so many seconds.
            monotonic: A clock, in seconds.

        Raises:
            RuntimeError: The kubeconfig cannot be used.
        """
        self._sleep, self._monotonic = sleep, monotonic
        config = backend_config or ClusterBackendConfig()
        self._cluster = Cluster.connect(
            context=config.context,
            namespace=config.namespace,
            kubeconfig=None if config.config_file is None else str(config.config_file),
            warn=_LOGGER.warning,
        )

    def train(
        self,
        spec: QLoRAJobSpec,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> str:
        """Create a job, and return its name without waiting.

        Args:
            spec: The job, of the models of `qlora_api`. Only the fields that are set are sent.
            name: Its name; made of the model's name if not set.
            labels: Labels of the QLoRAJob.
            annotations: Annotations of the QLoRAJob.

        Raises:
            ValueError: The name is not allowed, the spec names the job itself, or a copy of it has a wrong value.
            RuntimeError: The job is not accepted, or its name is taken.
        """
        name = generated_name(spec.model.source, token_hex(3)) if name is None else name
        fields = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
        metadata = {"name": name, "labels": dict(labels or {}), "annotations": dict(annotations or {})}
        body: dict[str, Any] = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": fields}
        try:
            QLoRAJobDocument.model_validate(body)
        except ValidationError as error:
            raise ValueError(_explain(error)) from None
        self._cluster.create(JOBS, body)
        return name

    def get_job(self, name: str) -> QLoRAJob:
        """One job.

        Raises:
            RuntimeError: There is none of this name, or it cannot be read.
        """
        return QLoRAJob.of(self._get(name))

    def list_jobs(self) -> list[QLoRAJob]:
        """All jobs of the namespace.

        One with values that only a newer version of the client can read is logged and left out.

        Raises:
            RuntimeError: They cannot be read.
        """
        jobs = []
        for found in self._cluster.find(JOBS):
            try:
                jobs.append(QLoRAJob.of(Job(found)))
            except ClusterError as error:
                _LOGGER.warning("%s", error)
        return jobs

    def get_job_logs(self, name: str, step: StepName | None = None, *, follow: bool = False) -> Iterator[str]:
        """The lines that the job's steps print, pod by pod, as they arrive.

        Args:
            name: The job.
            step: Only those of this step.
            follow: Wait for further lines, also of pods that have not started, until the job has ended.

        Raises:
            ValueError: There is no such step.
            RuntimeError: There is no such job, or its logs cannot be read.
        """
        if step is not None and step not in _STEPS:
            raise ValueError(f"step is {step!r}, must be one of {', '.join(_STEPS)}")
        steps = _STEPS if step is None else (step,)
        return (line.text for line in read_logs(self._cluster, name, steps, follow=follow, say=_LOGGER.info))

    def get_job_events(self, name: str) -> list[Event]:
        """The operator's Events about the job, oldest first; a cluster keeps them for an hour or so.

        Raises:
            RuntimeError: There is no such job, or its Events cannot be read.
        """
        return events_of(self._cluster, self._get(name).uid)

    def wait_for_job_status(
        self,
        name: str,
        status: Collection[Phase] = frozenset({"Succeeded"}),
        timeout: float = 600,
        polling_interval: float = 2,
        callbacks: Collection[Callable[[QLoRAJob], None]] | None = None,
    ) -> QLoRAJob:
        """Wait until the job is in one of the phases, and return it.

        Args:
            name: The job.
            status: The phases.
            timeout: For how many seconds to wait.
            polling_interval: Seconds between two reads. A cluster that cannot be reached is retried.
            callbacks: Called with the job at each read.

        Raises:
            ValueError: A phase that does not exist, or seconds that make no sense.
            TimeoutError: The job is in none of the phases in time.
            RuntimeError: It has failed, or ended otherwise, so that it will not be in any of them; or it is deleted.
        """
        if not set(status) <= set(_PHASES):
            raise ValueError(f"status is {status!r}, must be a set of {', '.join(_PHASES)}")
        if not status or not 0 < polling_interval <= timeout:
            raise ValueError(
                f"found {len(status)} phases, timeout {timeout} and polling_interval {polling_interval}: there must be "
                "a phase, and polling_interval must be more than 0 and at most timeout"
            )
        deadline, seen, uid = self._monotonic() + timeout, "not been reached", ""
        while True:
            try:
                found = self._get(name)
            except UnreachableError as error:
                seen = f"not been seen, as {error}"
            else:
                if uid not in ("", found.uid):
                    raise MissingError(f"{name} has been deleted, and another job has its name now")
                uid, job = found.uid, QLoRAJob.of(found)
                for callback in callbacks or ():
                    callback(job)
                if job.phase in status:
                    return job
                if job.ended:
                    raise ClusterError(f"{name} has ended as {job.phase}{f': {job.message}' if job.message else ''}")
                seen = f"come to {job.phase}"
            left = deadline - self._monotonic()
            if left <= 0:
                raise TimeoutError(f"{name} has {seen} in {timeout:g} s, and not to {' or '.join(sorted(status))}")
            self._sleep(min(polling_interval, left))

    def delete_job(self, name: str) -> None:
        """Delete the job. Its workspace stays unless its claim's retention policy is Delete.

        Raises:
            RuntimeError: There is no such job, or you may not delete it.
        """
        self._cluster.delete(JOBS, name, self._get(name).uid)

    def plan(
        self,
        spec: QLoRAJobSpec,
        *,
        config: Path | str | None = None,
        gpu: str | None = None,
        gpu_tflops: float | None = None,
        tokens: int | None = None,
        gpu_hour_price: str | None = None,
    ) -> Plan:
        """The expected needs of a job, before it is created; nothing is sent to the cluster.

        Args:
            spec: The job. With spec.resources.gpuMemory the plan has a verdict.
            config: The model's config.json; fetched for a model of the hub.
            gpu: GPU to plan for, such as `l40s`: its memory and speed, instead of spec.resources.gpuMemory.
            gpu_tflops: Speed of the GPU in dense bfloat16, in 10^12 operations per second, for the forecast.
            tokens: Tokens of one epoch, for the forecast; not needed with spec.training.maxSteps.
            gpu_hour_price: Price of a GPU hour and its currency, such as `2.50 EUR`.

        Raises:
            ValueError: The model's config is not given where it is needed, or not supported; or an argument is wrong.
            RuntimeError: The config cannot be fetched.
        """
        of_plan = GpuOfPlan.from_arguments(gpu, gpu_tflops, gpu_hour_price)
        return make_plan(spec, None if config is None else Path(config), of_plan, tokens)

    def get_adapter(self, name: str, output: Path | str | None = None) -> Path:
        """Download the job's adapter: complete, with the SHA-256 of the status, or not at all.

        Args:
            name: The job.
            output: Folder to make; the job's name in the current one if not set.

        Returns:
            The folder, which PEFT loads. One that holds this adapter already is left as it is.

        Raises:
            RuntimeError: There is no adapter, it is damaged, it cannot be read, or the folder has other files.
        """
        target = Path(name if output is None else output)
        download_adapter(self._cluster, self._get(name), target, say=_LOGGER.info)
        return target

    def plot(self, *names: str, axes: Any = None) -> Any:
        """Draw the losses of jobs over each other with matplotlib.

        Args:
            names: The jobs.
            axes: Axes of matplotlib to draw on; those of a new figure if not set.

        Returns:
            The axes.

        Raises:
            ValueError: There is no name.
            RuntimeError: A job does not exist, or matplotlib is missing.
        """
        return draw_histories(self.compare(*names).histories, _new_axes() if axes is None else axes)

    def compare(self, *names: str) -> Comparison:
        """The different settings of jobs, their results, and their losses.

        Losses are read from the logs of the jobs or, once these are gone, from their workspaces through a
        short-lived pod for each claim; what cannot be read is logged and left out.

        Raises:
            ValueError: There is no name.
            RuntimeError: A job does not exist.
        """
        if not names:
            raise ValueError("found no name, must be the names of one or more jobs")
        jobs = [self._get(name) for name in dict.fromkeys(names)]
        histories = read_histories(self._cluster, jobs, _LOGGER.info)
        compared = [Compared(job, histories[job.name]) for job in jobs]
        found = results(compared, datetime.now(UTC))
        return Comparison(tuple(job.name for job in jobs), tuple(differing_settings(jobs)), tuple(found), histories)

    def _get(self, name: str) -> Job:
        return Job(self._cluster.get(JOBS, name))


def _new_axes() -> Any:
    try:
        # Through pyplot, so that a notebook shows the figure.
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise ClusterError("a picture takes the library matplotlib, which is missing: pip install matplotlib") from None
    return pyplot.subplots(layout="constrained")[1]


def _explain(error: ValidationError) -> str:
    """Return the first problem of a job in one sentence."""
    [first, *_] = error.errors(include_url=False)
    field, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message if not field else f"{field}: {message}"
    words = DNS_LABEL_WORDS if first["type"] == "string_pattern_mismatch" and field == "metadata.name" else message
    return f"{field}: found {json.dumps(first['input'], default=str)[:80]}, {words.replace('Input should', 'must')}"
