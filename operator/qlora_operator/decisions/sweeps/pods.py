"""Selects the prepared cells that one pod trains together, and follows its Job.

The pod has the attempts, retries and deadlines of a job's train step. After its Job has ended, each cell has a separate
train step, which reports the result of the pod, or continues alone from the checkpoint. `alone` stores that before, and
keeps it for good: no cell trains in two places.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from qlora_api.contract import ProgressRecord
from qlora_api.memory.advice import verdict
from qlora_api.memory.together import ShareOfMemory, add_up
from qlora_api.naming import (
    CELLS_ANNOTATION,
    JOB_LABEL,
    JOB_UID_LABEL,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    STEP_LABEL,
    child_job_name,
    sweep_pod_name,
)
from qlora_api.profile import Profile
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, Resolved, StepStatus
from qlora_api.sweep.spec import Cell, pods
from qlora_api.sweep.status import SweepPodStatus
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.conditions import condition, is_finished
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, Reason
from qlora_operator.decisions.observed.shared_pod import WAITING
from qlora_operator.decisions.plan import CreateJob, DeleteJob, plan
from qlora_operator.decisions.status import Decision, next_status_of_pod
from qlora_operator.decisions.sweeps.sweep import CellJob, Manifest, QLoRASweep, labels_of, owner_of
from qlora_operator.decisions.usage.usage import count_usage

MAX_DOCUMENTS = 240_000
"""Bytes of what one pod reads of all its cells: all annotations of a pod may have 262,144 together, and each cell may
get a gate when it has started."""
_COUNTED = ("failures", "disruptions", "active_seconds", "active_until", "last_failure")
"""The stored fields of the Job of a pod, as of that of a job."""

_State = Literal["ready", "coming", "out"]
"""State of a cell for its pod: prepared, to be prepared, or not waited for."""


@dataclass(frozen=True)
class PodFacts:
    """Observations of the pod of several cells."""

    observed: Observed
    now: datetime
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    progress: ProgressRecord | None = None
    progress_beside: ProgressRecord | None = None
    log_read: bool = False
    queue: Reason | None = None


@dataclass(frozen=True)
class PodPlan:
    """The next status of the pod, and the actions for it."""

    status: SweepPodStatus
    actions: tuple[CreateJob | DeleteJob, ...] = ()
    look_again: datetime | None = None
    store_first: bool = False
    """Whether to store the status before any action; the next pass decides again."""


@dataclass(frozen=True)
class _Cells:
    """The cells of a pod, by name."""

    jobs: Mapping[str, CellJob]
    names: tuple[str, ...]
    """Of those that its sweep still trains, in their order."""

    def ready(self) -> list[QLoRAJob]:
        """Those that are prepared, and wait to be trained."""
        found = ((self.jobs.get(name), _state(self.jobs.get(name))) for name in self.names)
        return [cell.job for cell, state in found if state == "ready" and cell is not None and cell.job is not None]

    def coming(self) -> list[str]:
        """Those that the others wait for, with their phases, for people."""
        return [f"{name} ({self.jobs[name].phase})" for name in self.names if _state(self.jobs.get(name)) == "coming"]


def pods_of(sweep: QLoRASweep, cells: Sequence[Cell]) -> list[tuple[SweepPodStatus, tuple[str, ...]]]:
    """Return each stored pod that trains several cells, with the names of its cells."""
    stored = {pod.number: pod for pod in sweep.status.pods}
    numbered = enumerate(pods(sweep.spec, cells))
    several = [(number, tuple(cell.name for cell in pod)) for number, pod in numbered if len(pod) > 1]
    return [(stored.get(number) or _new_pod(sweep, number), names) for number, names in several]


def name_of(sweep: QLoRASweep, pod: SweepPodStatus) -> str:
    """The first part of the names of the pod's Jobs."""
    return sweep_pod_name(sweep.name, pod.number)


def of_pod(observed: Observed, name: str) -> Observed:
    """Of the Jobs and pods of a sweep, those of one of its pods."""
    train = child_job_name(name, "train", 0).removesuffix("0")
    children = tuple(child for child in observed.children if child.name.startswith(train))
    return Observed(children, tuple(pod for pod in observed.pods if pod.name.startswith(train)))


def as_job(
    sweep: QLoRASweep, pod: SweepPodStatus, names: Sequence[str], jobs: Mapping[str, CellJob]
) -> QLoRAJob | None:
    """Return the pod as a job, never created, with a train step only.

    Returns None if no cell of it can be read. Its records have the UID of the first of its cells.
    """
    found = (jobs[name].job for name in names if name in jobs)
    cell = next((job for job in found if job is not None and job.status.resolved is not None), None)
    if cell is None or cell.status.resolved is None:
        return None
    running = any(_state(jobs.get(name)) == "ready" for name in pod.cells)
    # The cell compares its GPU hours with the limit.
    job = _as_job(sweep, pod, jobs, replace(cell.status.resolved, gpu_hours=None), stops=not running)
    priority = cell.queue_priority_class_name
    return dataclasses.replace(job, queue_name=cell.queue_name, queue_priority_class_name=priority)


def _as_job(
    sweep: QLoRASweep, pod: SweepPodStatus, jobs: Mapping[str, CellJob], resolved: Resolved, *, stops: bool
) -> QLoRAJob:
    """Return the pod as a job that has fixed these values."""
    uids = _uids(sweep, jobs)
    spec = replace(sweep.spec.template.spec, suspend=sweep.spec.suspend or stops, cleanup_after_seconds=None)
    stored = {name: getattr(pod, name) for name in (*_COUNTED, "step", "usage")}
    return QLoRAJob(
        namespace=sweep.namespace,
        name=name_of(sweep, pod),
        uid=uids.get(pod.cells[0], "") if pod.cells else "",
        generation=sweep.generation,
        resource_version=sweep.resource_version,
        deleting=False,
        spec=spec,
        status=QLoRAJobStatus(resolved=resolved, **stored),
    )


def cells_of(pod: SweepPodStatus, jobs: Mapping[str, CellJob]) -> list[QLoRAJob]:
    """The cells that the pod's train Job is to train, the first first."""
    found = (jobs[name].job for name in pod.cells if name in jobs)
    return [job for job in found if job is not None]


def next_pod(
    sweep: QLoRASweep, pod: SweepPodStatus, names: Sequence[str], jobs: Mapping[str, CellJob], facts: PodFacts
) -> PodPlan:
    """Plan the pod whose cells have these names.

    `jobs`: those that exist, also of other pods.
    """
    cells = _Cells(jobs, tuple(name for name in names if name not in pod.alone))
    job, observed = as_job(sweep, pod, names, jobs), facts.observed
    unfinished = [child for child in observed.children if not child.finished and not child.deleting]
    if job is None:
        # All cells that it could train are gone.
        deletions = tuple(DeleteJob(child.name, child.uid) for child in unfinished)
        return PodPlan(_with_reason(_counted(sweep, pod, jobs, facts), cells, None, Reason("", "")), deletions)
    known = _known(sweep, pod, jobs, job, facts)
    at_rest = not unfinished and not observed.live_pods
    if pod.ended:
        pod = replace(pod, usage=count_usage(job.status, known).usage)
        if at_rest:
            return PodPlan(_left_alone(sweep, pod, cells), store_first=True)
        deletions = tuple(DeleteJob(child.name, child.uid) for child in unfinished)
        return PodPlan(_with_reason(pod, cells, observed, _ending(observed)), deletions)
    needed = {ready.name for ready in cells.ready()}.intersection(pod.cells)
    if at_rest and observed.child(pod.step.job_name) is None and not (pod.step.job_uid and needed):
        attempt = pod.step.attempt + bool(pod.step.job_uid)
        step = _step(job.name, attempt) if pod.step.job_uid else pod.step
        pod = replace(pod, usage=count_usage(job.status, known).usage, step=step)
        chosen = _choose(sweep, pod, cells)
        if chosen.cells != pod.cells or chosen.alone != pod.alone or not chosen.cells:
            return PodPlan(chosen, store_first=chosen.cells != pod.cells or chosen.alone != pod.alone)
    return _follow(pod, cells, known, may_create=at_rest)


def _counted(sweep: QLoRASweep, pod: SweepPodStatus, jobs: Mapping[str, CellJob], facts: PodFacts) -> SweepPodStatus:
    """Count the GPU time of a pod without cells, which has its GPUs until it has ended."""
    profile = facts.profiles.get(sweep.spec.template.spec.scheduling.profile_name)
    if profile is None:
        return pod
    # No cell is left that has fixed a profile, and counting needs nothing else.
    of_today = Resolved(
        contract_version=1, profile=profile, claim_name="", claim_created=False, workspace_path="", document=""
    )
    job = _as_job(sweep, pod, jobs, of_today, stops=True)
    return replace(pod, usage=count_usage(job.status, _known(sweep, pod, jobs, job, facts)).usage)


def _known(
    sweep: QLoRASweep, pod: SweepPodStatus, jobs: Mapping[str, CellJob], job: QLoRAJob, facts: PodFacts
) -> Facts:
    """The facts about the pod as a job."""
    trains = tuple(uid for name in pod.cells if (uid := _uids(sweep, jobs).get(name)))
    return Facts(
        job=job,
        observed=facts.observed,
        profiles=facts.profiles,
        now=facts.now,
        progress=facts.progress,
        progress_beside=facts.progress_beside,
        log_read=facts.log_read,
        queue=facts.queue,
        trains=trains,
        gone=_gone(pod, trains, jobs),
    )


def build_pod_job(sweep: QLoRASweep, name: str, action: CreateJob, cells: Sequence[QLoRAJob]) -> Manifest:
    """Build the Job of a pod of that name that trains these cells.

    The sweep owns it: it outlives each cell.
    """
    first = cells[0]
    resolved = first.status.resolved
    if resolved is None:
        raise AssertionError("a cell that is prepared has started")
    manifest: dict[str, Any] = build_job(first, resolved, "train", action.attempt, action.failures, cells[1:])
    of_first = manifest["metadata"]["labels"]
    queue = {key: of_first[key] for key in (QUEUE_LABEL, QUEUE_PRIORITY_LABEL) if key in of_first}
    labels = labels_of(sweep) | {
        "app.kubernetes.io/name": "qlora-trainer",
        "app.kubernetes.io/instance": sweep.name,
        "app.kubernetes.io/component": "train",
        STEP_LABEL: "train",
        # By this label the chart's network policies isolate the pods of all steps.
        JOB_LABEL: name,
        JOB_UID_LABEL: sweep.uid,
    }
    note = {CELLS_ANNOTATION: ",".join(cell.name for cell in cells)}
    template = manifest["spec"]["template"]["metadata"]
    kept = {key: value for key, value in template["labels"].items() if key not in of_first}
    template["labels"], template["annotations"] = labels | kept, template["annotations"] | note
    manifest["metadata"] = {
        "name": child_job_name(name, "train", action.attempt),
        "namespace": sweep.namespace,
        "labels": labels | queue,
        "annotations": note,
        "ownerReferences": [owner_of(sweep, controller=True)],
    }
    return manifest


def _new_pod(sweep: QLoRASweep, number: int) -> SweepPodStatus:
    name = sweep_pod_name(sweep.name, number)
    return SweepPodStatus(number=number, step=_step(name, 1))


def _step(name: str, attempt: int) -> StepStatus:
    return StepStatus(name="train", job_name=child_job_name(name, "train", attempt), attempt=attempt)


def _uids(sweep: QLoRASweep, jobs: Mapping[str, CellJob]) -> dict[str, str]:
    """The UIDs of the cells by name, also of those that are gone."""
    return {line.name: line.uid for line in sweep.status.cells} | {name: job.uid for name, job in jobs.items()}


def _state(cell: CellJob | None) -> _State:
    """Return the state of the cell for its pod.

    One that cannot continue does not delay the others.
    """
    job = cell.job if cell is not None else None
    if cell is None or job is None or job.deleting or job.stops or job.problem:
        return "out"
    if is_finished(job.status):
        return "coming" if cell.retried else "out"
    if not cell.started:
        return "out" if cell.waits is not None else "coming"
    step = job.status.step
    if step is None or step.name == "prepare":
        return "coming"
    return "ready" if step.name == "train" and not step.job_uid and not _has_used_its_hours(job) else "out"


def _has_used_its_hours(job: QLoRAJob) -> bool:
    hours = job.status.resolved.gpu_hours if job.status.resolved is not None else None
    return hours is not None and job.status.usage is not None and job.status.usage.gpu_seconds >= hours * 3600


def _gone(pod: SweepPodStatus, trains: Sequence[str], jobs: Mapping[str, CellJob]) -> frozenset[str]:
    """Return UIDs of the pod's cells, also earlier ones, that count no more GPU time."""
    counted = (uid for entry in (pod.usage.pods if pod.usage else ()) for uid in entry.trained or ())
    counting = {
        cell.uid
        for cell in jobs.values()
        if cell.job is None or not (cell.job.deleting or is_finished(cell.job.status))
    }
    return frozenset((*trains, *counted)) - counting


def _choose(sweep: QLoRASweep, pod: SweepPodStatus, cells: _Cells) -> SweepPodStatus:
    """Select the cells of the pod's next Job: one that fits no other continues alone."""
    ready, coming = cells.ready(), cells.coming()
    if sweep.spec.suspend or coming or not ready:
        counted = f"{len(ready)} of {len(cells.names)} cells of this pod are prepared"
        why = f"{counted}: waiting for {', '.join(coming)}" if coming else counted
        pod = replace(pod, cells=())
        return _with_reason(pod, cells, None, Reason(WAITING, why))
    alike = [job for job in ready if _must_be_equal(job) == _must_be_equal(ready[0])]
    chosen = _fitting(alike)
    names = tuple(job.name for job in chosen)
    if len(chosen) == 1:
        pod = replace(pod, cells=(), alone=(*pod.alone, *names))
        return _with_reason(pod, cells, None, Reason(WAITING, "the cells that are left are trained one by one"))
    pod = replace(pod, cells=names)
    return _with_reason(pod, cells, None, Reason(WAITING, "its train Job is about to be created"))


def _must_be_equal(job: QLoRAJob) -> tuple[str, str]:
    """Return the values that only workspaces show: cells share all other pod settings."""
    resolved, base = job.status.resolved, job.status.base
    return resolved.profile.image if resolved is not None else "", base.sha256 if base is not None else ""


def _fitting(jobs: Sequence[QLoRAJob]) -> Sequence[QLoRAJob]:
    """Return the first cells that surely fit one pod and GPU together, one at least."""
    count = len(jobs)
    while count > 1 and not (_fit_gpu(jobs[:count]) and _bytes(jobs[:count]) <= MAX_DOCUMENTS):
        count -= 1
    return jobs[:count]


def _fit_gpu(jobs: Sequence[QLoRAJob]) -> bool:
    """Whether the cells fit the GPU together, as far as that is known."""
    shares = [share for job in jobs if (share := ShareOfMemory.from_status(job.status.memory)) is not None]
    gpu_gib = jobs[0].spec.resources.gpu_gib
    return len(shares) < len(jobs) or gpu_gib is None or verdict(add_up(shares), gpu_gib) != "exceeds"


def _bytes(jobs: Sequence[QLoRAJob]) -> int:
    resolved = (job.status.resolved for job in jobs)
    return sum(len((each.document or "").encode()) for each in resolved if each is not None)


def _follow(pod: SweepPodStatus, cells: _Cells, facts: Facts, *, may_create: bool) -> PodPlan:
    """The plan for a pod that has a Job, or is about to get one."""
    job, observed = facts.job, facts.observed
    if _is_to_be_replaced(pod, cells, observed):
        # A cell of its Job is suspended, deleted or has failed, and no pod of it runs.
        step = replace(_step(job.name, pod.step.attempt + 1), failures=pod.step.failures)
        status = replace(job.status, step=step, usage=count_usage(job.status, facts).usage)
    else:
        status = next_status_of_pod(facts)
    step = status.step or pod.step
    ended = is_finished(status) or step.name != "train"
    changes = {name: getattr(status, name) for name in (*_COUNTED, "usage")}
    found = replace(pod, **changes, step=pod.step if ended else step, ended=ended)
    why = condition(status, "Succeeded")
    reason = Reason(why.reason, why.message) if why is not None else Reason("", "")
    found = _with_reason(found, cells, observed, reason)
    if ended:
        return PodPlan(found, store_first=True)
    planned = plan(job, Decision.from_status(job, status, observed), observed, facts.now)
    allowed = CreateJob | DeleteJob if may_create else DeleteJob
    actions = tuple(action for action in planned.actions if isinstance(action, allowed))
    # Which cells a Job trains is stored under its name before it exists.
    new = step.job_name != pod.step.job_name and any(isinstance(action, CreateJob) for action in actions)
    return PodPlan(found, actions, planned.look_again, store_first=planned.store_first or new)


def _is_to_be_replaced(pod: SweepPodStatus, cells: _Cells, observed: Observed) -> bool:
    """Whether its Job trains a cell that it must not, and no pod of it has begun."""
    child = observed.child(pod.step.job_name)
    if child is None or child.finished:
        return False
    if any(not (each.ended or each.starting) for each in observed.pods_of(child.uid)):
        return False
    ready = {job.name for job in cells.ready()}
    return bool(ready.intersection(pod.cells)) and not ready.issuperset(pod.cells)


def _left_alone(sweep: QLoRASweep, pod: SweepPodStatus, cells: _Cells) -> SweepPodStatus:
    """End the pod's Job: each of its cells has a separate train step from now on."""
    left = _Cells(cells.jobs, tuple(name for name in cells.names if name not in pod.cells))
    step = _step(name_of(sweep, pod), pod.step.attempt + 1)
    pod = replace(pod, cells=(), alone=(*pod.alone, *pod.cells), ended=False, step=step)
    pod = replace(pod, failures=0, disruptions=0, active_seconds=0)
    return _with_reason(pod, left, None, Reason("", ""))


def _ending(observed: Observed) -> Reason:
    names = ", ".join(pod.name for pod in observed.live_pods)
    return Reason("WaitingForPod", f"pod {names} must end before its cells continue" if names else "its Job is deleted")


def _with_reason(pod: SweepPodStatus, cells: _Cells, observed: Observed | None, reason: Reason) -> SweepPodStatus:
    """Add the Job's running pod, or the reason for none, and the waiting cells."""
    running = observed.reporting_pod(pod.step.job_uid) if observed is not None else None
    waiting = tuple(name for name in cells.names if name not in pod.cells and name not in pod.alone)
    return replace(
        pod,
        pod=running.name if running is not None else "",
        pod_uid=running.uid if running is not None else "",
        reason=reason.word,
        message=reason.sentence,
        waiting=waiting,
    )
