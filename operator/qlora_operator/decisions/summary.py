"""Derives conditions and phase from the rest of a status."""

from datetime import datetime

from qlora_api.figures import without_remaining
from qlora_api.schema import replace
from qlora_api.status import Phase, QLoRAJobStatus, StepStatus
from qlora_operator.decisions.limits import DEFAULT_PROGRESS_DEADLINE_SECONDS, idle_seconds, no_progress
from qlora_operator.decisions.observed.conditions import (
    ConditionType,
    Value,
    condition,
    has_begun,
    has_started,
    is_finished,
    is_true,
    phase_of,
)
from qlora_operator.decisions.observed.endings import NOT_FAILED, NOT_STALLED, NOT_SUSPENDED
from qlora_operator.decisions.observed.facts import Facts, set_condition
from qlora_operator.decisions.observed.objects import ChildJob, Observed, QLoRAJob, Reason, format_time, parse_time
from qlora_operator.decisions.observed.shared_pod import SharedPod, trained_by, waits_for_sweep
from qlora_operator.decisions.pods.blockers import blocking_reason
from qlora_operator.decisions.pods.deletions import deletion
from qlora_operator.decisions.pods.kueue import WAITING
from qlora_operator.decisions.pods.nodes import trains_together
from qlora_operator.decisions.pods.rejections import rejection
from qlora_operator.decisions.resolution import objection

_DOING = {
    "Pending": "the first Job is about to be created",
    "Preparing": "model and data are being prepared",
    "Queued": "the train Job waits for its pod to start",
    "Training": "the adapter is being trained",
    "Publishing": "the adapter is being checked and published",
}
_WAITING: frozenset[Phase] = frozenset({"Pending", "Queued", "Suspended"})


def summarize(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """The status with all conditions and the phase derived from the rest of it."""
    status = replace(status, observed_generation=facts.job.generation)
    if not is_finished(status):
        status = _count_nodes(status, facts.job, facts.observed)
        status = _summarize_suspension(status, facts.job, facts.observed, facts.shared, facts.now)
        status = without_remaining(status) if facts.job.hold is not None and _is_at_rest(facts.observed) else status
        status = _summarize_running(status, facts)
    phase = _phase(status, facts.observed, facts.shared, is_held=facts.job.hold is not None)
    return _in_phase(status, phase, facts.job.status, facts.now)


def _in_phase(status: QLoRAJobStatus, phase: Phase, stored: QLoRAJobStatus, now: datetime) -> QLoRAJobStatus:
    """Return the status in that phase, with the time since when, and the time waited.

    The metrics of the time in each phase and to the first optimizer step are measured by them.
    """
    since, waited = stored.phase_since, stored.waited_seconds
    if phase == stored.phase:
        # An earlier release may have stored the phase without a time: that alone is no reason for a write.
        return replace(status, phase=phase, phase_since=since, waited_seconds=waited)
    if stored.phase in _WAITING and since is not None:
        waited += max(0, int((now - parse_time(since)).total_seconds()))
    return replace(status, phase=phase, phase_since=format_time(now), waited_seconds=waited)


def _count_nodes(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed) -> QLoRAJobStatus:
    """Count the pods that train together, and how many of them run."""
    step = status.step
    if step is None or not trains_together(job, step.name):
        return status
    nodes = job.spec.resources.node_count
    running = sum(pod.running for pod in observed.pods_of(step.job_uid)) if step.job_uid else 0
    return replace(status, step=replace(step, nodes=nodes, running_nodes=running))


def _phase(status: QLoRAJobStatus, observed: Observed, shared: SharedPod | None, *, is_held: bool) -> Phase:
    step = status.step
    child = observed.child(step.job_name) if step else None
    phase = phase_of(
        status,
        running=step is not None and observed.is_running(step.job_uid),
        queued=(child is not None and child.suspended) or (is_held and _is_at_rest(observed)),
    )
    if phase in ("Preparing", "Queued") and (waits := waits_for_sweep(status, shared)):
        return "Training" if waits.word == "Training" else "Queued"
    return phase


def _summarize_suspension(
    status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, shared: SharedPod | None, now: datetime
) -> QLoRAJobStatus:
    if not job.spec.suspend:
        return set_condition(status, job, now, "Suspended", "False", NOT_SUSPENDED)
    if not _is_at_rest(observed):
        stopping = Reason("Suspending", "the running step saves a checkpoint and stops")
        return set_condition(status, job, now, "Suspended", "False", blocking_reason(None, observed, now) or stopping)
    sweep = trained_by(status, shared)
    sentence = (
        f"a pod of QLoRASweep {sweep} still trains this cell with others; suspend the sweep to stop it"
        if sweep
        else "spec.suspend is true; false resumes the job"
    )
    status = set_condition(status, job, now, "Suspended", "True", Reason("Suspended", sentence))
    return without_remaining(status)


def _is_at_rest(observed: Observed) -> bool:
    """Whether nothing of the job runs, or is about to."""
    return not observed.live_pods and all(child.finished for child in observed.children)


def _summarize_running(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    job, now, started, reason = facts.job, facts.now, has_started(status), _reason(status, facts)
    suspended = is_true(status, "Suspended")
    if not is_true(status, "Prepared"):
        status = set_condition(status, job, now, "Prepared", "Unknown", _unprepared(status.step))
    is_accepted = started or suspended
    accepted = Reason("Pending", reason.sentence)
    if suspended:
        accepted = Reason("Suspended", "spec.suspend is true")
    elif started:
        accepted = Reason("Started", "the job has been started")
    conditions: tuple[tuple[ConditionType, Value, Reason], ...] = (
        ("Succeeded", "Unknown", reason),
        ("Failed", "False", NOT_FAILED),
        ("Progressing", *_progressing(status, job, facts.observed, now, log_read=facts.log_read)),
        ("Reconciling", "False" if is_accepted else "True", accepted),
        ("Stalled", "False", NOT_STALLED),
    )
    for kind, value, why in conditions:
        status = set_condition(status, job, now, kind, value, why)
    return status


def _unprepared(current: StepStatus | None) -> Reason:
    """Return why prepare has not succeeded. The condition Succeeded has what blocks it."""
    return Reason("NotReached", "prepare has not begun") if current is None else Reason("NotEnded", "prepare goes on")


def _progressing(
    status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime, *, log_read: bool
) -> tuple[Value, Reason]:
    step = status.step
    if step is None or not observed.is_running(step.job_uid):
        return "Unknown", Reason("NotRunning", "")
    idle = idle_seconds(status, job, observed, now, log_read=log_read)
    if idle is not None:
        # Reported once, with the limit and not with the time, which would change the message in each pass.
        limit = job.spec.progress_deadline_seconds or DEFAULT_PROGRESS_DEADLINE_SECONDS
        return "False", Reason("ProgressDeadlineExceeded", no_progress(step, limit))
    return "True", Reason("Progressing", "")


def _reason(status: QLoRAJobStatus, facts: Facts) -> Reason:
    """Why an unfinished job is in its phase, or what blocks it."""
    job, observed, step = facts.job, facts.observed, status.step
    if stop := _stop(status, job, observed):
        return stop
    if status.resolved is None or step is None:
        return objection(facts) or Reason("Pending", _DOING["Pending"])
    if waits := waits_for_sweep(status, facts.shared):
        return waits
    child = observed.child(step.job_name)
    if child is not None and child.suspended:
        return facts.queue or _held(child)
    if reason := blocking_reason(child, observed, facts.now):
        return reason
    if child is not None and child.failure is not None and status.last_failure is not None:
        return Reason(status.last_failure.reason, status.last_failure.message)
    if deleted := deletion(status):
        return deleted
    if not step.job_uid and observed.live_pods:
        return Reason("WaitingForPod", f"pod {observed.live_pods[0].name} must end before the next Job is created")
    if rejected := rejection(status, job, observed, facts.now):
        return rejected
    running = observed.is_running(step.job_uid)
    last = status.last_failure
    if last is not None and last.step == step.name and has_begun(status) and not running:
        return Reason("Retrying", f"the latest attempt failed and is retried: {last.reason}: {last.message}")
    phase = phase_of(status, running=running)
    return Reason(phase, _DOING.get(phase, ""))


def _stop(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed) -> Reason | None:
    """Return why the job does not continue, or only to stop, or None if it may."""
    suspension = condition(status, "Suspended")
    if job.spec.suspend and suspension is not None:
        return Reason(suspension.reason, suspension.message)
    if job.problem:
        return Reason("InvalidSpec", job.problem)
    if job.hold is None or status.resolved is None:
        return None
    stopping = "" if _is_at_rest(observed) else "; the running step saves a checkpoint and stops"
    return Reason(job.hold.word, job.hold.sentence + stopping)


def _held(child: ChildJob) -> Reason:
    return Reason(
        WAITING,
        f"Job {child.name} is suspended until a queue admits it: see `kubectl get workloads`, which the operator "
        "may not read or which do not exist here; whoever else has suspended the Job must resume it",
    )
