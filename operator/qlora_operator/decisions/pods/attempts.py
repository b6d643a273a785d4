"""Counts attempts: seconds run, failures, interruptions, and the latest failure.

Attempts run one after the other. `status.step.countedPod` is the latest pod with a counted attempt, and
`status.activeUntil` the end of the counted time, so that an attempt counts once, however often it is observed.

An attempt is a pod, or the pods of several nodes that run together (`together`). Of these, node 0 gives the seconds and
the progress, and the pod that ended the attempt the failure or interruption; then the step gets another Job, so that
each Job of several nodes counts at most once. If no pod is left as evidence, the attempt was interrupted if node 0 has
run.
"""

import itertools
from datetime import datetime, timedelta

from qlora_api.contract import ExitCode
from qlora_api.figures import with_saved_step
from qlora_api.schema import replace
from qlora_api.status import FailureStatus, QLoRAJobStatus, StepName, StepStatus
from qlora_operator.decisions.observed.conditions import truncate
from qlora_operator.decisions.observed.objects import ChildJob, Observed, Pod, QLoRAJob, format_time, parse_time
from qlora_operator.decisions.pods.nodes import ending_pod, is_over, is_own_failure, trains_together

LONGEST_WITHOUT_NEWS = timedelta(minutes=15)
"""How long a vanished pod is assumed to have run after its last report."""
POD_FAILURES = ("Evicted", "HostOutOfMemory", "PodFailed")
"""Reasons of a pod that has left no record."""
_EXIT_CODES = {int(code): code for code in ExitCode}


def count_attempts(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime) -> QLoRAJobStatus:
    """Count every attempt of the step that has ended, vanished or is being deleted."""
    step = status.step
    if step is None:
        return status
    if trains_together(job, step.name):
        return _count_together(status, job, observed, now) if step.job_uid else _charge_earlier(status, job, observed)
    if not step.job_uid:
        return _charge_detached(status, job, observed)
    child = observed.child(step.job_name)
    pods = observed.pods_of(step.job_uid)
    for pod in _not_counted(status, step, pods):
        if pod.decisive and not (pod.detached or job.spec.cancel) and child is not None and not child.finished:
            continue  # counted with the end of its Job, which follows immediately
        if pod.stopping and child is not None and not child.deleting and not child.suspended:
            continue  # counted with its end: that its Job was suspended before may be seen after the pod's deletion
        on_purpose = is_stopped_on_purpose(child, job, pod)
        status = _count(status, job, pod, step.name, on_purpose=on_purpose)
    return _count_vanished(status, job, child, pods, now)


def watch_pod(status: QLoRAJobStatus, observed: Observed, now: datetime) -> QLoRAJobStatus:
    """Return the status with the pod that runs now.

    Start time and progress are measured from it even if it vanishes.
    """
    step = status.step
    pod = observed.reporting_pod(step.job_uid) if step else None
    if step is None or pod is None or pod.running_since is None or pod.uid == step.running_pod:
        return status
    step = replace(step, running_pod=pod.uid, running_pod_name=pod.name)
    step = replace(step, running_since=format_time(pod.running_since), progressed_at=format_time(now))
    return replace(status, step=step)


def charge_running(status: QLoRAJobStatus, observed: Observed, now: datetime) -> QLoRAJobStatus:
    """Count the running pods' seconds until now, before the step gets another Job."""
    total = active_seconds(status, observed, now)
    if total == status.active_seconds:
        return status
    return replace(status, active_seconds=total, active_until=format_time(now))


def _count_together(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime) -> QLoRAJobStatus:
    """Count node 0's seconds, and each failed attempt of several pods once."""
    step = status.step
    if step is None:
        return status
    child, pods = observed.child(step.job_name), observed.pods_of(step.job_uid)
    status = _charge_node_0(status, job, child, pods, now)
    ending = ending_pod(pods, child)
    if step.counted_pod or (ending is None and not (step.running_pod and is_over(pods, child))):
        return status
    if ending is not None and (is_own_failure(ending) or ending.missed_peers):
        return _with_failure(charge_running(status, observed, now), job, ending)
    if is_stopped_on_purpose(child, job, ending or _running_since(status)):
        return status
    if ending is not None and ending.lost_peer:
        # No pod may ever report the cause: the lost connection is the only evidence.
        status = replace(status, last_failure=describe_failure(ending, job, step.name))
    counted = replace(step, counted_pod=ending.uid if ending else step.running_pod)
    status = charge_running(status, observed, now)
    return replace(status, disruptions=status.disruptions + 1, step=counted)


def _charge_node_0(
    status: QLoRAJobStatus, job: QLoRAJob, child: ChildJob | None, pods: tuple[Pod, ...], now: datetime
) -> QLoRAJobStatus:
    """Count the seconds of node 0 until its pod has ended, was deleted or is gone.

    The other pods do not change that.
    """
    for pod in pods:
        if pod.node == 0:
            status = _without_start(_charge(status, job, pod), pod)
    return _charge_vanished(status, child, pods, now) if _has_vanished(status, pods) else status


def _without_start(status: QLoRAJobStatus, pod: Pod) -> QLoRAJobStatus:
    """Drop the start of a pod that has ended in its first second.

    Else the operator counts it again, until now, once it is gone.
    """
    step, end = status.step, pod.termination.finished if pod.termination else None
    if step is None or pod.uid != step.running_pod or step.running_since is None or end is None:
        return status
    return status if end > parse_time(step.running_since) else replace(status, step=replace(step, running_since=None))


def _charge_earlier(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed) -> QLoRAJobStatus:
    """Count the seconds of node 0 of the Job before.

    It saves and stops after the step has left it for the next one.
    """
    for pod in observed.pods:
        if pod.node == 0 and pod.result(job.run_uid, "train") is not None:
            status = _charge(status, job, pod)
    return status


def _charge_detached(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed) -> QLoRAJobStatus:
    """Count the seconds of a detached pod that has run on after the step has left it."""
    for pod in observed.pods:
        if pod.detached and status.step is not None and pod.uid == status.step.running_pod:
            status = _charge(status, job, pod)
    return status


def _charge(status: QLoRAJobStatus, job: QLoRAJob, pod: Pod) -> QLoRAJobStatus:
    """Count the seconds of a pod until its end or deletion, and note its checkpoint."""
    start, end = _start(pod), _end(pod)
    if start is None or end is None or status.step is None:
        return status
    if status.active_until is not None and end <= parse_time(status.active_until):
        return status
    seconds = status.active_seconds + _seconds(status, start, end)
    status = replace(status, active_seconds=seconds, active_until=format_time(end))
    record = pod.result(job.run_uid, "train")
    return with_saved_step(status, record) if record else status


def _with_failure(status: QLoRAJobStatus, job: QLoRAJob, pod: Pod) -> QLoRAJobStatus:
    """Note the failure of an attempt of several pods.

    Pods that only waited have not failed.
    """
    if status.step is None:
        return status
    failed = int(pod.failed and is_own_failure(pod))
    step = replace(status.step, counted_pod=pod.uid, failures=status.step.failures + failed)
    status = replace(status, last_failure=describe_failure(pod, job, "train"))
    # An unsupported one waits for another image, with the same Job.
    return status if pod.unsupported else replace(status, failures=status.failures + failed, step=step)


def is_stopped_on_purpose(child: ChildJob | None, job: QLoRAJob, pod: Pod | datetime | None) -> bool:
    """Whether a pod ended because its Job was stopped: that is no disruption.

    `pod`: of one that has vanished, since when it ran.
    """
    if child is None or child.deleting or child.suspended or child.complete or child.expired or job.stops:
        return True
    if child.resumed is None or pod is None:
        return False
    # A queue has suspended the Job, and resumed it since.
    return pod < child.resumed if isinstance(pod, datetime) else pod.stopped_by(child.resumed)


def _running_since(status: QLoRAJobStatus) -> datetime | None:
    # A pod without a start has ended in its first second, where the counted time ends.
    since = (status.step.running_since if status.step else None) or status.active_until
    return parse_time(since) if since else None


def _count_vanished(
    status: QLoRAJobStatus, job: QLoRAJob, child: ChildJob | None, pods: tuple[Pod, ...], now: datetime
) -> QLoRAJobStatus:
    """Count the pod that was running and is gone: deleted by force, or with its node."""
    step = status.step
    if step is None or step.running_since is None or not _has_vanished(status, pods):
        return status
    on_purpose = is_stopped_on_purpose(child, job, _running_since(status))
    counted = replace(step, counted_pod=step.running_pod)
    status = _charge_vanished(status, child, pods, now)
    return replace(status, disruptions=status.disruptions + (0 if on_purpose else 1), step=counted)


def _has_vanished(status: QLoRAJobStatus, pods: tuple[Pod, ...]) -> bool:
    """Whether the pod that was seen running is gone, and its seconds do not count yet."""
    step = status.step
    if step is None or not step.running_pod or step.running_since is None or step.running_pod == step.counted_pod:
        return False
    if any(pod.uid == step.running_pod for pod in pods):
        return False
    # Else it was counted before it was gone: a later pod that never ran has been counted since.
    return status.active_until is None or parse_time(status.active_until) <= parse_time(step.running_since)


def _charge_vanished(
    status: QLoRAJobStatus, child: ChildJob | None, pods: tuple[Pod, ...], now: datetime
) -> QLoRAJobStatus:
    """The status with the seconds of that pod."""
    step = status.step
    if step is None or step.running_since is None:
        return status
    start, end = parse_time(step.running_since), _vanished_at(step, child, pods, now)
    until = parse_time(status.active_until) if status.active_until else end
    seconds = status.active_seconds + _seconds(status, start, end)
    return replace(status, active_seconds=seconds, active_until=format_time(max(end, until)))


def _vanished_at(step: StepStatus, child: ChildJob | None, pods: tuple[Pod, ...], now: datetime) -> datetime:
    """Return the latest possible end of a vanished pod.

    An operator that was down for days must not charge for them.
    """
    last_seen = parse_time(step.progressed_at or step.running_since or format_time(now))
    known = [now, last_seen + LONGEST_WITHOUT_NEWS, *([child.ended] if child and child.ended else [])]
    return min(known + [pod.created for pod in pods if pod.created > last_seen])


def active_seconds(status: QLoRAJobStatus, observed: Observed, now: datetime) -> int:
    """Seconds that the steps have run in total, including the pod that runs now."""
    running = sum(
        _seconds(status, pod.running_since, now)
        for pod in observed.pods
        if pod.running_since is not None and pod.running and pod.node == 0
    )
    return status.active_seconds + running


def describe_failure(pod: Pod, job: QLoRAJob, step: StepName) -> FailureStatus:
    """Return why the attempt failed, from its record, else from the kubelet's report."""
    termination = pod.termination
    exit_code = termination.exit_code if termination and 0 <= termination.exit_code <= 255 else None
    reason, message = _explain(pod, job, step, exit_code)
    return FailureStatus(
        step=step,
        reason=truncate(reason, 128),
        exit_code=exit_code,
        message=truncate(message),
        time=format_time(_end(pod) or pod.created),
    )


def _explain(pod: Pod, job: QLoRAJob, step: StepName, exit_code: int | None) -> tuple[str, str]:
    if pod.out_of_memory:
        return "HostOutOfMemory", _out_of_memory(job, step)
    record = pod.result(job.run_uid, step)
    if record is not None and record.outcome == "failed":
        return record.reason, record.message
    if pod.reason == "Evicted":
        return "Evicted", f"the kubelet evicted pod {pod.name}: {pod.message or 'no message'}"
    if pod.termination is None:
        return pod.reason or "PodFailed", f"pod {pod.name} failed before the trainer ran: {pod.message or 'no message'}"
    known = _EXIT_CODES.get(exit_code if exit_code is not None else -1, ExitCode.INTERNAL_ERROR)
    detail = pod.termination.message.strip() if not pod.termination.message.lstrip().startswith("{") else ""
    return known.reason, (
        f"the trainer ended with exit code {pod.termination.exit_code}"
        f"{f' ({pod.termination.reason})' if pod.termination.reason not in ('', 'Error') else ''} and left no readable "
        f"record{f': {detail}' if detail else ''}; see `kubectl logs {pod.name}`{_log_of(pod, step)}"
    )


def _log_of(pod: Pod, step: StepName) -> str:
    """Name the log of a step's libraries in a message, empty for the clean-up."""
    if step == "clean":
        return ""
    name = f"{step}.node-{pod.node}" if pod.node else step
    return f", and the end of records/{name}.log in the workspace, where libraries print"


def _out_of_memory(job: QLoRAJob, step: StepName) -> str:
    limit = job.spec.resources.memory if step == "train" else None
    if limit is None and job.status.resolved is not None:
        resources = job.status.resolved.profile.resources
        limit = {"prepare": resources.prepare, "train": resources.train}.get(step, resources.publish).memory
    remedy = (
        "raise spec.resources.memory, and set a new spec.retry.request to retry the job"
        if step == "train"
        else f"ask the administrator to raise resources.{step}.memory of the profile, then set a new spec.retry.request"
    )
    return f"the {step} pod was killed because it exceeded its memory limit of {limit}: {remedy}"


def _not_counted(status: QLoRAJobStatus, step: StepStatus, pods: tuple[Pod, ...]) -> tuple[Pod, ...]:
    """Return the pods from the latest counted one on, which may have run on since."""
    if not step.counted_pod or status.active_until is None:
        return pods
    if any(pod.uid == step.counted_pod for pod in pods):
        return tuple(itertools.dropwhile(lambda pod: pod.uid != step.counted_pod, pods))
    until = parse_time(status.active_until)
    return tuple(pod for pod in pods if (end := _end(pod)) is not None and end > until)


def _count(status: QLoRAJobStatus, job: QLoRAJob, pod: Pod, step: StepName, *, on_purpose: bool) -> QLoRAJobStatus:
    start, end = _start(pod), _end(pod)
    if start is None or end is None or status.step is None:
        return status
    until = parse_time(status.active_until) if status.active_until else end
    if pod.uid == status.step.counted_pod and end <= until:
        return status
    seconds = status.active_seconds + _seconds(status, start, end)
    counted = replace(status, active_seconds=seconds, active_until=format_time(max(end, until)))
    if pod.uid != status.step.counted_pod:
        failures = status.step.failures + int(pod.failed)
        counted = replace(counted, step=replace(status.step, counted_pod=pod.uid, failures=failures))
        if pod.interrupted:
            counted = replace(counted, disruptions=status.disruptions + (0 if on_purpose else 1))
        elif not pod.exited_well:
            # A pod that the kubelet rejects, for example, is retried without a limit, and has a reason.
            failures = status.failures + int(pod.failed)
            counted = replace(counted, failures=failures, last_failure=describe_failure(pod, job, step))
    record = pod.result(job.run_uid, step)
    return with_saved_step(counted, record) if record else counted


def _start(pod: Pod) -> datetime | None:
    if pod.termination is not None:
        return pod.termination.started or pod.termination.finished
    return pod.running_since or (pod.created if pod.ended else None)


def _end(pod: Pod) -> datetime | None:
    """Return the end of the attempt, or when the deletion of its pod was requested."""
    if pod.termination is not None:
        return pod.termination.finished
    return pod.deletion_requested or (pod.created if pod.ended else None)


def _seconds(status: QLoRAJobStatus, start: datetime, end: datetime) -> int:
    if status.active_until is not None:
        start = max(start, parse_time(status.active_until))
    return max(0, int((end - start).total_seconds()))
