"""QLoRAClient: jobs from Python, with the method names of Kubeflow's TrainerClient."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from qlora_api.spec.job import QLoRAJobSpec
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
from qlora_client.kube.errors import ClusterError
from qlora_client.kube.resources import JOBS, SWEEPS
from qlora_client.manifests import job_manifest, sweep_manifest
from qlora_client.planning import GpuOfPlan, make_plan
from qlora_client.sweep import Sweep
from qlora_client.waiting import Clock, Wait

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
        self._clock = Clock(sleep, monotonic)
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
        body = job_manifest(name, spec, labels or {}, annotations or {})
        self._cluster.create(JOBS, body)
        return name

    def sweep(
        self,
        spec: QLoRAJobSpec,
        name: str,
        *,
        parallelism: int = 1,
        publish: Literal["all", "best"] = "all",
        **values: Collection[Any],
    ) -> Sweep:
        """Create a sweep, a job for each combination of the values, and return it without waiting.

        Args:
            spec: The template of its jobs, the cells.
            name: Its name; that of a cell has `-00`, `-01` and so on after it.
            parallelism: Cells that run at the same time.
            publish: Publish the adapters of all cells, or only the best, to spec.output.
            values: Lists of values by the name of their setting, such as `rank=[16, 64], learning_rate=[1e-4, 2e-4]`.

        Raises:
            ValueError: There is no such setting, a value is not allowed, two cells are the same, or the template has no
                held-out rows that compare them.
            RuntimeError: The sweep is not accepted, or its name is taken.
        """
        body = sweep_manifest(name, spec, values, parallelism=parallelism, publish=publish)
        self._cluster.create(SWEEPS, body)
        return self._sweep(name)

    def get_sweep(self, name: str) -> Sweep:
        """A sweep that exists.

        Raises:
            RuntimeError: There is none of this name, or it cannot be read.
        """
        sweep = self._sweep(name)
        sweep.get()
        return sweep

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
        wait = Wait(timeout, polling_interval, status)
        return wait.follow(name, lambda: self.get_job(name), callbacks, self._clock)

    def delete_job(self, name: str) -> None:
        """Delete the job. Its workspace stays unless its claim's retention policy is Delete.

        Another job can have its name: the workspace's folder has the job's UID.

        Raises:
            RuntimeError: There is no such job, or you may not delete it.
        """
        self._cluster.delete(JOBS, name, self._get(name).uid)

    @staticmethod
    def plan(
        spec: QLoRAJobSpec,
        *,
        config: Path | str | None = None,
        gpu: str | None = None,
        gpu_tflops: float | None = None,
        tokens: int | None = None,
        gpu_hour_price: str | None = None,
    ) -> Plan:
        """The expected needs of a job, before it is created; `QLoRAClient.plan` takes no cluster.

        Args:
            spec: The job. With spec.resources.gpuMemory the plan has a verdict.
            config: The model's config.json; for a model of the hub, found as `qlora plan` does.
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

    def _sweep(self, name: str) -> Sweep:
        return Sweep(name, self._cluster, self._clock, self.compare)

    def _get(self, name: str) -> Job:
        return Job(self._cluster.get(JOBS, name))


def _new_axes() -> Any:
    try:
        # Through pyplot, so that a notebook shows the figure.
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise ClusterError("a picture takes the library matplotlib, which is missing: pip install matplotlib") from None
    return pyplot.subplots(layout="constrained")[1]
