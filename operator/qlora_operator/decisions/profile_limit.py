"""Finds jobs that wait, to start or to be retried, for others of their profile."""

from collections.abc import Mapping

from qlora_api.profile import Profile
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason
from qlora_operator.decisions.resolution import job_limit_reached, objection_before_limit, objection_to_retry
from qlora_operator.decisions.retry import is_to_be_taken_up


def limit_of_jobs(job: QLoRAJob, profiles: Mapping[str, Profile]) -> int | None:
    """Return the maximum of started jobs of its profile in its namespace.

    Returns None if the job does not want to start, or the number is not limited.
    """
    profile = profiles.get(job.spec.scheduling.profile_name)
    if profile is None or profile.limits is None or not _needs_a_place(job):
        return None
    return profile.limits.jobs


def held_back(facts: Facts) -> Reason | None:
    """Return why the job waits for others of its profile to end.

    Returns None if it does not, or another reason keeps it too.
    """
    job = facts.job
    reached = job_limit_reached(job, facts.profiles, facts.jobs_of_profile)
    if reached is None or not _needs_a_place(job):
        return None
    other = objection_before_limit(facts) if _is_new(job) else objection_to_retry(job, facts.profiles)
    return reached if other is None else None


def _needs_a_place(job: QLoRAJob) -> bool:
    return not job.deleting and (_is_new(job) or is_to_be_taken_up(job))


def _is_new(job: QLoRAJob) -> bool:
    return job.status.current_revision is None and not job.stops and not job.problem
