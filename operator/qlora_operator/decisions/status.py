"""Computes a job's next status in a chain of transitions."""

from collections.abc import Callable

from qlora_api.figures import with_progress
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.advance import advance, renew
from qlora_operator.decisions.cleanup import follow_cleanup
from qlora_operator.decisions.limits import enforce_deadline, enforce_disruptions, enforce_failures, enforce_progress
from qlora_operator.decisions.observed.conditions import condition, is_finished
from qlora_operator.decisions.observed.endings import not_ready
from qlora_operator.decisions.observed.facts import Facts, next_attempt, set_condition
from qlora_operator.decisions.observed.objects import Reason, format_time, parse_time
from qlora_operator.decisions.pods.attempts import count_attempts, watch_pod
from qlora_operator.decisions.pods.detached import keep_earlier_pod
from qlora_operator.decisions.resolution import job_limit_reached, objection_to_retry, resolve, with_profile_of_today
from qlora_operator.decisions.retry import is_to_be_taken_up, take_up
from qlora_operator.decisions.summary import summarize
from qlora_operator.decisions.usage.budget import enforce_budget, follow_forecast
from qlora_operator.decisions.usage.usage import count_usage


def next_status(facts: Facts) -> QLoRAJobStatus:
    """Compute the next status, equal to the stored one if nothing has changed."""
    status = facts.job.status
    if facts.job.deleting:
        return status
    if is_finished(status):
        if not is_to_be_taken_up(facts.job):
            return _follow_end(status, facts)
        if held_back := objection_to_retry(facts) or job_limit_reached(facts):
            return _follow_end(status, facts, held_back)
        status = take_up(status, facts)
    for transition in _STOPPING if facts.job.problem else _TRANSITIONS:
        status = transition(status, facts)
    return summarize(status, facts)


def next_status_of_pod(facts: Facts) -> QLoRAJobStatus:
    """Compute the status of a sweep's shared pod, as of a job with a train step only."""
    status = facts.job.status
    for transition in _OF_A_SWEEPS_POD:
        status = transition(status, facts)
    return summarize(status, facts)


def with_child(status: QLoRAJobStatus, facts: Facts, job_uid: str) -> QLoRAJobStatus:
    """The status after the Job of the current step has been created."""
    if status.step is None or is_finished(status):
        return status
    step = replace(status.step, job_uid=job_uid)
    return summarize(replace(status, step=step), facts)


def with_rejection(status: QLoRAJobStatus, facts: Facts, reason: Reason) -> QLoRAJobStatus:
    """Return the status after an action of the plan was blocked.

    The API server may have rejected it.
    """
    if is_finished(status):
        return set_condition(status, facts, "CleanedUp", "False", reason)
    return set_condition(status, facts, "Succeeded", "Unknown", reason)


def _follow_end(status: QLoRAJobStatus, facts: Facts, held_back: Reason | None = None) -> QLoRAJobStatus:
    """Follow a finished job. `held_back`: why a requested retry does not start yet."""
    # A request in a spec that cannot be read now waits for the operator that can.
    if not facts.job.problem:
        status = replace(status, observed_generation=facts.job.generation)
        failed = condition(status, "Failed")
        if failed is not None and failed.status == "True":
            status = set_condition(status, facts, "Ready", "False", held_back or not_ready(failed.reason))
    return follow_cleanup(count_usage(status, facts), facts)


def _start(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    if status.start_time is not None:
        return status
    return replace(status, start_time=format_time(facts.now))


def _note_request(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """Note the request.

    A step whose pods could not start gets another Job with the current profile.
    """
    request, step = facts.job.spec.retry.request, status.step
    if request is None:
        return status
    is_raised = request > (status.retry_request or 0)
    status = replace(status, retry_request=request)
    if not is_raised or step is None or not step.job_uid or step.running_pod or step.counted_pod:
        return status
    resolved = with_profile_of_today(status.resolved, facts, same_trainer=step.name != "prepare")
    return replace(status, step=next_attempt(step, facts), resolved=resolved)


def _note_attempt(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    # The first is not noted: it would be another write for every job.
    attempt = status.step.attempt if status.step else 0
    if attempt <= max(1, status.highest_attempt):
        return status
    return replace(status, highest_attempt=attempt)


def _count(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    return count_attempts(status, facts.job, facts.observed, facts.now)


def _watch_pod(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    return watch_pod(status, facts.observed, facts.now)


def _show_progress(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    step = status.step
    if is_finished(status) or step is None:
        return status
    # Of several cells that one pod trains, the first may have ended before the others.
    records = [record for record in (facts.progress, facts.progress_beside) if record and record.step == step.name]
    newest = max((record.time for record in records), key=parse_time, default=step.reported_at)
    if newest != step.reported_at:
        status = replace(status, step=replace(step, reported_at=newest, progressed_at=format_time(facts.now)))
    own = facts.progress
    return with_progress(status, own) if own is not None and own in records else status


Transition = Callable[[QLoRAJobStatus, Facts], QLoRAJobStatus]
_STOPPING: tuple[Transition, ...] = (_start, _count, enforce_deadline, count_usage, enforce_budget)
_TRANSITIONS: tuple[Transition, ...] = (
    _start,
    _note_attempt,
    _note_request,
    resolve,
    _count,
    _watch_pod,
    advance,
    enforce_failures,
    enforce_disruptions,
    enforce_deadline,
    _show_progress,
    enforce_progress,
    renew,
    keep_earlier_pod,
    count_usage,
    follow_forecast,
    enforce_budget,
)
_OF_A_SWEEPS_POD: tuple[Transition, ...] = (
    _count,
    _watch_pod,
    advance,
    enforce_failures,
    enforce_disruptions,
    enforce_deadline,
    _show_progress,
    enforce_progress,
    count_usage,
)
