"""Prometheus metrics of the operator."""

from collections.abc import Callable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from qlora_api.status import Phase
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
        self._depth = Gauge("qlora_operator_queue_depth", "Jobs that wait for a worker.", registry=self.registry)
        self._jobs = Gauge("qlora_jobs", "QLoRAJobs by phase.", ["phase"], registry=self.registry)
        self._phases: dict[Key, Phase] = {}
        for phase in PHASES:
            self._jobs.labels(phase)

    def job_is_in(self, key: Key, phase: Phase | None) -> None:
        """Count the job in `phase`, or in none if it is gone."""
        if old := self._phases.pop(key, None):
            self._jobs.labels(old).dec()
        if phase is not None:
            self._phases[key] = phase
            self._jobs.labels(phase).inc()

    def serve(self, port: int, depth: Callable[[], int]) -> None:
        """Serve /metrics on `port` from a thread of its own. `depth` is called on each scrape."""
        self._depth.set_function(depth)
        start_http_server(port, registry=self.registry)
