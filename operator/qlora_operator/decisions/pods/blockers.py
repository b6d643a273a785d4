"""Finds the reason that blocks a step's Job, with what to do about it."""

from datetime import datetime, timedelta

from qlora_operator.decisions.observed.objects import ChildJob, Observed, Pod, Reason
from qlora_operator.decisions.pods.kueue import not_supported

POD_DETACHED = "PodDetached"
NO_POD_AFTER = timedelta(seconds=60)
STUCK_AFTER = timedelta(seconds=60)
# An image of several gigabytes takes a while; the kubelet tries a volume again after at most two minutes.
VOLUMES_AFTER = timedelta(seconds=120)
# The kubelet's reasons for a container that cannot start, and what to do.
_REMEDIES = {
    "ImagePullBackOff": "check the image and the pull secrets of the profile",
    "ErrImagePull": "check the image and the pull secrets of the profile",
    "ErrImageNeverPull": "load the image on the node, or change imagePullPolicy in the profile",
    "InvalidImageName": "correct the image's name in the profile",
    "CreateContainerConfigError": "if its image runs as root, set runAs in the profile; see `kubectl describe pod`",
    "CreateContainerError": "see `kubectl describe pod`",
    "RunContainerError": "see `kubectl describe pod`",
}


def blocking_reason(child: ChildJob | None, observed: Observed, now: datetime) -> Reason | None:
    """Return the reason that blocks the step's Job at `now`.

    Returns None without a known one.
    """
    for pod in observed.live_pods:
        if reason := _stuck(pod, now) or _detached(pod):
            return reason
    if child is None or child.finished:
        return None
    if child.managed_by:
        return not_supported(child.name, child.managed_by, None)
    pods = observed.pods_of(child.uid)
    live = [pod for pod in pods if not pod.ended]
    if live:
        # Of several nodes, those that run wait for the one that cannot start.
        return next((reason for pod in reversed(live) if (reason := _not_starting(pod, now))), None)
    if not pods and not child.deleting and not child.suspended and now >= no_pod_at(child):
        return Reason(
            "NoPod",
            f"Job {child.name} has had no pod for more than a minute: a quota or the Pod Security level of the "
            f"namespace may reject it; see `kubectl describe job {child.name}`",
        )
    return None


def no_pod_at(child: ChildJob) -> datetime:
    """Return when to report a Job without a pod.

    It needs time for one after it was created or resumed.
    """
    return max(child.created, child.resumed or child.created) + NO_POD_AFTER


def volumes_at(pod: Pod) -> datetime | None:
    """Return when to report a pod whose containers are not created yet.

    Returns None if they are, or no node has been found.
    """
    if pod.scheduled is None or pod.waiting is None or pod.waiting.word != "ContainerCreating":
        return None
    return pod.scheduled + VOLUMES_AFTER


def stuck_at(pod: Pod) -> datetime | None:
    """Return when to report a pod under deletion as stuck, or None for any other."""
    return pod.deletion_due + STUCK_AFTER if pod.deletion_due else None


def _stuck(pod: Pod, now: datetime) -> Reason | None:
    due = stuck_at(pod)
    if due is None or now < due:
        return None
    return Reason(
        "PodStuckTerminating",
        f"pod {pod.name} has not ended within its grace period: its node may be lost. No other pod is started, because "
        "both would write to the workspace; if the node is gone, delete its Node object",
    )


def _detached(pod: Pod) -> Reason | None:
    if not pod.detached:
        return None
    return Reason(
        POD_DETACHED,
        f"pod {pod.name} lost its labels or owner reference while running: its Job was deleted, and its time counts; "
        "the step goes on when the pod has ended. Delete the pod if it does not end",
    )


def _not_starting(pod: Pod, now: datetime) -> Reason | None:
    if pod.unschedulable:
        return Reason("Unschedulable", f"no node can run pod {pod.name}: {pod.unschedulable}")
    if pod.waiting is not None and pod.waiting.word in _REMEDIES:
        # The kubelet alternates between both reasons; one word for both keeps the status unchanged.
        word = "ImagePullBackOff" if pod.waiting.word == "ErrImagePull" else pod.waiting.word
        detail = "" if word == "ImagePullBackOff" else f" ({pod.waiting.sentence})"
        return Reason(word, f"pod {pod.name} cannot start: {word}{detail}; {_REMEDIES[word]}")
    due = volumes_at(pod)
    if due is not None and now >= due:
        needed = f": it needs {', '.join(pod.objects)}" if pod.objects else ""
        return Reason(
            "WaitingForVolumes",
            f"pod {pod.name} has waited for its image or a volume for more than two minutes{needed}; the pod "
            f"starts once missing Secrets, ConfigMaps or keys exist; see `kubectl describe pod {pod.name}`",
        )
    return None
