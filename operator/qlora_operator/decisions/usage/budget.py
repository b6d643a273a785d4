"""Forecasts the GPU hours of a job, and stops one that has used up its budget."""

from datetime import datetime, timedelta

from qlora_api.contract import ProgressRecord
from qlora_api.forecast import cost_text, forecast_of_flops, hours_text, wall_time_text
from qlora_api.profile import Limits, Profile
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus
from qlora_api.usage import ForecastStatus, WorkStatus
from qlora_operator.decisions.observed.conditions import is_finished
from qlora_operator.decisions.observed.endings import fail, failure_of
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, Reason
from qlora_operator.decisions.observed.shared_pod import may_be_trained
from qlora_operator.decisions.pods.attempts import charge_running
from qlora_operator.decisions.usage.usage import (
    count_usage,
    gpus_at_a_time,
    gpus_of_a_pod,
    has_gpus,
    uncounted_seconds,
    used_seconds,
)

BUDGET_EXCEEDED = "BudgetExceeded"
STEPS_OF_A_FORECAST = 10
"""Optimizer steps after whose pace the rest is forecast: the first are slower than the others."""
_STOPPED_STEPS = ("prepare", "train")
"""A run that is at its end is published whatever it has used."""
_SECONDS = 3600


def allowed_seconds(job: QLoRAJob, status: QLoRAJobStatus) -> float | None:
    """Return the GPU seconds in the job's budget and the profile's limit."""
    own = job.spec.budget.gpu_hours if job.spec.budget is not None else None
    limit = status.resolved.gpu_hours if status.resolved is not None else None
    hours = min((hours for hours in (own, limit) if hours is not None), default=None)
    return None if hours is None else hours * _SECONDS


def limit_of_hours(profile: Profile) -> float | None:
    """Return the GPU hours that the profile allows one job, or None without a limit."""
    return (profile.limits or Limits()).gpu_hours


def enforce_budget(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """Fail a job that has used its GPU hours, its parts of the pods of its sweep among them.

    Its pod saves a checkpoint, and a retry resumes from it.
    """
    job, now = facts.job, facts.now
    allowed, step = allowed_seconds(job, status), status.step
    if is_finished(status) or allowed is None or step is None or step.name not in _STOPPED_STEPS:
        return status
    if not gpus_of_a_pod(job, status) or may_be_trained(status, facts.shared):
        # The pod of the sweep continues for its other cells: its end alone shows which cells it has trained.
        return status
    pods = facts.observed.pods_of(step.job_uid)
    if any(pod.exited_well for pod in pods) and not any(has_gpus(pod) for pod in pods):
        return status  # the run has finished, and its Job is about to report it
    counted = count_usage(status, facts, until_now=True)
    if used_seconds(counted) < allowed:
        return status
    # Count the time until now, for a later retry: the pods have not ended yet.
    counted = charge_running(counted, facts.observed, now)
    reason = Reason(BUDGET_EXCEEDED, _exceeded(counted, job, allowed))
    if counted.forecast is not None:
        counted = replace(counted, forecast=replace(counted.forecast, within_budget=False, message=reason.sentence))
    return fail(counted, job, now, failure_of(step.name, reason.word, reason.sentence, now))


def budget_at(job: QLoRAJob, status: QLoRAJobStatus, observed: Observed, now: datetime) -> datetime | None:
    """Return when the running pods will have used up the budget.

    Returns None if none of the job's own runs, or there is no budget.
    """
    allowed, gpus, step = allowed_seconds(job, status), gpus_at_a_time(job, status, observed.pods), status.step
    if allowed is None or not gpus or step is None or step.name not in _STOPPED_STEPS:
        return None
    left = allowed - used_seconds(status) - uncounted_seconds(job, status, observed.pods, now)
    return now + timedelta(seconds=max(1.0, left / gpus))


def forecast_of_work(status: QLoRAJobStatus, work: WorkStatus) -> QLoRAJobStatus:
    """Forecast the GPU hours from prepare's figures and the profile's GPU.

    Without them the status stays as it is.
    """
    profile = status.resolved.profile if status.resolved is not None else None
    if profile is None or profile.gpu_tflops is None or profile.gpu_resource is None:
        return status
    forecast = forecast_of_flops(work.flops, profile.gpu_tflops, profile.gpu_hour_price, profile.currency)
    return replace(status, forecast=forecast)


def text_of_work(status: QLoRAJobStatus, job: QLoRAJob, work: WorkStatus) -> str:
    """Return the expected time and cost of the run as a sentence, empty without the profile's GPU."""
    forecast, profile = status.forecast, status.resolved.profile if status.resolved is not None else None
    if forecast is None or profile is None or profile.gpu_tflops is None:
        return ""
    gpus = job.spec.resources.gpu_count
    cost = "" if forecast.cost is None else f", {forecast.cost}"
    time = wall_time_text(work.flops, profile.gpu_tflops, gpus)
    on = f"{gpus} GPU{'s' * (gpus != 1)}"
    return f"training is expected to take {time} on {on} ({forecast.gpu_hours} GPU hours{cost}); "


def follow_forecast(
    status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, now: datetime, record: ProgressRecord | None
) -> QLoRAJobStatus:
    """Forecast from the pace of the run, once known, and compare with the budget."""
    if is_finished(status):
        return status
    if record is not None and record.remaining_seconds is not None and _is_steady(status, record):
        status = _forecast_of_pace(status, job, observed, record.remaining_seconds)
    return _judged(status, job)


def _is_steady(status: QLoRAJobStatus, record: ProgressRecord) -> bool:
    """Whether the pod of the record has made enough steps."""
    entries = status.usage.pods if status.usage is not None else ()
    first = next((entry.from_step for entry in entries if entry.uid == record.pod_uid), None)
    return first is not None and record.training_step - first >= STEPS_OF_A_FORECAST


def _forecast_of_pace(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, remaining: float) -> QLoRAJobStatus:
    profile = status.resolved.profile if status.resolved is not None else None
    gpus = gpus_at_a_time(job, status, observed.pods) or _part_of_shared_pod(job, status)
    if profile is None or not gpus:
        return status
    seconds = used_seconds(status) + remaining * gpus
    cost = cost_text(seconds, profile.gpu_hour_price, profile.currency)
    forecast = ForecastStatus(gpu_hours=hours_text(seconds), basis="Measured", cost=cost)
    return replace(status, forecast=forecast)


def _part_of_shared_pod(job: QLoRAJob, status: QLoRAJobStatus) -> float:
    """Return the job's part of the GPUs of its sweep's shared pod."""
    entries = status.usage.pods if status.usage is not None else ()
    return sum(gpus_of_a_pod(job, status) / entry.jobs for entry in entries if entry.end is None)


def _judged(status: QLoRAJobStatus, job: QLoRAJob) -> QLoRAJobStatus:
    """Compare the forecast with the budget, if there are both."""
    allowed, forecast = allowed_seconds(job, status), status.forecast
    if forecast is None:
        return status
    if allowed is None or float(forecast.gpu_hours) * _SECONDS <= allowed:
        is_within = None if allowed is None else True
        return replace(status, forecast=replace(forecast, within_budget=is_within, message=""))
    message = (
        f"the job is expected to take more than the {hours_text(allowed)} GPU hours that it may use: it would stop at "
        f"a checkpoint with the reason {BUDGET_EXCEEDED}; {_remedy(job, status)}, or train on less"
    )
    return replace(status, forecast=replace(forecast, within_budget=False, message=message))


def _exceeded(status: QLoRAJobStatus, job: QLoRAJob, allowed: float) -> str:
    return (
        f"the train pods have used {hours_text(used_seconds(status))} GPU hours, and {hours_text(allowed)} are "
        f"allowed: {_remedy(job, status)}, and set a new spec.retry.request to continue from the checkpoint"
    )


def _remedy(job: QLoRAJob, status: QLoRAJobStatus) -> str:
    own = job.spec.budget.gpu_hours if job.spec.budget is not None else None
    limit = status.resolved.gpu_hours if status.resolved is not None else None
    if limit is None or (own is not None and own < limit):
        return "raise spec.budget.gpuHours"
    return (
        f"ask the administrator to raise limits.gpuHours of profile {job.spec.scheduling.profile_name!r}"
        f"{'' if own is None else ', raise spec.budget.gpuHours'}"
    )
