"""Says which jobs want to start, or to be taken up, and wait for others of their profile to end; pure."""

from collections.abc import Mapping

from qlora_api.profile import Profile
from qlora_operator.decisions.facts import Facts
from qlora_operator.decisions.observe import QLoRAJob
from qlora_operator.decisions.resolution import JOB_LIMIT_REACHED, objection, objection_of_limits
from qlora_operator.decisions.taking_up import is_to_be_taken_up


def limit_of_jobs(job: QLoRAJob, profiles: Mapping[str, Profile]) -> int | None:
    """How many jobs of its profile may have started in its namespace, if the job wants to start and that is limited."""
    profile = profiles.get(job.spec.scheduling.profile)
    if profile is None or profile.limits is None or not (_is_new(job) or is_to_be_taken_up(job)):
        return None
    return profile.limits.jobs


def waits_for_others(facts: Facts) -> bool:
    """Whether nothing keeps the job from going on but that others of its profile have not ended."""
    if not (_is_new(facts.job) or is_to_be_taken_up(facts.job)):
        return False
    reason = objection(facts) if _is_new(facts.job) else objection_of_limits(facts)
    return reason is not None and reason.word == JOB_LIMIT_REACHED


def _is_new(job: QLoRAJob) -> bool:
    return job.status.resolved is None and not job.spec.suspend and not job.problem
