"""Views, from the sweep's status, of the pod that trains a cell with other cells."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    named = (name for pod in pods or () for name in (*pod.cells, *pod.waiting, *pod.alone))
    if not is_shared(job) and job.name not in named:
        return None
    if pods is None:
        return SharedPod(job.sweep, Reason(WAITING, f"QLoRASweep {job.sweep}, which trains this cell, does not exist"))
    counted = tuple(entry for pod in pods for entry in (pod.usage.pods if pod.usage else ()) if _trains(entry, job))
    if any(job.name in pod.alone for pod in pods):
        return SharedPod(job.sweep, Reason("", ""), alone=True, counted=counted)
    found = next((pod for pod in pods if job.name in pod.cells), None)
    if found is None:
        own = next((pod for pod in pods if job.name in pod.waiting), None)
        waits = own.message if own is not None and not own.cells else "the next train Job of its pod trains this cell"
        return SharedPod(job.sweep, Reason(WAITING, waits), counted=counted)
    waits = f"Job {found.step.job_name} of QLoRASweep {job.sweep}, which trains this cell, does not run"
    why = f": {found.reason}: {found.message}" if found.message else ""
    pod = PodName(found.pod, found.pod_uid) if found.pod else None
    return SharedPod(job.sweep, Reason(WAITING, waits + why), child=found.step.job_name, pod=pod, counted=counted)


def is_shared(job: QLoRAJob) -> bool:
    """Whether the job is a cell that its sweep trains in one pod with others."""
    return bool(job.sweep) and job.cells_in_pod > 1


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


def _trains(entry: PodUsage, job: QLoRAJob) -> bool:
    return job.uid in (entry.trained or ())
