"""Metrics of the requests of clients. No label has the name of a user, a namespace or an object."""

from prometheus_client import CollectorRegistry, Counter, Histogram


class RequestMetrics:
    """Counts requests and the time of their answers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "qlora_door_requests",
            "Requests of clients, by route and by the status of the answer.",
            ["method", "route", "code"],
            registry=registry,
        )
        self._duration = Histogram(
            "qlora_door_request_duration_seconds",
            "Time until the answer was written; of an upload, until all of it had arrived.",
            ["method", "route"],
            registry=registry,
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(method, route, str(status)).inc()
        self._duration.labels(method, route).observe(seconds)
