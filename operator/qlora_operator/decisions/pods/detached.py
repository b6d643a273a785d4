"""Finds pods that somebody has taken away from their Job or from the watches, by their labels or their owner; pure.

A step that has no Job yet keeps the pod that was seen running before it, until that pod is known to have ended: what
takes it away from the watches must not make room for a second one.
"""

from collections.abc import Sequence
from dataclasses import replace

from qlora_api.status import QLoRAJobStatus, StepStatus
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Observed, Pod, QLoRAJob, collect


def misses_running_pod(observed: Observed, step: StepStatus) -> bool:
    """Whether the pod that was seen running is not among those that are observed, and may run on all the same.

    Whoever may change pods can take away the labels by which they are watched, and by which a Job knows its own.
    """
    if not step.running_pod or any(pod.uid == step.running_pod for pod in observed.pods):
        return False
    return step.running_pod != step.counted_pod or observed.child(step.job_name) is None


def lacks_earlier_pod(step: StepStatus | None, observed: Observed) -> bool:
    """Whether a step without a Job waits for a pod that is not among those observed, so that no watch shows its end."""
    return step is not None and not step.job_uid and misses_running_pod(observed, step)


def keep_earlier_pod(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """The status whose step, as long as it has no Job, keeps the pod that was seen running before it and still runs."""
    step, stored = status.step, facts.job.status.step
    if step is None or stored is None or step.job_uid:
        return status
    kept = step.model_copy(update=still_running(stored, facts.observed))
    return status if kept == step else status.model_copy(update={"step": kept})


def still_running(step: StepStatus, observed: Observed) -> dict[str, str]:
    """The fields of a step that name the pod that was seen running, if it has not ended; empty values if it has."""
    pod = next((pod for pod in observed.live_pods if pod.uid == step.running_pod), None)
    return {"running_pod": pod.uid if pod else "", "running_pod_name": pod.name if pod else ""}


def hides_a_pod(observed: Observed, step: StepStatus) -> bool:
    """Whether the step's Job has more pods that have not ended than are observed."""
    child = observed.child(step.job_name)
    if child is None or child.finished or child.deleting:
        return False
    return child.active > sum(not pod.ended for pod in observed.pods_of(child.uid))


def with_detached_pods(job: QLoRAJob, observed: Observed, found: Sequence[Pod] = ()) -> Observed:
    """With the pods that were taken away from the step: the one that was seen running, and those of `found`.

    `found`: pods that the list by the job's label has not shown; others may be among them.
    """
    step = job.status.step
    if step is None or not (step.job_uid or step.running_pod):
        return observed
    if not found and all(pod is _claimed(pod, step) for pod in observed.pods):
        return observed
    pods = {pod.uid: pod for pod in observed.pods}
    for pod in found:
        if pod.uid == step.running_pod or (step.job_uid and pod.owner_uid == step.job_uid):
            pods.setdefault(pod.uid, pod)
    return collect(observed.children, (_claimed(pod, step) for pod in pods.values()), observed.lost)


def _claimed(pod: Pod, step: StepStatus) -> Pod:
    if pod.uid != step.running_pod:
        return pod
    if not step.job_uid:
        # Of an earlier Job, which still ends it, or of none, and then nobody does.
        return pod if pod.detached or pod.owner_uid else replace(pod, detached=True)
    return pod if pod.owner_uid == step.job_uid else replace(pod, owner_uid=step.job_uid, detached=True)
