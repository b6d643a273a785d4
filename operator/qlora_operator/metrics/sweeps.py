"""Metrics of sweeps: how many are in each phase, and how long they took."""

import collections
from collections.abc import Iterator
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_api.sweep.status import QLoRASweepStatus, SweepPhase
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.keys import Key
from qlora_operator.metrics.transitions import PHASE_BUCKETS, seconds_between

SWEEP_PHASES: tuple[SweepPhase, ...] = get_args(SweepPhase)
_ENDED: tuple[SweepPhase, ...] = ("Succeeded", "Failed")


class SweepMetrics(Collector):
    """The sweeps of the working operator, none on standby."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._phases: dict[Key, Any] = {}
        self._duration = Histogram(
            "qlora_sweep_duration_seconds",
            "Time from a sweep's start to its end. The count is that of sweeps that have ended.",
            ["phase"],
            buckets=PHASE_BUCKETS,
            registry=registry,
        )
        for phase in _ENDED:
            self._duration.labels(phase)
        registry.register(self)

    def show(self, key: Key, body: Object | None) -> None:
        """Note the sweep as it is stored, or None if there is none of that name."""
        if body is None:
            self._phases.pop(key, None)
        else:
            self._phases[key] = (body.get("status") or {}).get("phase")

    def written(self, key: Key, before: QLoRASweepStatus, after: QLoRASweepStatus) -> None:
        """Note that the status of the sweep has been stored."""
        self._phases[key] = after.phase
        if after.phase not in _ENDED or before.phase in _ENDED:
            return
        seconds = seconds_between(after.start_time, after.completion_time)
        if seconds is not None:
            self._duration.labels(after.phase).observe(seconds)

    def clear(self) -> None:
        """Drop all of them: the operator that works now has newer ones."""
        self._phases.clear()

    def known(self) -> tuple[Key, ...]:
        """The sweeps that are counted: of a deleted one, a watch may have missed the end."""
        return tuple(self._phases)

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        family = GaugeMetricFamily("qlora_sweeps", "QLoRASweeps by phase.", labels=("namespace", "phase"))
        counted = collections.Counter((namespace, phase) for (namespace, _), phase in self._phases.items())
        for namespace in sorted({namespace for namespace, _ in counted}):
            for phase in SWEEP_PHASES:
                family.add_metric((namespace, phase), counted[namespace, phase])
        yield family
