"""Views, from the sweep's status, of the pod that trains a cell with other cells."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_api.status import QLoRAJobStatus
from qlora_api.sweep.status import SweepPodStatus
from qlora_api.usage import PodUsage
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason

WAITING = "WaitingForSweep"


@dataclass(frozen=True, slots=True)
class PodName:
    """A pod by name and UID."""

    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class SharedPod:
    """The pod of a sweep, as one of the sweep's cells sees it."""

    sweep: str
    waits: Reason
    """Why it does not train the cell now."""
    alone: bool = False
    """Whether the cell has a separate train step now."""
    size: int = 1
    """How many cells the pod is to train, this one among them; 1 if it trains alone."""
    child: str = ""
    """The train Job, if it trains the cell or may do so."""
    pod: PodName | None = None
    """The pod that trains the cell now."""
    counted: tuple[PodUsage, ...] = ()
    """The pods that train, or have trained, the cell, with the GPU time of each."""


def shared_pod(job: QLoRAJob, pods: Sequence[SweepPodStatus] | None) -> SharedPod | None:
    """Return the pod that trains the job with other cells.

    Returns None for a job that trains alone from the beginning. `pods`: those of its sweep, None if there is no such
    sweep. They decide: a user may have removed the annotation of the cell.
    """
    own = next((pod for pod in pods or () if job.name in _names(pod)), None)
    if own is None and not (job.sweep and job.cells_in_pod > 1):
        return None
    if pods is None:
        return SharedPod(job.sweep, Reason(WAITING, f"QLoRASweep {job.sweep}, which trains this cell, does not exist"))
    counted = tuple(entry for pod in pods for entry in (pod.usage.pods if pod.usage else ()) if _trains(entry, job))
    if any(job.name in pod.alone for pod in pods):
        return SharedPod(job.sweep, Reason("", ""), alone=True, counted=counted)
    # Its sweep reports its pods right after it has created the cells.
    size = job.cells_in_pod if own is None else len((*own.cells, *own.waiting))
    if own is None or job.name not in own.cells:
        waits = own.message if own is not None and not own.cells else "the next train Job of its pod trains this cell"
        return SharedPod(job.sweep, Reason(WAITING, waits), size=size, counted=counted)
    child = own.step.job_name
    waits = f"Job {child} of QLoRASweep {job.sweep}, which trains this cell, does not run"
    why = f": {own.reason}: {own.message}" if own.message else ""
    pod = PodName(own.pod, own.pod_uid) if own.pod else None
    return SharedPod(job.sweep, Reason(WAITING, waits + why), size=size, child=child, pod=pod, counted=counted)


def with_size_of_pod(job: QLoRAJob, shared: SharedPod | None) -> QLoRAJob:
    """Return the job with its pod's number of cells by its sweep's status."""
    return replace(job, cells_in_pod=1 if shared is None else shared.size)


def waits_for_sweep(status: QLoRAJobStatus, shared: SharedPod | None) -> Reason | None:
    """Return why the cell does not get a train Job yet.

    Returns None if it does, or has one. The reason is Training while a pod of its sweep trains it.
    """
    step = status.step
    if shared is None or shared.alone or step is None or step.name != "train" or step.job_uid:
        return None
    if shared.pod is not None:
        return Reason("Training", f"QLoRASweep {shared.sweep} trains the adapter in pod {shared.pod.name}")
    return shared.waits


def trained_by(status: QLoRAJobStatus, shared: SharedPod | None) -> str:
    """Return the sweep whose pod trains the cell now, empty if none does."""
    found = waits_for_sweep(status, shared)
    return shared.sweep if shared is not None and found is not None and shared.pod is not None else ""


def may_be_trained(status: QLoRAJobStatus, shared: SharedPod | None) -> bool:
    """Whether the sweep has chosen the cell for a Job, of which a pod may still stop."""
    return shared is not None and bool(shared.child) and waits_for_sweep(status, shared) is not None


def _names(pod: SweepPodStatus) -> tuple[str, ...]:
    return (*pod.cells, *pod.waiting, *pod.alone)


def _trains(entry: PodUsage, job: QLoRAJob) -> bool:
    return job.uid in (entry.trained or ())
