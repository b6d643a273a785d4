"""Fixes what a job's steps depend on before the first of them, and says what keeps it from starting; pure."""

from pydantic import ValidationError

from qlora_api.contract import CONTRACT_VERSION
from qlora_api.naming import child_job_name, workspace_claim_name, workspace_folder
from qlora_api.status import QLoRAJobStatus, Resolved
from qlora_operator.decisions.facts import Facts, new_step
from qlora_operator.decisions.manifests import document
from qlora_operator.decisions.observe import ChildJob, Reason
from qlora_operator.decisions.volumes import reserved_claim


def resolve(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """The status with everything fixed that the pods depend on, as soon as the job may start."""
    job = facts.job
    if status.resolved is not None:
        return status
    if (first := _first_job(facts)) and (resolved := _resolved_by(first)):
        # The operator was stopped, or has had more urgent work, since it created the first Job.
        step = new_step(job, "prepare", 1).model_copy(update={"job_uid": first.uid})
        return status.model_copy(update={"resolved": resolved, "step": step})
    if job.spec.suspend or objection(facts) is not None:
        return status
    own_claim = job.spec.workspace.claim_name
    resolved = Resolved(
        contract_version=CONTRACT_VERSION,
        document=document(job),
        queue_name=job.queue_name,
        queue_priority=job.queue_priority,
        profile=facts.profiles[job.spec.scheduling.profile],
        claim_name=own_claim or workspace_claim_name(job.name, job.uid),
        claim_created=own_claim is None,
        workspace_path=workspace_folder(job.name, job.uid),
    )
    return status.model_copy(update={"resolved": resolved, "step": new_step(job, "prepare", 1)})


def _first_job(facts: Facts) -> ChildJob | None:
    return facts.observed.child(child_job_name(facts.job.name, "prepare", 1)) or facts.observed.lost


def _resolved_by(first: ChildJob) -> Resolved | None:
    try:
        # As in the status, a field that another version of the operator has written is no reason to start anew.
        return Resolved.model_validate_json(first.resolved, extra="ignore")
    except ValidationError:
        return None


def objection(facts: Facts) -> Reason | None:
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


def with_profile_of_today(resolved: Resolved | None, facts: Facts) -> Resolved | None:
    """What was resolved with the administrator's profile as it is now, if there still is one of that name."""
    profile = facts.profiles.get(facts.job.spec.scheduling.profile)
    if resolved is None or profile is None:
        return resolved
    return resolved.model_copy(update={"profile": profile, "contract_version": CONTRACT_VERSION})
