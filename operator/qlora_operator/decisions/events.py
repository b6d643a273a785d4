"""Builds the Events of a job, and of a sweep."""

import hashlib
from datetime import datetime
from typing import Any

from qlora_api.spec.job import API_VERSION, KIND
from qlora_api.status import Phase, QLoRAJobStatus
from qlora_api.sweep.spec import SWEEP_KIND
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decisions.observed.conditions import condition, truncate
from qlora_operator.decisions.observed.endings import CANCELLED
from qlora_operator.decisions.observed.objects import QLoRAJob, format_time
from qlora_operator.decisions.sweeps.sweep import QLoRASweep, StoredSweep

_COMPONENT = "qlora-operator"
# kubectl shows the Events of one second in the order of their names.
_ORDER: tuple[Phase, ...] = ("Pending", "Preparing", "Queued", "Training", "Publishing")


def phase_event(job: QLoRAJob, status: QLoRAJobStatus, now: datetime) -> dict[str, Any] | None:
    """Build the Event of a phase change, or None if the phase stays.

    Its name derives from the change and from the version before it: a job that is preempted again passes the same
    phases with the same figures, and gets a new Event each time.
    """
    if status.phase is None or status.phase == job.status.phase:
        return None
    succeeded = condition(status, "Succeeded")
    message = succeeded.message if succeeded else ""
    reason = succeeded.reason if succeeded and status.phase == "Failed" else status.phase
    name = f"{_rank(status.phase)}{_digest(_identity(job, status))}"
    warning = status.phase == "Failed" and reason != CANCELLED
    return _build(_metadata(job), reason, message, now, warning=warning, name=name)


def progress_event(job: QLoRAJob, status: QLoRAJobStatus, now: datetime) -> dict[str, Any] | None:
    """Build the Event of a step that has stopped making progress, or None otherwise."""
    found, before = condition(status, "Progressing"), condition(job.status, "Progressing")
    if found is None or found.status != "False" or (before is not None and before.status == "False"):
        return None
    since = status.step.progressed_at if status.step else None
    name = _digest(f"{job.uid} no progress since {since}")
    return _build(_metadata(job), found.reason, found.message, now, warning=True, name=name)


def tracking_event(job: QLoRAJob, status: QLoRAJobStatus, now: datetime) -> dict[str, Any] | None:
    """Build the Event of a run that a tracking server rejected, or None otherwise."""
    if status.tracking is None or status.tracking == job.status.tracking or not status.tracking.failures:
        return None
    why = "; ".join(f"{tracker}: {message}" for tracker, message in status.tracking.failures.items())
    message = f"the adapter is published, and its run could not be uploaded to {why}"
    return _build(_metadata(job), "TrackingFailed", message, now, warning=True, name=_digest(f"{job.uid} {why}"))


def announcement_event(job: QLoRAJob, status: QLoRAJobStatus, now: datetime) -> dict[str, Any] | None:
    """Build the Event of an adapter that cannot be announced, or None otherwise."""
    found, before = status.announcement, job.status.announcement
    if found is None or not found.rejection or (before is not None and before.rejection):
        return None
    name = _digest(f"{job.uid} {job.resource_version} not announced")
    return _build(_metadata(job), "AnnouncementRejected", found.rejection, now, warning=True, name=name)


def budget_event(job: QLoRAJob, status: QLoRAJobStatus, now: datetime) -> dict[str, Any] | None:
    """Build the Event of a job that is newly expected to exceed its budget."""
    found, before = status.forecast, job.status.forecast
    if found is None or found.within_budget is not False or (before is not None and before.within_budget is False):
        return None
    if status.phase == "Failed":
        return None  # the Event of that phase has the same content
    name = _digest(f"{job.uid} {job.resource_version} ForecastExceedsBudget")
    return _build(_metadata(job), "ForecastExceedsBudget", found.message, now, warning=True, name=name)


def sweep_event(sweep: QLoRASweep | StoredSweep, status: QLoRASweepStatus, now: datetime) -> dict[str, Any] | None:
    """Build the Event of a sweep's phase change, or None if the phase stays."""
    before, phase = sweep.status.phase, status.phase
    if phase is None or phase == before:
        return None
    found = condition(status, "Succeeded")
    reason = found.reason if found and phase == "Failed" else phase
    name = _digest(f"{sweep.uid} {sweep.resource_version} {before} {phase}")
    message = found.message if found else ""
    return _build(_metadata(sweep), reason, message, now, warning=phase == "Failed", name=name, kind=SWEEP_KIND)


def unreadable_event(body: dict[str, Any], message: str, now: datetime, kind: str = KIND) -> dict[str, Any]:
    """Build the Event of a job or sweep that this operator cannot read.

    Its status cannot be written.
    """
    metadata = body["metadata"]
    identity = f"unreadable {metadata['uid']} {metadata.get('generation')}"
    return _build(metadata, "InvalidSpec", message, now, warning=True, name=_digest(identity), kind=kind)


def _identity(job: QLoRAJob, status: QLoRAJobStatus) -> str:
    return f"{job.uid} {job.resource_version} {job.status.phase} {status.phase}"


def _metadata(job: QLoRAJob | QLoRASweep | StoredSweep) -> dict[str, Any]:
    return {"namespace": job.namespace, "name": job.name, "uid": job.uid, "resourceVersion": job.resource_version}


def _rank(phase: Phase) -> int:
    """Rank a phase by its place in a job's life, with ends and suspensions last."""
    return _ORDER.index(phase) if phase in _ORDER else len(_ORDER)


def _digest(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _build(
    metadata: dict[str, Any],
    reason: str,
    message: str,
    now: datetime,
    *,
    warning: bool,
    name: str,
    kind: str = KIND,
) -> dict[str, Any]:
    time = format_time(now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{name}", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": kind,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        },
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": truncate(message, 1000),
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": _COMPONENT},
        "reportingComponent": _COMPONENT,
        "reportingInstance": _COMPONENT,
    }
