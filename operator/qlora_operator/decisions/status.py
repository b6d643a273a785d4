"""Computes a job's next status from the stored one and what is observed: small functions, composed; pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from qlora_api.contract import CONTRACT_VERSION, ExitCode, ProgressRecord, ResultRecord
from qlora_api.model_and_output import OutputSpec
from qlora_api.naming import child_job_name, workspace_claim_name, workspace_folder
from qlora_api.profile import Profile
from qlora_api.status import FailureStatus, QLoRAJobStatus, Resolved, StepName, StepStatus
from qlora_operator.decisions.attempts import active_seconds, count_attempts, describe_failure
from qlora_operator.decisions.blockers import blocking_reason
from qlora_operator.decisions.conditions import (
    ConditionType,
    Value,
    condition,
    is_finished,
    is_true,
    phase_of,
    with_condition,
)
from qlora_operator.decisions.figures import with_known_facts, with_progress, with_training_facts, without_remaining
from qlora_operator.decisions.observe import ChildJob, Observed, QLoRAJob, Reason, format_time, parse_time
from qlora_operator.decisions.volumes import reserved_claim

_NEXT: dict[StepName, StepName] = {"prepare": "train", "train": "publish"}
_DONE: dict[StepName, ConditionType] = {"prepare": "Prepared", "train": "Trained"}
_ON_SUCCESS: tuple[tuple[ConditionType, Value], ...] = (
    ("Succeeded", "True"),
    ("Failed", "False"),
    ("Suspended", "False"),
    ("Reconciling", "False"),
    ("Ready", "True"),
    ("Stalled", "False"),
)
_ON_FAILURE: tuple[tuple[ConditionType, Value], ...] = (
    ("Succeeded", "False"),
    ("Failed", "True"),
    ("Suspended", "False"),
    ("Reconciling", "False"),
    ("Ready", "False"),
    ("Stalled", "True"),
)
_DOING = {
    "Pending": "the first Job is about to be created",
    "Preparing": "model and data are being prepared",
    "Queued": "the train Job waits for its pod to start",
    "Training": "the adapter is being trained",
    "Publishing": "the adapter is being checked and published",
}


@dataclass(frozen=True)
class Facts:
    """All inputs of a status."""

    job: QLoRAJob
    observed: Observed
    profiles: Mapping[str, Profile]
    now: datetime
    progress: ProgressRecord | None = None


def next_status(facts: Facts) -> QLoRAJobStatus:
    """The status that follows from the facts; equal to the stored one if nothing has changed."""
    status = facts.job.status
    if is_finished(status):
        return _follow_cleanup(status.model_copy(update={"observed_generation": facts.job.generation}), facts)
    for transition in (_start, _resolve, _count, _advance, _enforce_disruptions, _enforce_deadline, _show_progress):
        status = transition(status, facts)
    return summarize(status, facts)


def with_child(status: QLoRAJobStatus, facts: Facts, job_uid: str) -> QLoRAJobStatus:
    """The status after the Job of the current step has been created."""
    if status.step is None or is_finished(status):
        return status
    step = status.step.model_copy(update={"job_uid": job_uid})
    return summarize(status.model_copy(update={"step": step}), facts)


def with_rejection(status: QLoRAJobStatus, facts: Facts, reason: Reason) -> QLoRAJobStatus:
    """The status after an action of the plan was blocked, for example rejected by the API server."""
    if is_finished(status):
        return _set(status, facts, "CleanedUp", "False", reason)
    return _set(status, facts, "Succeeded", "Unknown", reason)


def cleanup_at(job: QLoRAJob, status: QLoRAJobStatus) -> datetime | None:
    """When Jobs and scratch data are to be deleted; None if never, or if they are."""
    seconds = job.spec.cleanup_after_seconds
    if seconds is None or status.completion_time is None or is_true(status, "CleanedUp"):
        return None
    return parse_time(status.completion_time) + timedelta(seconds=seconds)


def clean_job_name(job: QLoRAJob) -> str:
    """Name of the one Job that deletes scratch data."""
    return child_job_name(job.name, "clean", 1)


def summarize(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """The status with all conditions and the phase derived from the rest of it."""
    status = status.model_copy(update={"observed_generation": facts.job.generation})
    if not is_finished(status):
        status = _summarize_suspension(status, facts)
        status = _summarize_running(status, facts)
    running = status.step is not None and facts.observed.is_running(status.step.job_uid)
    return status.model_copy(update={"phase": phase_of(status, running=running)})


def _set(status: QLoRAJobStatus, facts: Facts, kind: ConditionType, value: Value, reason: Reason) -> QLoRAJobStatus:
    return with_condition(status, kind, value, reason, generation=facts.job.generation, now=facts.now)


def _start(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    if status.start_time is not None:
        return status
    return status.model_copy(update={"start_time": format_time(facts.now)})


def _resolve(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    job = facts.job
    if status.resolved is not None or job.spec.suspend or _objection(facts) is not None:
        return status
    own_claim = job.spec.workspace.claim_name
    resolved = Resolved(
        contract_version=CONTRACT_VERSION,
        profile=facts.profiles[job.spec.scheduling.profile],
        claim_name=own_claim or workspace_claim_name(job.name, job.uid),
        claim_created=own_claim is None,
        workspace_path=workspace_folder(job.name, job.uid),
    )
    return status.model_copy(update={"resolved": resolved, "step": _step(job, "prepare", 1)})


def _objection(facts: Facts) -> Reason | None:
    """Why the administrator's settings do not let the job start; None if they do."""
    scheduling = facts.job.spec.scheduling
    profile = facts.profiles.get(scheduling.profile)
    if profile is None:
        known = ", ".join(sorted(facts.profiles)) or "none"
        return Reason(
            "ProfileNotFound",
            f"spec.scheduling.profile {scheduling.profile!r} does not exist; the profiles are: {known}",
        )
    fields = {
        "priorityClassName": scheduling.priority_class_name,
        "nodeSelector": scheduling.node_selector,
        "tolerations": scheduling.tolerations,
    }
    denied = ", ".join(field for field, value in fields.items() if value)
    if profile.allow_job_scheduling or not denied:
        return reserved_claim(facts.job.spec, facts.profiles.values())
    return Reason(
        "SchedulingNotAllowed",
        f"profile {scheduling.profile!r} does not let a job set spec.scheduling.{denied}: create the job again "
        "without it, or with another profile",
    )


def _count(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    return count_attempts(status, facts.job, facts.observed)


def _step(job: QLoRAJob, name: StepName, attempt: int, unverified: int = 0) -> StepStatus:
    return StepStatus(
        name=name, job_name=child_job_name(job.name, name, attempt), attempt=attempt, unverified=unverified
    )


def _advance(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """Advance to the first step whose Job has not ended: over several steps, if the operator was down."""
    while not is_finished(status):
        before, status = status, _advance_once(status, facts)
        if status is before:
            break
    return status


def _advance_once(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    step, job = status.step, facts.job
    if step is None:
        return status
    child = facts.observed.child(step.job_name)
    if child is None:
        if not step.job_uid or job.spec.suspend:
            return status
        # Its Job was deleted, by a user or a suspension: continue with the next number.
        return status.model_copy(update={"step": _step(job, step.name, step.attempt + 1, step.unverified)})
    if child.uid != step.job_uid:
        return _count(status.model_copy(update={"step": step.model_copy(update={"job_uid": child.uid})}), facts)
    pods = facts.observed.pods_of(child.uid)
    if child.complete:
        record = _verified(child, facts, step.name)
        return _complete(status, facts, record) if record else _complete_unverified(status, facts, step)
    if killed := next((pod for pod in pods if pod.ended and pod.out_of_memory), None):
        return _fail(status, facts, describe_failure(killed, job, step.name))
    if child.failure is not None:
        ended = [pod for pod in pods if pod.ended and not pod.exited_well]
        if not ended:
            return _fail(status, facts, _without_pod(child.failure, step, facts))
        record = ended[-1].result(job.uid, step.name)
        status = with_known_facts(status, record) if record else status
        return _fail(status, facts, describe_failure(ended[-1], job, step.name))
    return status


def _verified(child: ChildJob, facts: Facts, step: StepName) -> ResultRecord | None:
    for pod in reversed(facts.observed.pods_of(child.uid)):
        record = pod.result(facts.job.uid, step)
        if pod.exited_well and record is not None and (record.outcome, record.exit_code) == ("succeeded", 0):
            return record if step != "publish" or _names_all(record, facts.job.spec.output) else None
    return None


def _names_all(record: ResultRecord, output: OutputSpec) -> bool:
    """Whether a result of publish reports everything that the job asks for."""
    return record.adapter is not None and (output.merged is None or record.merged is not None)


def _complete(status: QLoRAJobStatus, facts: Facts, record: ResultRecord) -> QLoRAJobStatus:
    step = record.step
    if step == "publish":
        status = status.model_copy(update={"adapter": record.adapter, "merged": record.merged})
        return _succeed(status, facts)
    if step == "prepare":
        status = with_known_facts(status, record).model_copy(update={"progress": None})
    else:
        status = with_training_facts(status, record)
    status = _set(status, facts, _DONE[step], "True", Reason("Done", f"the {step} step has succeeded"))
    return status.model_copy(update={"step": _step(facts.job, _NEXT[step], 1)})


def _complete_unverified(status: QLoRAJobStatus, facts: Facts, step: StepStatus) -> QLoRAJobStatus:
    if step.unverified == 0:
        return status.model_copy(update={"step": _step(facts.job, step.name, step.attempt + 1, 1)})
    message = (
        f"the {step.name} step completed twice without a readable result: see that nothing deletes its pods, and that "
        "the profile's image is the trainer of this operator's version"
    )
    return _fail(status, facts, _failure(step.name, "ResultUnreadable", message, facts))


def _without_pod(failure: Reason, step: StepStatus, facts: Facts) -> FailureStatus:
    """Why a Job failed whose pods are gone: the last failure that was observed, else what the Job reports."""
    last = facts.job.status.last_failure
    if last is not None and last.step == step.name:
        return last
    return _failure(step.name, failure.word or "JobFailed", f"Job {step.job_name}: {failure.sentence}", facts)


def _failure(step: StepName, reason: str, message: str, facts: Facts) -> FailureStatus:
    return FailureStatus(step=step, reason=reason, message=message, time=format_time(facts.now))


def _succeed(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    uri = status.adapter.uri if status.adapter else ""
    merged = f", the merged model at {status.merged.uri}" if status.merged else ""
    done = Reason("Succeeded", f"the adapter is at {uri}{merged}")
    for kind, value in _ON_SUCCESS:
        status = _set(status, facts, kind, value, done)
    return without_remaining(status.model_copy(update={"completion_time": format_time(facts.now)}))


def _fail(status: QLoRAJobStatus, facts: Facts, failure: FailureStatus) -> QLoRAJobStatus:
    """The end of the job, with both summary conditions decided: neither stays Unknown."""
    reason = Reason(failure.reason, failure.message)
    if failure.step in _DONE:
        status = _set(status, facts, _DONE[failure.step], "False", reason)
    for kind, value in _ON_FAILURE:
        status = _set(status, facts, kind, value, reason)
    changes = {"last_failure": failure, "completion_time": format_time(facts.now)}
    return without_remaining(status.model_copy(update=changes))


def _enforce_disruptions(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """Fail a job that is interrupted too often: its Jobs ignore interruptions without a limit."""
    limit, step = facts.job.spec.retry.max_disruptions, status.step
    # A step that has lost no pod yet may run, even if interruptions of the one before were counted late.
    if is_finished(status) or step is None or not step.counted_pod or status.disruptions <= limit:
        return status
    message = (
        f"the pods were interrupted {status.disruptions} times, and spec.retry.maxDisruptions allows {limit}: see "
        "`kubectl get events` for what evicts or deletes them, then create the job again"
    )
    return _fail(status, facts, _failure(step.name, ExitCode.RETRIES_EXHAUSTED.reason, message, facts))


def _enforce_deadline(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    limit = facts.job.spec.active_deadline_seconds
    if is_finished(status) or limit is None or status.step is None:
        return status
    ran = active_seconds(status, facts.observed, facts.now)
    if ran < limit:
        return status
    message = (
        f"the steps have run for {ran} seconds, and spec.activeDeadlineSeconds allows {limit}: create the job again "
        "with a larger value, or with fewer training steps"
    )
    return _fail(status, facts, _failure(status.step.name, "DeadlineExceeded", message, facts))


def _show_progress(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    record, step = facts.progress, status.step
    if record is None or is_finished(status) or step is None or record.step != step.name:
        return status
    return with_progress(status, record)


def _summarize_suspension(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    if not facts.job.spec.suspend:
        return _set(status, facts, "Suspended", "False", Reason("NotSuspended", ""))
    observed = facts.observed
    if observed.live_pods or any(not child.finished for child in observed.children):
        stopping = Reason("Suspending", "the running step saves a checkpoint and stops")
        return _set(status, facts, "Suspended", "False", blocking_reason(None, observed, facts.now) or stopping)
    status = _set(
        status, facts, "Suspended", "True", Reason("Suspended", "spec.suspend is true; false resumes the job")
    )
    return without_remaining(status)


def _summarize_running(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    reason = _reason(status, facts)
    step = status.step
    suspended = is_true(status, "Suspended")
    started = step is not None and (bool(step.job_uid) or step.attempt > 1 or step.name != "prepare")
    for kind in _DONE.values():
        if not is_true(status, kind):
            status = _set(status, facts, kind, "Unknown", reason)
    accepted = started or suspended
    ready = Reason("Suspended", "spec.suspend is true") if suspended else Reason("Started", "the job has been started")
    waiting = Reason("Pending", reason.sentence)
    status = _set(status, facts, "Succeeded", "Unknown", reason)
    status = _set(status, facts, "Failed", "False", Reason("NotFailed", ""))
    status = _set(status, facts, "Reconciling", "False" if accepted else "True", ready if accepted else waiting)
    status = _set(status, facts, "Ready", "True" if accepted else "False", ready if accepted else waiting)
    return _set(status, facts, "Stalled", "False", Reason("NotStalled", ""))


def _reason(status: QLoRAJobStatus, facts: Facts) -> Reason:
    """Why an unfinished job is in its phase, or what blocks it."""
    job, observed, step = facts.job, facts.observed, status.step
    suspension = condition(status, "Suspended")
    if job.spec.suspend and suspension is not None:
        return Reason(suspension.reason, suspension.message)
    if status.resolved is None or step is None:
        return _objection(facts) or Reason("Pending", _DOING["Pending"])
    child = observed.child(step.job_name)
    if reason := blocking_reason(child, observed, facts.now):
        return reason
    if not step.job_uid and observed.live_pods:
        return Reason("WaitingForPod", f"pod {observed.live_pods[0].name} must end before the next Job is created")
    running = observed.is_running(step.job_uid)
    last = status.last_failure
    if last is not None and last.step == step.name and step.job_uid and not running:
        return Reason("Retrying", f"the latest attempt failed and is retried: {last.reason}: {last.message}")
    phase = phase_of(status, running=running)
    return Reason(phase, _DOING.get(phase, ""))


def _follow_cleanup(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    due = cleanup_at(facts.job, status)
    if due is None:
        return status
    observed = facts.observed
    cleaning = observed.child(clean_job_name(facts.job))
    value: Value = "False"
    reason = Reason("Scheduled", f"pods, checkpoints and prepared data are deleted at {format_time(due)}")
    if cleaning is not None and cleaning.complete and observed.children == (cleaning,):
        value = "True"
        reason = Reason("CleanedUp", "pods, checkpoints and prepared data are deleted; the adapter stays")
    elif cleaning is not None and cleaning.failure is not None:
        reason = Reason("CleanupFailed", f"Job {cleaning.name}: {cleaning.failure.sentence}")
    elif cleaning is not None:
        reason = blocking_reason(cleaning, observed, facts.now) or reason
    return _set(status, facts, "CleanedUp", value, reason)
