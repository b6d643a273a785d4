"""Train pods with GPUs."""

from typing import Any

from qlora_api.status import QLoRAJobStatus
from qlora_api.usage import UsageStatus
from tests.support.builders import time


def scheduled(body: dict[str, Any], at: float) -> dict[str, Any]:
    """The pod, with a node since then."""
    known = {"type": "PodScheduled", "status": "True", "lastTransitionTime": time(at)}
    return body | {"status": body["status"] | {"conditions": [known]}}


def usage_of(status: QLoRAJobStatus) -> UsageStatus:
    assert status.usage is not None
    return status.usage


def created(body: dict[str, Any], at: float) -> dict[str, Any]:
    return body | {"metadata": body["metadata"] | {"creationTimestamp": time(at)}}
