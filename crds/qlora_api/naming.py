"""Names that derive from a job's name and UID, so that a retry can never make a second child."""

from qlora_api.status import StepName

# Labels of everything that is made for a job.
JOB_LABEL = "qlora.dev/job"
JOB_UID_LABEL = "qlora.dev/job-uid"
STEP_LABEL = "qlora.dev/step"


def short_uid(uid: str) -> str:
    """The first eight characters of a UID: enough to tell a job from its namesake that was deleted before."""
    return uid[:8]


def child_job_name(job_name: str, step: StepName, attempt: int) -> str:
    """`<job>-<step>-<attempt>`: at most 59 characters for a job's name of at most 45 and 5 digits."""
    return f"{job_name}-{step}-{attempt}"


def workspace_claim_name(job_name: str, uid: str) -> str:
    """Name of the claim that the operator makes; with the UID, because a retained claim outlives its job."""
    return f"{job_name}-{short_uid(uid)}"


def workspace_folder(job_name: str, uid: str) -> str:
    """The job's own folder on its workspace claim, which other jobs may share."""
    return f"{job_name}-{short_uid(uid)}"
