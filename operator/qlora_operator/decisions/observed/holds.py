"""Decides whether a job's profile stops it for now, although its user does not."""

from collections.abc import Mapping

from qlora_api.profile import Profile
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason

PAUSED, SPENT = "ProfilePaused", "MonthlyBudgetSpent"
HOLDS = (PAUSED, SPENT)
"""The reasons of such stops."""
_SECONDS = 3600


def hold_of(job: QLoRAJob, profiles: Mapping[str, Profile], spent_seconds: int = 0) -> Reason | None:
    """Return why the profile stops the job, or None if it does not.

    `spent_seconds`: GPU seconds of its namespace with the profile in this month.
    """
    name, step = job.spec.scheduling.profile_name, job.status.step
    profile = profiles.get(name)
    if profile is None:
        return None
    if profile.paused:
        return Reason(PAUSED, f"the administrator has paused profile {name!r}: the job continues when that ends")
    # A run that is at its end is published: that takes no GPU.
    if is_spent(profile, spent_seconds) and (step is None or step.name != "publish"):
        return Reason(
            SPENT,
            f"namespace {job.namespace!r} has used the {monthly_hours(profile):g} GPU hours that profile {name!r} "
            "allows it in a month (UTC): the job continues with the next month, or when the administrator allows more",
        )
    return None


def is_spent(profile: Profile, spent_seconds: int) -> bool:
    """Whether a namespace that has used so many GPU seconds in this month may use no more."""
    hours = monthly_hours(profile)
    return hours is not None and spent_seconds >= hours * _SECONDS


def monthly_hours(profile: Profile) -> float | None:
    """Return the GPU hours of each namespace in a month, or None without a limit."""
    return profile.limits.gpu_hours_per_month if profile.limits is not None else None
