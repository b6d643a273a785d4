"""Finds pods that a user has detached from their Job or hidden from the watches.

That takes a change of their labels or their owner. A step that has no Job yet keeps the pod that was running before it
until that pod is known to have ended: hiding it from the watches must not make room for a second one.
"""

import dataclasses
from collections.abc import Sequence

from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, StepStatus
from qlora_operator.decisions.observed.objects import Observed, Pod, QLoRAJob, collect


def misses_running_pod(observed: Observed, step: StepStatus) -> bool:
    """Whether the pod that was seen running is not observed, and may still run.

    A user who may change pods can remove the labels that watches, and Jobs, select by.
    """
    if not step.running_pod or any(pod.uid == step.running_pod for pod in observed.pods):
        return False
    return step.running_pod != step.counted_pod or observed.child(step.job_name) is None


def lacks_earlier_pod(step: StepStatus | None, observed: Observed) -> bool:
    """Whether a step without a Job waits for a pod that no watch shows."""
    return step is not None and not step.job_uid and misses_running_pod(observed, step)


def keep_earlier_pod(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed) -> QLoRAJobStatus:
    """Keep the running pod from before the step, as long as that has no Job."""
    step, stored = status.step, job.status.step
    if step is None or stored is None or step.job_uid:
        return status
    kept = with_running_pod(step, stored.running_pod, observed)
    return status if kept == step else replace(status, step=kept)


def with_running_pod(step: StepStatus, uid: str, observed: Observed) -> StepStatus:
    """Name the pod with this UID as the step's running one, or none if it has ended."""
    pod = next((pod for pod in observed.live_pods if pod.uid == uid), None)
    return replace(step, running_pod=pod.uid if pod else "", running_pod_name=pod.name if pod else "")


def hides_a_pod(observed: Observed, step: StepStatus) -> bool:
    """Whether the step's Job has more pods that have not ended than are observed."""
    child = observed.child(step.job_name)
    if child is None or child.finished or child.deleting:
        return False
    return child.active > sum(not pod.ended for pod in observed.pods_of(child.uid))


def with_detached_pods(job: QLoRAJob, observed: Observed, found: Sequence[Pod] = ()) -> Observed:
    """Add the pods detached from the step: the one seen running, and those in `found`.

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
    return collect(observed.children, (_claimed(pod, step) for pod in pods.values()))


def _claimed(pod: Pod, step: StepStatus) -> Pod:
    if pod.uid != step.running_pod:
        return pod
    if not step.job_uid:
        # A pod of an earlier Job is still ended by that Job; without a Job, by none.
        return pod if pod.detached or pod.owner_uid else dataclasses.replace(pod, detached=True)
    return pod if pod.owner_uid == step.job_uid else dataclasses.replace(pod, owner_uid=step.job_uid, detached=True)
