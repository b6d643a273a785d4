"""Finds which pod has ended an attempt on several nodes.

The pods start and end together. When one ends, the others do too: with the failure that it has sent them, because they
have lost it, or because their Job has failed and is stopped. The attempt counts once, for the first pod in this order:
one that failed by itself, that waited for the others until the limit, that was stopped from outside, that has lost a
peer.
"""

from qlora_api.status import StepName
from qlora_operator.decisions.observed.objects import ChildJob, Pod, QLoRAJob, format_time


def trains_together(job: QLoRAJob, step: StepName) -> bool:
    """Whether an attempt of the step is several pods."""
    return step == "train" and job.spec.resources.node_count > 1


def is_own_failure(pod: Pod) -> bool:
    """Whether the pod itself caused its end."""
    return pod.fatal or pod.rejected or pod.unsupported or (pod.failed and not _is_echo(pod))


def ending_pod(pods: tuple[Pod, ...], child: ChildJob | None) -> Pod | None:
    """Return the pod that ended the attempt.

    Returns None as long as the attempt runs, or a pod that still runs may be the cause. `child`: the Job of the pods;
    None if it is deleted.
    """
    if child is not None and child.resumed is not None:
        # Those were stopped by the queue that has resumed the Job since. Not all that are older than its start time
        # were: the Job controller creates pods, and then notes when it has resumed their Job.
        resumed = child.resumed
        pods = tuple(pod for pod in pods if not pod.stopped_by(resumed))
    ended = [pod for pod in pods if pod.ended and not pod.exited_well]
    found = min(ended, key=_order, default=None)
    if found is None or found.fatal or child is None:
        return found
    if not child.finished:
        # Its Job ignores pods that have stopped as asked. For any other it is about to fail, and asks the rest to stop.
        return found if not child.failing and all(pod.asked_to_stop for pod in ended) else None
    return found if is_own_failure(found) or all(pod.ended for pod in pods) else None


def is_over(pods: tuple[Pod, ...], child: ChildJob | None) -> bool:
    """Whether no pod of the attempt can still run or report its cause.

    Pods that never ran cannot. Those that had finished their part may still exist. `child`: as above.
    """
    if pods and child is not None and child.failure is None:
        return False
    return all(pod.ended for pod in pods)


def _order(pod: Pod) -> tuple[int, str, int]:
    first = [
        pod.fatal,
        pod.decisive,
        is_own_failure(pod),
        pod.missed_peers,
        pod.interrupted and not pod.lost_peer,
    ]
    ended = pod.termination.finished if pod.termination and pod.termination.finished else pod.created
    return (first.index(True) if True in first else len(first), format_time(ended), pod.node)


def _is_echo(pod: Pod) -> bool:
    return pod.lost_peer or pod.missed_peers
