"""Metrics of the operator's work on jobs and on sweeps: the queue, the reconciles, the writes of a status."""

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from qlora_api.spec.job import KIND
from qlora_api.sweep.spec import SWEEP_KIND

_LABELS = ("kind",)
_WAIT_BUCKETS = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300)
"""Seconds."""


@dataclass(frozen=True)
class KindMetrics:
    """The work on one kind."""

    depth: Gauge
    wait: Histogram
    duration: Histogram
    errors: Counter
    writes: Counter
    write_errors: Counter


class WorkMetrics:
    """The work on each kind. All series exist from the start: one that begins with 1 has no increase."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._depth = Gauge(
            "qlora_operator_queue_depth", "Jobs or sweeps that wait for a worker.", _LABELS, registry=registry
        )
        self._wait = Histogram(
            "qlora_operator_queue_wait_seconds",
            "Time from when a job or a sweep was due until a worker took it.",
            _LABELS,
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self._duration = Histogram(
            "qlora_operator_reconcile_duration_seconds", "Duration of one reconcile.", _LABELS, registry=registry
        )
        self._errors = Counter(
            "qlora_operator_reconcile_errors", "Reconciles that failed and are retried.", _LABELS, registry=registry
        )
        self._writes = Counter("qlora_operator_status_writes", "Status writes.", _LABELS, registry=registry)
        self._write_errors = Counter(
            "qlora_operator_status_write_errors",
            "Status writes that the API server rejected or did not answer; they are retried.",
            _LABELS,
            registry=registry,
        )
        self.jobs, self.sweeps = self._on(KIND), self._on(SWEEP_KIND)

    def _on(self, kind: str) -> KindMetrics:
        return KindMetrics(
            depth=self._depth.labels(kind),
            wait=self._wait.labels(kind),
            duration=self._duration.labels(kind),
            errors=self._errors.labels(kind),
            writes=self._writes.labels(kind),
            write_errors=self._write_errors.labels(kind),
        )

    def follow(self, jobs: Callable[[], int], sweeps: Callable[[], int]) -> None:
        """Show these depths of the queues from now on."""
        self.jobs.depth.set_function(jobs)
        self.sweeps.depth.set_function(sweeps)
