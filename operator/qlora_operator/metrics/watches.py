"""Metrics of the watches: their events, when each had the last, and how often all have begun again."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from qlora_api.profile import PROFILE_PLURAL
from qlora_api.spec.job import PLURAL
from qlora_api.sweep.spec import SWEEP_PLURAL

_RESOURCES = (PLURAL, SWEEP_PLURAL, PROFILE_PLURAL, "jobs", "pods")
_LISTED = "LISTED"
_TYPES = ("ADDED", "MODIFIED", "DELETED", _LISTED)


class WatchMetrics:
    """The watch of each resource. `RequestMetrics` does not have their requests, which kopf makes."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._events = Counter(
            "qlora_operator_watch_events",
            f"Events of the watches, by resource and type ({_LISTED}: an object from before the watch).",
            ["resource", "type"],
            registry=registry,
        )
        self._heard = Gauge(
            "qlora_operator_watch_last_event_timestamp_seconds",
            "When the watch of the resource last had an event, in seconds since 1970.",
            ["resource"],
            registry=registry,
        )
        self._restarts = Counter(
            "qlora_operator_watch_restarts",
            "How often all watches have begun again, after an error or the silence of one of them.",
            registry=registry,
        )
        for resource in _RESOURCES:
            for kind in _TYPES:
                self._events.labels(resource, kind)

    def event(self, resource: str, kind: str | None) -> None:
        """Note an event of that type; None for an object that the watch has listed first."""
        self._events.labels(resource, kind or _LISTED).inc()
        self._heard.labels(resource).set(self._clock())

    def restarted(self) -> None:
        """Note that the watches have ended and begin again."""
        self._restarts.inc()
