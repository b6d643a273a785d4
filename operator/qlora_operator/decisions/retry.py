"""Retries a failed job when its user asks for it."""

from collections.abc import Mapping

from qlora_api.contract import ExitCode
from qlora_api.profile import Profile
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, Resolved, StepName
from qlora_operator.decisions.cleanup import clean_job_name
from qlora_operator.decisions.manifests.objects import with_gate, with_memory
from qlora_operator.decisions.observed.conditions import has_trained, is_true
from qlora_operator.decisions.observed.facts import Facts, new_step, set_condition
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason
from qlora_operator.decisions.resolution import with_profile_of_today


def is_to_be_taken_up(job: QLoRAJob) -> bool:
    """Whether a failed job has another retry.request than the last one seen."""
    status = job.status
    failed = is_true(status, "Failed") and status.step is not None and not (job.problem or job.spec.cancel)
    return failed and job.spec.retry.request not in (None, status.retry_request)


def take_up(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """Retry a failed job at the step that failed, with the current profile and gate.

    After a clean-up, in the middle of one, or without its base model or prepared rows, it retries at prepare, which
    makes again what is missing; a step with an existing result reports it again.
    """
    job, step = facts.job, status.step
    if step is None:
        return status
    cleaned = is_true(status, "CleanedUp") or facts.observed.child(clean_job_name(job)) is not None
    again = cleaned or _lacks_what_prepare_leaves(job, facts.profiles)
    first_attempt = max(status.highest_attempt, step.attempt) + 1
    name: StepName = "prepare" if again else step.name
    forgotten = {"CleanedUp", *(["Prepared"] if name == "prepare" else ())}
    conditions = tuple(entry for entry in status.conditions if entry.type not in forgotten)
    status = replace(
        status,
        conditions=conditions,
        completion_time=None,
        failures=0,
        disruptions=0,
        last_failure=None,
        first_attempt=first_attempt,
        gate=None,
        step=new_step(job, name, first_attempt),
        resolved=_resolved_again(status, facts, has_its_run=_has_its_run(status, cleaned=cleaned)),
    )
    reason = Reason("TakenUp", f"spec.retry.request is {job.spec.retry.request}")
    return set_condition(status, job, facts.now, "Failed", "False", reason)


def _has_its_run(status: QLoRAJobStatus, *, cleaned: bool) -> bool:
    """Whether the workspace has prepare's copied checkpoint, or the adapter.

    A clean-up keeps the adapter.
    """
    return has_trained(status) or (is_true(status, "Prepared") and not cleaned)


def _resolved_again(status: QLoRAJobStatus, facts: Facts, *, has_its_run: bool) -> Resolved | None:
    """Resolve again with the current profile and gate."""
    # Only the trainer that began a run continues it: its image stays once there is a run to continue.
    prepared = is_true(status, "Prepared")
    resolved = with_profile_of_today(
        status.resolved,
        facts.job,
        facts.profiles,
        facts.continued,
        is_shared=facts.shared is not None,
        same_trainer=prepared,
    )
    if resolved is not None and has_its_run:
        # A pod whose volume is gone would wait for ever, and the other job's claim may be deleted by now.
        resolved = replace(resolved, continued=None)
    if resolved is None:
        return None
    document = with_gate(resolved.document, facts.job.spec.gate)
    if not prepared:
        # A prepared job keeps the settings that prepare chose for this memory.
        document = with_memory(document, facts.job, resolved.profile)
    return replace(resolved, document=document)


def _lacks_what_prepare_leaves(job: QLoRAJob, profiles: Mapping[str, Profile]) -> bool:
    """Whether base model or prepared rows have changed: only prepare restores them."""
    status, today = job.status, profiles.get(job.spec.scheduling.profile_name)
    lost = (ExitCode.MODEL_UNAVAILABLE.reason, ExitCode.BAD_DATASET.reason)
    if status.last_failure is not None and status.last_failure.reason in lost:
        return True
    return bool(status.resolved and today and status.resolved.profile.model_cache != today.model_cache)
