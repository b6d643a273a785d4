"""Prometheus metrics of the operator."""

from collections.abc import Callable
from typing import get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qlora_api.status import Phase
from qlora_operator.gpu_metrics import GpuSeconds
from qlora_operator.workqueue import Key

PHASES: tuple[Phase, ...] = get_args(Phase)


class Metrics:
    """The operator's metrics. None has a job's name as a label: there would be too many series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconcile_duration = Histogram(
            "qlora_operator_reconcile_duration_seconds", "Duration of one reconcile.", registry=self.registry
        )
        self.reconcile_errors = Counter(
            "qlora_operator_reconcile_errors", "Reconciles that failed and are retried.", registry=self.registry
        )
        self.status_writes = Counter("qlora_operator_status_writes", "Status writes.", registry=self.registry)
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
        self._depth = Gauge("qlora_operator_queue_depth", "Jobs that wait for a worker.", registry=self.registry)
        self._jobs = Gauge("qlora_jobs", "QLoRAJobs by phase.", ["phase"], registry=self.registry)
        self._stalled = Gauge(
            "qlora_jobs_without_progress",
            "QLoRAJobs whose condition Progressing is False.",
            registry=self.registry,
        )
        self._phases: dict[Key, dict[str, Phase]] = {}
        """Of each name, by UID: a job and the one that replaces it are there together for a moment."""
        self._without_progress: set[str] = set()
        for phase in PHASES:
            self._jobs.labels(phase)

    def job_is_in(self, key: Key, uid: str, phase: Phase | None, *, progresses: bool = True) -> None:
        """Count the job in `phase`, or in none if it is gone.

        `progresses`: unless its condition Progressing is False.
        """
        phases = self._phases.setdefault(key, {})
        if old := phases.pop(uid, None):
            self._jobs.labels(old).dec()
        if phase is not None:
            phases[uid] = phase
            self._jobs.labels(phase).inc()
        if not phases:
            del self._phases[key]
        self._without_progress.discard(uid)
        if phase is not None and not progresses:
            self._without_progress.add(uid)
        self._stalled.set(len(self._without_progress))

    def job_is_gone(self, key: Key, *, replaced_by: str = "") -> None:
        """Count no job of that name, but the one with the UID `replaced_by`."""
        for uid in tuple(self._phases.get(key, ())):
            if uid != replaced_by:
                self.job_is_in(key, uid, None)

    def namespace_is_denied(self, namespace: str | None, denied: bool) -> None:
        """Note whether the namespace, or the cluster (None), can be listed."""
        self._denied.labels(namespace or "").set(denied)

    def works(self, depth: Callable[[], int] | None) -> None:
        """Note that the operator works with a queue, or stands by (None) and knows nothing of the jobs."""
        self.leads.set(depth is not None)
        self._depth.set_function(depth or (lambda: 0))
        if depth is None:
            self._denied.clear()
            for key in tuple(self._phases):
                self.job_is_gone(key)

    def page(self) -> tuple[bytes, str]:
        """The answer to a scrape, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
