"""Metrics of the operator's requests to the API server.

Those of the watches are not among them: kopf sends them, and `watches` counts their events.
"""

from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Histogram

RESOURCES = frozenset(
    {
        "configmaps",
        "controllerrevisions",
        "events",
        "jobs",
        "leases",
        "namespaces",
        "networkpolicies",
        "openapi",
        "persistentvolumeclaims",
        "pods",
        "pods/log",
        "qlorajobs",
        "qlorajobs/status",
        "qloraprofiles",
        "qloraprofiles/status",
        "qlorasweeps",
        "qlorasweeps/status",
        "services",
        "workloads",
    }
)
OTHER = "other"
NO_ANSWER = "none"
_BUCKETS = (0.005, 0.025, 0.1, 0.25, 1, 2.5, 10)
"""Seconds. A request ends after 15 at the latest."""


class RequestMetrics:
    """Counts requests and the time of their answers.

    No label has the name of an object or of a namespace.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "qlora_operator_api_requests",
            "Requests to the API server, by the status of the answer (none: no answer).",
            ["method", "resource", "code"],
            registry=registry,
        )
        self.duration = Histogram(
            "qlora_operator_api_request_duration_seconds",
            "Time until the API server's answer had been read.",
            ["method", "resource"],
            buckets=_BUCKETS,
            registry=registry,
        )

    def observe(self, method: str, path: str, status: int | None, seconds: float) -> None:
        """Note one request. `status`: of the answer, None without one."""
        resource = resource_of(path)
        self.requests.labels(method, resource, _code(status)).inc()
        self.duration.labels(method, resource).observe(seconds)


def resource_of(path: str) -> str:
    """Return the resource in a request's path, with its subresource, or "other"."""
    parts = path.strip("/").split("/")
    if parts[0] == "openapi":
        return "openapi"
    parts = parts[{"api": 2, "apis": 3}.get(parts[0], len(parts)) :]
    if parts[:1] == ["namespaces"] and len(parts) > 2:
        parts = parts[2:]
    resource = "/".join((*parts[:1], *parts[2:3]))
    return resource if resource in RESOURCES else OTHER


def _code(status: int | None) -> str:
    """Return the status if HTTP defines it: a proxy may answer with anything."""
    if status is None:
        return NO_ANSWER
    return str(status) if status in HTTPStatus._value2member_map_ else OTHER
