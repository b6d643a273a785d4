"""Fixes the inputs of a job's steps, or finds why the job cannot start."""

from collections.abc import Mapping

from qlora_api.contract import needed_contract, with_signing, without_signing
from qlora_api.kubernetes_values import amount
from qlora_api.naming import workspace_claim_name, workspace_folder
from qlora_api.profile import Limits, Profile
from qlora_api.schema import replace
from qlora_api.spec.resolved import open_settings
from qlora_api.status import MAX_DOCUMENT_LENGTH, QLoRAJobStatus, Resolved
from qlora_operator.decisions.announcing import reserved_config_map
from qlora_operator.decisions.continued import continued_run, objection_of_other_job
from qlora_operator.decisions.manifests.objects import document
from qlora_operator.decisions.manifests.volumes import reserved_claim, reserved_secret
from qlora_operator.decisions.observed.facts import FIRST_JOB, Facts, new_step
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, Reason, share_of
from qlora_operator.decisions.usage.budget import limit_of_hours

_NOT_SHARED = "WorkspaceNotShared"
_ROOM_FOR_A_GATE = 1024
"""Bytes of the document: a job may get a gate, without a score, when it has started."""


def resolve(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """Fix everything that the pods depend on, as soon as the job may start."""
    job, profile = facts.job, facts.profiles.get(facts.job.spec.scheduling.profile_name)
    has_begun = job.status.current_revision is not None or facts.observed.children
    if status.resolved is not None and not has_begun and (job.stops or objection(facts) is not None):
        return replace(status, resolved=None)
    if status.resolved is not None and status.step is None:
        # The first Job exists, and the status is not stored yet; or another client has emptied that: steps that are
        # done report their results again. Without that Job nothing depends on the profile of that day but the run.
        fixed: Resolved | None = status.resolved
        if not facts.observed.children:
            shared = facts.shared is not None
            fixed = with_profile_of_today(
                fixed, job, facts.profiles, facts.continued, is_shared=shared, same_trainer=True
            )
        return replace(status, resolved=fixed, step=new_step(job, "prepare", status.highest_attempt + 1))
    if status.resolved is not None and not _may_still_change(status, job, facts.observed, profile):
        return status
    # The revision of a job that has started is gone: its values are fixed again, and nothing objects to its start.
    is_to_start = job.status.current_revision is None
    if profile is None or job.stops or (is_to_start and objection(facts) is not None):
        return status
    own_claim = job.spec.workspace.claim_name
    resolved = Resolved(
        contract_version=_signed(_contract_of_training(job, is_shared=facts.shared is not None), profile),
        document=document(job, profile),
        queue_name=job.queue_name,
        queue_priority_class_name=job.queue_priority_class_name,
        profile=_copy_for(job, profile),
        canary=is_canary(job, profile) or None,
        claim_name=own_claim or workspace_claim_name(job.name, job.run_uid),
        claim_created=own_claim is None,
        workspace_path=workspace_folder(job.name, job.run_uid),
        continued=continued_run(job, facts.continued),
        shared_path=job.shares,
        gpu_hours=limit_of_hours(profile),
    )
    resolved = _with_trainer_of_its_cell(resolved, job, facts.continued)
    return replace(status, resolved=resolved, step=status.step or new_step(job, *FIRST_JOB))


def _with_trainer_of_its_cell(resolved: Resolved, job: QLoRAJob, cell: QLoRAJob | None) -> Resolved:
    """Set the image to the one that has trained the cell that the job publishes.

    This needs both in one sweep; otherwise the image stays as it is. No other trainer resumes the cell's run, and days
    may lie between the two jobs. Once fixed it stays so.
    """
    fixed = job.status.resolved
    if fixed is None and cell is not None and cell.shares == job.shares:
        fixed = cell.status.resolved
    if job.spec.continues is None or job.shares is None or fixed is None:
        return resolved
    profile = replace(resolved.profile, image=fixed.profile.image)
    contract = min(resolved.contract_version, without_signing(fixed.contract_version))
    return replace(resolved, profile=profile, canary=fixed.canary, contract_version=_signed(contract, profile))


def _contract_of_training(job: QLoRAJob, *, is_shared: bool) -> int:
    chosen = bool(open_settings(job.spec))
    return needed_contract(job.spec.resources.node_count, grouped=is_shared, chosen=chosen)


def _signed(contract: int, profile: Profile) -> int:
    """Return the contract version that a trainer needs, also to sign with a key.

    An older trainer does not publish.
    """
    return with_signing(contract) if profile.signing_key is not None else contract


def _may_still_change(status: QLoRAJobStatus, job: QLoRAJob, observed: Observed, today: Profile | None) -> bool:
    """Whether nothing was created yet, and the profile has been fixed since.

    A quota may have rejected the first Job.
    """
    step = status.step
    if step is None or status.resolved is None or today is None:
        return False
    if step.job_uid or (step.name, step.attempt) != FIRST_JOB:
        return False
    return observed.child(step.job_name) is None and status.resolved.profile != _copy_for(job, today)


def objection(facts: Facts) -> Reason | None:
    """Return why settings, nodes or other jobs keep the job from starting."""
    return objection_before_limit(facts) or job_limit_reached(facts.job, facts.profiles, facts.jobs_of_profile)


def objection_before_limit(facts: Facts) -> Reason | None:
    """Return what keeps the job from starting also if its profile has a place for it."""
    return objection_to_job(facts.job, facts.profiles, facts.continued, facts.continued_writer) or facts.no_gpu


def objection_to_job(
    job: QLoRAJob, profiles: Mapping[str, Profile], continued: QLoRAJob | None = None, writer: str = ""
) -> Reason | None:
    """Return why they keep the job from starting, apart from the limit of its profile.

    Returns None if it needs at most a place among the profile's jobs. `continued`: the job that spec.continues names;
    `writer`: a pod or Job that may still save a checkpoint of that.
    """
    scheduling = job.spec.scheduling
    profile = profiles.get(scheduling.profile_name)
    if profile is None:
        return Reason(
            "ProfileNotFound",
            f"there is no valid QLoRAProfile {scheduling.profile_name!r}, which spec.scheduling.profileName names; the "
            f"profiles of namespace {job.namespace!r} are: {_allowed_profiles(job.namespace, profiles)}",
        )
    fields = {
        "priorityClassName": scheduling.priority_class_name,
        "nodeSelector": scheduling.node_selector,
        "tolerations": scheduling.tolerations,
    }
    denied = ", ".join(field for field, value in fields.items() if value)
    if denied and not profile.allow_job_scheduling:
        return Reason(
            "SchedulingNotAllowed",
            f"profile {scheduling.profile_name!r} does not let a job set spec.scheduling.{denied}: create the job "
            "again without it, or with another profile",
        )
    return (
        reserved_claim(job.spec, profiles.values())
        or _not_shared(job, profile)
        or objection_to_retry(job, profiles)
        or objection_of_other_job(job, continued, writer, profiles.values())
        or _too_large(job, profile)
    )


def _too_large(job: QLoRAJob, profile: Profile) -> Reason | None:
    """Return why the pods cannot receive the job's spec, or None if they can."""
    size, limit = len(document(job, profile).encode()), MAX_DOCUMENT_LENGTH - _ROOM_FOR_A_GATE
    if size <= limit:
        return None
    return Reason(
        "SpecTooLarge",
        f"the spec that pods read has {size} bytes as JSON, and may have {limit}: create the job again with a shorter "
        "spec.dataset.systemPrompt.text, spec.gate.score.schema or spec.gate.score.pattern",
    )


def _not_shared(job: QLoRAJob, profile: Profile) -> Reason | None:
    """Return why pods on several nodes cannot share the workspace.

    Returns None if they can. The profile's access mode is assumed for an existing claim: the operator cannot read which
    node it is bound to.
    """
    if job.spec.resources.node_count == 1:
        return None
    nodes, name = job.spec.resources.node_count, job.spec.scheduling.profile_name
    if profile.workspace.topology != "shared":
        return Reason(
            _NOT_SHARED,
            f"spec.resources.nodes is {nodes}, and workspaces of profile {name!r} cannot be mounted on several nodes "
            f"(workspace.topology is {profile.workspace.topology}, must be shared): create the job again with another "
            "profile, or without nodes",
        )
    workspace = job.spec.workspace
    modes = workspace.access_modes or (profile.workspace.access_mode,)
    if workspace.claim_name is None and "ReadWriteMany" not in modes:
        return Reason(
            _NOT_SHARED,
            f"spec.resources.nodes is {nodes}, and the workspace would be {', '.join(modes)}: create the job again "
            "with spec.workspace.accessModes [ReadWriteMany], or with a profile whose workspace.accessMode is that",
        )
    return None


def objection_to_retry(job: QLoRAJob, profiles: Mapping[str, Profile]) -> Reason | None:
    """Return why current profiles block the start and a retry, or None if they do not."""
    reserved = reserved_secret(job.spec, profiles.values()) or reserved_config_map(job.spec, profiles.values())
    return reserved or _objection_of_limits(job, profiles) or _no_evaluation(job, profiles) or job.hold


def _no_evaluation(job: QLoRAJob, profiles: Mapping[str, Profile]) -> Reason | None:
    """Return why no pod can measure the job's benchmarks, or None if one can, or there are none."""
    name = job.spec.scheduling.profile_name
    profile = profiles.get(name)
    if profile is None or profile.evaluation is not None or not job.spec.benchmarks:
        return None
    return Reason(
        "EvaluationNotAvailable",
        f"spec.gate.benchmarks is set, and profile {name!r} has no evaluation: ask the platform team to set that, or "
        "create the job again with another profile or without benchmarks",
    )


def _objection_of_limits(job: QLoRAJob, profiles: Mapping[str, Profile]) -> Reason | None:
    """Return why the profile's limits block a start or a retry here."""
    name = job.spec.scheduling.profile_name
    profile = profiles.get(name)
    if profile is None:
        return None
    if not profile.admits(job.namespace):
        return Reason(
            "ProfileNotAllowed",
            f"spec.scheduling.profileName {name!r} is not for namespace {job.namespace!r}, whose profiles are: "
            f"{_allowed_profiles(job.namespace, profiles)}; create the job again with one of them",
        )
    limits = profile.limits or Limits()
    gpus, several = job.spec.resources.gpu_count, job.spec.resources.node_count > 1
    if limits.gpus is not None and gpus > limits.gpus:
        return _too_much("resources.gpus × nodes" if several else "resources.gpus", str(gpus), str(limits.gpus), name)
    hours = job.spec.budget.gpu_hours if job.spec.budget is not None else None
    if limits.gpu_hours is not None and hours is not None and hours > limits.gpu_hours:
        return _too_much("budget.gpuHours", f"{hours:g}", f"{limits.gpu_hours:g}", name)
    size = _size_to_create(job, profile)
    if limits.workspace_size is not None and size is not None and amount(size) > amount(limits.workspace_size):
        return _too_much("workspace.size", size, limits.workspace_size, name)
    return None


def job_limit_reached(job: QLoRAJob, profiles: Mapping[str, Profile], jobs_of_profile: int) -> Reason | None:
    """Return why the job waits for others of its profile, or None if there is a place."""
    namespace, name = job.namespace, job.spec.scheduling.profile_name
    profile = profiles.get(name)
    limit = profile.limits.jobs if profile is not None and profile.limits is not None else None
    if limit is None or jobs_of_profile < limit:
        return None
    return Reason(
        "JobLimitReached",
        f"{jobs_of_profile} jobs of profile {name!r} have started in namespace {namespace!r}, and the "
        f"profile allows {limit} at a time: this job starts when one of them has ended",
    )


def with_profile_of_today(
    resolved: Resolved | None,
    job: QLoRAJob,
    profiles: Mapping[str, Profile],
    continued: QLoRAJob | None,
    *,
    is_shared: bool,
    same_trainer: bool = False,
) -> Resolved | None:
    """Return what was resolved, with the current profile if it still exists.

    `is_shared`: whether a pod of its sweep trains it. `same_trainer`: except for the image.
    """
    profile = profiles.get(job.spec.scheduling.profile_name)
    if resolved is None or profile is None:
        return resolved
    copied = _copy_for(job, profile)
    canary: bool | None = is_canary(job, profile) or None
    if same_trainer:
        copied, canary = replace(copied, image=resolved.profile.image), resolved.canary
    # The trainer that began the run may implement no newer version, unless that was one for a key that is gone.
    needed = _contract_of_training(job, is_shared=is_shared)
    supported = without_signing(resolved.contract_version) if same_trainer else needed
    contract = _signed(min(supported, needed), profile)
    today = replace(
        resolved, profile=copied, canary=canary, contract_version=contract, gpu_hours=limit_of_hours(profile)
    )
    return today if same_trainer else _with_trainer_of_its_cell(today, job, continued)


def as_copied(profile: Profile) -> Profile:
    """Drop the fields that only decide whether a job starts, and when it is deleted.

    They would name other tenants' namespaces, and count as they are today.
    """
    return replace(
        profile, allowed_namespaces=None, limits=None, paused=None, canary=None, ttl_seconds_after_finished=None
    )


def is_canary(job: QLoRAJob, profile: Profile) -> bool:
    """Whether the job gets the image of the profile's canary. All cells of a sweep do, or none."""
    canary = None if _evaluation_image(job, profile) else profile.canary
    return canary is not None and share_of(job.shares or job.uid) * 100 < canary.percent


def _copy_for(job: QLoRAJob, profile: Profile) -> Profile:
    copied = as_copied(profile)
    if image := _evaluation_image(job, profile):
        return replace(copied, image=image)
    return replace(copied, image=profile.canary.image) if profile.canary and is_canary(job, profile) else copied


def _evaluation_image(job: QLoRAJob, profile: Profile) -> str | None:
    """The image with the harness, for all steps: train runs it, and prepare checks the tasks with it."""
    return profile.evaluation.image if profile.evaluation and job.spec.benchmarks else None


def _allowed_profiles(namespace: str, profiles: Mapping[str, Profile]) -> str:
    allowed = (name for name, profile in profiles.items() if profile.admits(namespace))
    return ", ".join(sorted(allowed)) or "none"


def _size_to_create(job: QLoRAJob, profile: Profile) -> str | None:
    workspace = job.spec.workspace
    return None if workspace.claim_name is not None else workspace.size or profile.workspace.size


def _too_much(field: str, found: str, allowed: str, profile: str) -> Reason:
    return Reason(
        "LimitExceeded",
        f"spec.{field} is {found}, and profile {profile!r} allows {allowed}: create the job again with less, or with "
        "another profile",
    )
