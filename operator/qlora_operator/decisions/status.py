"""Decides a job's next status, one transition after the other."""

from dataclasses import dataclass
from datetime import datetime

from qlora_api.contract import ProgressRecord
from qlora_api.figures import with_progress
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, StepStatus
from qlora_operator.decisions.advance import advance, renew
from qlora_operator.decisions.cleanup import follow_cleanup
from qlora_operator.decisions.limits import (
    enforce_cancellation,
    enforce_deadline,
    enforce_disruptions,
    enforce_failures,
    enforce_progress,
)
from qlora_operator.decisions.observed.conditions import condition, is_finished, is_true
from qlora_operator.decisions.observed.facts import FIRST_JOB, Facts, next_attempt, set_condition
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, Reason, format_time, parse_time
from qlora_operator.decisions.pods.attempts import count_attempts, watch_pod
from qlora_operator.decisions.pods.detached import keep_earlier_pod
from qlora_operator.decisions.profiles.ledger import settled
from qlora_operator.decisions.resolution import job_limit_reached, objection_to_retry, resolve, with_profile_of_today
from qlora_operator.decisions.retry import is_to_be_taken_up, take_up
from qlora_operator.decisions.revision import with_revision
from qlora_operator.decisions.summary import summarize
from qlora_operator.decisions.usage.budget import enforce_budget, follow_forecast
from qlora_operator.decisions.usage.usage import count_usage


@dataclass(frozen=True)
class Decision:
    """The next status of a job, and how that differs from the stored one."""

    status: QLoRAJobStatus
    ends: bool
    """Whether the job ends. Store that before anything is deleted that it was derived from."""
    restarts: bool
    """Whether the step gets another Job although the stored one still runs. Store why before that one is deleted: after
    a kill in between, another user would appear to have deleted it."""
    is_final: bool
    """Whether the job ends or is cleaned up, leaves a step or an attempt, or counts one."""

    @classmethod
    def from_status(cls, job: QLoRAJob, status: QLoRAJobStatus, observed: Observed) -> "Decision":
        """Compare the job's next status with its stored one."""
        stored, step = job.status, status.step
        child = observed.child(stored.step.job_name) if stored.step is not None else None
        runs = child is not None and not child.finished and not child.deleting
        leaves = stored.step is not None and step is not None and stored.step.job_name != step.job_name
        verdicts = is_finished(status), is_true(status, "CleanedUp")
        is_final = verdicts != (is_finished(stored), is_true(stored, "CleanedUp"))
        is_final |= step is not None and _attempt(step) != _attempt(stored.step)
        ends = is_finished(status) and not is_finished(stored)
        return cls(status, ends, restarts=leaves and runs, is_final=is_final)


def next_status(facts: Facts) -> Decision:
    """Decide the next status, equal to the stored one if nothing has changed."""
    status, run_uid = _next_status(facts), facts.job.began_as or None
    # Also of a job that was restored with its status, and has ended.
    status = status if status.run_uid == run_uid else replace(status, run_uid=run_uid)
    return Decision.from_status(facts.job, status, facts.observed)


def _next_status(facts: Facts) -> QLoRAJobStatus:
    job, observed, now, status = facts.job, facts.observed, facts.now, facts.job.status
    if job.deleting:
        return status
    if is_finished(status):
        if not is_to_be_taken_up(job):
            return _follow_end(status, facts)
        objection = objection_to_retry(job, facts.profiles)
        if held_back := objection or job_limit_reached(job, facts.profiles, facts.jobs_of_profile):
            return _follow_end(status, facts, held_back)
        status = take_up(status, facts)
    status = _start(status, now)
    if job.problem:
        status = count_attempts(status, job, observed, now)
        status = enforce_deadline(status, job, observed, now)
        status = count_usage(status, facts)
    else:
        status = _note_attempt(status)
        status = _note_request(status, facts)
        status = resolve(status, facts)
        status = _follow_step(status, facts)
        status = renew(status, job)
        status = keep_earlier_pod(status, job, observed)
        status = count_usage(status, facts)
        status = follow_forecast(status, job, observed, now, facts.progress)
    status = enforce_budget(enforce_cancellation(status, job, observed, now), facts)
    return with_revision(summarize(status, facts), job)


def next_status_of_pod(facts: Facts) -> QLoRAJobStatus:
    """Compute the status of a sweep's shared pod, as of a job with a train step only."""
    return summarize(count_usage(_follow_step(facts.job.status, facts), facts), facts)


def _follow_step(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """Follow the Jobs and pods of the steps, and enforce the job's limits."""
    job, observed, now = facts.job, facts.observed, facts.now
    status = count_attempts(status, job, observed, now)
    status = watch_pod(status, observed, now)
    status = advance(status, facts)
    status = enforce_failures(status, job, now)
    status = enforce_disruptions(status, job, now)
    status = enforce_deadline(status, job, observed, now)
    status = _show_progress(status, facts.progress, facts.progress_beside, now)
    return enforce_progress(status, job, observed, now, log_read=facts.log_read)


def with_child(status: QLoRAJobStatus, facts: Facts, job_uid: str) -> QLoRAJobStatus:
    """The status after the Job of the current step has been created."""
    if status.step is None or is_finished(status):
        return status
    step = replace(status.step, job_uid=job_uid)
    return summarize(replace(status, step=step), facts)


def with_rejection(status: QLoRAJobStatus, job: QLoRAJob, now: datetime, reason: Reason) -> QLoRAJobStatus:
    """Return the status after an action of the plan was blocked.

    The API server may have rejected it.
    """
    if is_true(status, "CleanedUp"):
        return status
    if is_finished(status):
        return set_condition(status, job, now, "CleanedUp", "False", reason)
    return set_condition(status, job, now, "Succeeded", "Unknown", reason)


def with_unfixed(status: QLoRAJobStatus, job: QLoRAJob, now: datetime, reason: Reason) -> QLoRAJobStatus:
    """Return the status of a job whose next revision could not be created.

    One that has started stays as it was, so that a retry still waits for the values of that day.
    """
    if job.status.current_revision is None:
        of_revision = ("current_revision", "resolved", "image", "workspace", "gpu_hours_limit", "queue_name")
        status = status.model_copy(update={name: getattr(job.status, name) for name in of_revision})
        return with_rejection(status, job, now, reason)
    if is_finished(job.status):
        return set_condition(job.status, job, now, "Stalled", "True", reason)
    return with_rejection(job.status, job, now, reason)


def _attempt(step: StepStatus | None) -> tuple[object, ...]:
    return (step.name, step.attempt, step.counted_pod) if step else (*FIRST_JOB, "")


def _follow_end(status: QLoRAJobStatus, facts: Facts, held_back: Reason | None = None) -> QLoRAJobStatus:
    """Follow a finished job. `held_back`: why a requested retry does not start yet."""
    job, now = facts.job, facts.now
    # A request in a spec that cannot be read now waits for the operator that can.
    if not job.problem:
        status = replace(status, observed_generation=job.generation)
        failed = condition(status, "Failed")
        if failed is not None and failed.status == "True":
            why = held_back or Reason(failed.reason, failed.message)
            status = set_condition(status, job, now, "Stalled", "True", why)
    status = settled(job, count_usage(status, facts), facts.counted_seconds)
    return follow_cleanup(status, job, facts.observed, now)


def _start(status: QLoRAJobStatus, now: datetime) -> QLoRAJobStatus:
    return status if status.start_time is not None else replace(status, start_time=format_time(now))


def _note_request(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """Note the request.

    A step whose pods could not start gets another Job with the current profile.
    """
    request, step = facts.job.spec.retry.request, status.step
    if request in (None, status.retry_request):
        return status
    status = replace(status, retry_request=request)
    if step is None or not step.job_uid or step.running_pod or step.counted_pod:
        return status
    if (child := facts.observed.child(step.job_name)) is not None and child.suspended:
        return status  # another Job would lose its place in the queue
    resolved = with_profile_of_today(
        status.resolved,
        facts.job,
        facts.profiles,
        facts.continued,
        is_shared=facts.shared is not None,
        same_trainer=step.name != "prepare",
    )
    return replace(status, step=next_attempt(step, facts.job), resolved=resolved)


def _note_attempt(status: QLoRAJobStatus) -> QLoRAJobStatus:
    # The first is not noted: it would be another write for every job.
    attempt = status.step.attempt if status.step else 0
    if attempt <= max(1, status.highest_attempt):
        return status
    return replace(status, highest_attempt=attempt)


def _show_progress(
    status: QLoRAJobStatus, own: ProgressRecord | None, beside: ProgressRecord | None, now: datetime
) -> QLoRAJobStatus:
    step = status.step
    if is_finished(status) or step is None:
        return status
    # Of several cells that one pod trains, the first may have ended before the others.
    records = [record for record in (own, beside) if record and record.step == step.name]
    newest = max((record.time for record in records), key=parse_time, default=step.reported_at)
    if newest != step.reported_at:
        status = replace(status, step=replace(step, reported_at=newest, progressed_at=format_time(now)))
    return with_progress(status, own) if own is not None and own in records else status
