"""Sets the pause before the next Job after a pod that the kubelet rejects.

A node may need a moment, as after a restart, or the help of its administrator. Each pause is twice as long as the one
before. No retry is used: nothing of the job's own has run.
"""

from datetime import datetime, timedelta

from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.observed.objects import Observed, Pod, QLoRAJob, Reason, format_time
from qlora_operator.decisions.pods.attempts import describe_failure

PAUSE_AFTER_REJECTED_POD, LONGEST_PAUSE_AFTER_REJECTED_POD = timedelta(seconds=60), timedelta(minutes=30)


def next_job_after_rejections(observed: Observed) -> datetime | None:
    """Return when the next Job may be created, or None if no pod was rejected."""
    rejected = _rejected(observed)
    if not rejected:
        return None
    pause: timedelta = PAUSE_AFTER_REJECTED_POD * 2 ** min(len(rejected) - 1, 10)
    return rejected[-1].created + min(pause, LONGEST_PAUSE_AFTER_REJECTED_POD)


def rejection(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime) -> Reason | None:
    """Return why the step has no Job: it waits after a rejected pod.

    Returns None if it has one, or waits for another reason.
    """
    step, due = status.step, next_job_after_rejections(observed)
    if step is None or step.job_uid or due is None or now >= due:
        return None
    failure = describe_failure(_rejected(observed)[-1], job, step.name)
    return Reason(
        "PodRejected",
        f"a node has rejected a pod, which uses no retry: Job {step.job_name} is created at {format_time(due)}, or "
        f"soon after that; {failure.reason}: {failure.message}",
    )


def _rejected(observed: Observed) -> list[Pod]:
    """Oldest first, as all pods are."""
    return [pod for pod in observed.pods if pod.rejected]
