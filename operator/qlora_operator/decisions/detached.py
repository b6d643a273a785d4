"""Finds pods that somebody has taken away from their Job or from the watches, by their labels or their owner; pure."""

from collections.abc import Sequence
from dataclasses import replace

from qlora_api.status import StepStatus
from qlora_operator.decisions.observe import Observed, Pod, QLoRAJob, collect


def misses_running_pod(observed: Observed, step: StepStatus) -> bool:
    """Whether the pod that was seen running is not among those that are observed, and may run on all the same.

    Whoever may change pods can take away the labels by which they are watched, and by which a Job knows its own.
    """
    if not step.job_uid or any(pod.uid == step.running_pod for pod in observed.pods):
        return False
    return bool(step.running_pod) and (step.running_pod != step.counted_pod or observed.child(step.job_name) is None)


def hides_a_pod(observed: Observed, step: StepStatus) -> bool:
    """Whether the step's Job has more pods that have not ended than are observed."""
    child = observed.child(step.job_name)
    if child is None or child.finished or child.deleting:
        return False
    return child.active > sum(not pod.ended for pod in observed.pods_of(child.uid))


def with_detached_pods(job: QLoRAJob, observed: Observed, found: Sequence[Pod] = ()) -> Observed:
    """With the pods that were taken away from the current step: the one that was seen running, and those of `found`.

    `found`: pods that the list by the job's label has not shown; others may be among them.
    """
    step = job.status.step
    if step is None or not step.job_uid:
        return observed
    if not found and all(pod is _claimed(pod, step) for pod in observed.pods):
        return observed
    pods = {pod.uid: pod for pod in observed.pods}
    for pod in found:
        if pod.uid == step.running_pod or pod.owner_uid == step.job_uid:
            pods.setdefault(pod.uid, pod)
    return collect(observed.children, (_claimed(pod, step) for pod in pods.values()), observed.lost)


def _claimed(pod: Pod, step: StepStatus) -> Pod:
    if pod.uid != step.running_pod or pod.owner_uid == step.job_uid:
        return pod
    return replace(pod, owner_uid=step.job_uid, detached=True)
