"""Jobs of several nodes."""

from typing import Any

from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.observed.objects import QLoRAJob
from tests.support.builders import child, ended, make_job, result, status_in

PEER_LOST, PEERS_MISSING, INTERRUPTED, UNREACHABLE = 201, 202, 143, 200


def job_in(status: QLoRAJobStatus | None = None, nodes: int = 2, **spec: Any) -> QLoRAJob:
    return make_job(status or status_in("train"), resources={"nodes": nodes}, **spec)


def told(body: dict[str, Any], code: int, reason: str, message: str = "", end: float = -10) -> dict[str, Any]:
    """The pod after its trainer has ended with that record."""
    return ended(body, code, result(body, "train", code, reason=reason, message=message), end=end)


ENDED_BY_ITS_POLICY = child("train", Failed="PodFailurePolicy")
RUNS = child("train")


def counts(status: QLoRAJobStatus) -> tuple[int, int, int]:
    """Failures, disruptions, and the number of the step's Job."""
    assert status.step is not None
    return status.failures, status.disruptions, status.step.attempt
