"""Prometheus metrics of the operator."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, disable_created_metrics, generate_latest

from qlora_operator.decisions.observed.objects import Object
from qlora_operator.keys import Key
from qlora_operator.metrics.jobs import DEFAULT_RUNNING_JOBS, GpuSeconds, JobMetrics
from qlora_operator.metrics.requests import RequestMetrics
from qlora_operator.metrics.shown import read_shown
from qlora_operator.metrics.sweeps import SweepMetrics
from qlora_operator.metrics.transitions import DEFAULT_NAMESPACES, TransitionMetrics
from qlora_operator.metrics.watches import WatchMetrics
from qlora_operator.metrics.work import WorkMetrics

# One more series for each counter and histogram, which no Prometheus reads from this format.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The operator's metrics.

    `running_jobs`: how many running jobs have series with their names. Nothing else has a job's name as a label.
    `namespaces`: how many namespaces are labels of histograms.
    """

    def __init__(self, running_jobs: int = DEFAULT_RUNNING_JOBS, namespaces: int = DEFAULT_NAMESPACES) -> None:
        self.registry = CollectorRegistry()
        self.work = WorkMetrics(self.registry)
        self.gpu_seconds = GpuSeconds(self.registry)
        self.leads = Gauge(
            "qlora_operator_leads", "1 if this operator works, 0 if it stands by.", registry=self.registry
        )
        self.schema_outdated = Gauge(
            "qlora_operator_schema_outdated",
            "1 while no job is worked on because the CustomResourceDefinition lacks fields of this release, else 0.",
            registry=self.registry,
        )
        self._denied = Gauge(
            "qlora_operator_namespace_denied",
            "1 if the API server denies the operator permission to list the namespace's jobs, else 0.",
            ["namespace"],
            registry=self.registry,
        )
        self.requests = RequestMetrics(self.registry)
        self.watches = WatchMetrics(self.registry)
        self.transitions = TransitionMetrics(self.registry, namespaces)
        self.jobs = JobMetrics(running_jobs)
        self.registry.register(self.jobs)
        self.sweeps = SweepMetrics(self.registry)

    def show(self, body: Object, *, deleted: bool = False) -> None:
        """Note a job as it is stored, or was when it was deleted."""
        self.jobs.show(body, deleted=deleted)
        if not deleted and (job := read_shown(body)) is not None and job.has_gpus:
            self.gpu_seconds.expect(job.namespace, job.profile)

    def job_is_gone(self, key: Key, *, replaced_by: str = "") -> None:
        """Count no job of that name, but the one with the UID `replaced_by`."""
        self.jobs.gone(key, replaced_by=replaced_by)

    def namespace_is_denied(self, namespace: str | None, denied: bool) -> None:
        """Note whether the namespace, or the cluster (None), can be listed."""
        self._denied.labels(namespace or "").set(denied)

    def works(self, depths: tuple[Callable[[], int], Callable[[], int]] | None) -> None:
        """Note that the operator works with two queues, of jobs and of sweeps, or is on standby (None)."""
        self.leads.set(depths is not None)
        self.jobs.works = depths is not None
        self.work.follow(*(depths or (lambda: 0, lambda: 0)))
        if depths is None:
            self._denied.clear()
            self.sweeps.clear()

    def page(self) -> tuple[bytes, str]:
        """The answer to a scrape, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
