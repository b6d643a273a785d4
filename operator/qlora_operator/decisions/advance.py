"""Advances a job over its steps by the state of their Jobs and pods."""

from datetime import datetime

from qlora_api.contract import ResultRecord
from qlora_api.figures import with_known_facts, with_publication, with_training_facts
from qlora_api.printable import shortened
from qlora_api.schema import replace
from qlora_api.spec.output import OutputSpec
from qlora_api.status import MAX_MESSAGE_LENGTH, FailureStatus, QLoRAJobStatus, StepName, StepStatus
from qlora_operator.decisions.observed.conditions import is_finished
from qlora_operator.decisions.observed.endings import fail, failure_of, succeed
from qlora_operator.decisions.observed.facts import Facts, new_step, next_attempt, set_condition
from qlora_operator.decisions.observed.objects import ChildJob, Pod, QLoRAJob, Reason
from qlora_operator.decisions.pods.attempts import count_attempts, describe_failure
from qlora_operator.decisions.pods.deletions import note_deletion
from qlora_operator.decisions.pods.detached import with_running_pod
from qlora_operator.decisions.pods.kueue import not_supported
from qlora_operator.decisions.pods.nodes import ending_pod, is_over, trains_together
from qlora_operator.decisions.resolution import with_profile_of_today
from qlora_operator.decisions.usage.budget import forecast_of_work, text_of_work

RESULT_FAILURES = ("AdapterNotSigned", "JobFailed", "ResultUnreadable")
"""Reasons of a Job or a result without a pod's own cause."""
_NEXT: dict[StepName, StepName] = {"prepare": "train", "train": "publish"}


def advance(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    """Advance to the first step whose Job has not ended.

    This covers several steps if the operator was down.
    """
    while not is_finished(status):
        before, status = status, _advance_once(status, facts)
        if status is before:
            break
    return status


def _advance_once(status: QLoRAJobStatus, facts: Facts) -> QLoRAJobStatus:
    step, job = status.step, facts.job
    if step is None:
        return status
    child = facts.observed.child(step.job_name)
    if child is None:
        if not step.job_uid or job.stops:
            return status
        if any(_is_waited_for(pod) for pod in facts.observed.pods_of(step.job_uid)):
            return status  # its pods are about to be deleted, and what they ran counts
        # Its Job was deleted, by a user or a suspension: continue with the next number.
        status = note_deletion(status, job, facts.observed, facts.now)
        return replace(status, step=next_attempt(step, facts.job))
    if child.uid != step.job_uid:
        step = step if step.job_uid else with_running_pod(step, step.running_pod, facts.observed)
        status = replace(status, step=replace(step, job_uid=child.uid))
        return count_attempts(status, job, facts.observed, facts.now)
    if child.managed_by:
        queue = status.resolved.queue_name if status.resolved and step.name == "train" else None
        why = not_supported(child.name, child.managed_by, queue)
        return fail(status, job, facts.now, failure_of(step.name, why.word, why.sentence, facts.now))
    pods = facts.observed.pods_of(child.uid)
    if child.complete:
        record = _verified(pods, job, step.name)
        if record is None:
            return _complete_unverified(status, job, facts.now, step)
        return _fail_unsigned(status, job, facts.now, record) or _complete(status, job, facts.now, record)
    if killed := next((pod for pod in pods if pod.ended and pod.fatal), None):
        return fail(status, facts.job, facts.now, describe_failure(killed, job, step.name))
    if child.failure is not None:
        return _follow_failure(status, facts, step, child)
    return status


def _is_waited_for(pod: Pod) -> bool:
    """Whether the step waits for this pod of a deleted Job.

    No watch shows a detached one afterwards.
    """
    return not pod.ended and (pod.deletion_requested is None or pod.detached)


def _follow_failure(status: QLoRAJobStatus, facts: Facts, step: StepStatus, child: ChildJob) -> QLoRAJobStatus:
    """Return the status after the step's Job has failed.

    This ends the job, unless the failure is not one of the step.
    """
    pods = facts.observed.pods_of(step.job_uid)
    if child.expired:
        return replace(status, step=next_attempt(step, facts.job))
    if trains_together(facts.job, step.name):
        return _follow_failure_together(status, facts, step, child, pods)
    ended = [pod for pod in pods if pod.ended and not pod.exited_well]
    if not ended:
        failure = _without_pod(child.failure or Reason("", ""), step, facts.job, facts.now)
        return fail(status, facts.job, facts.now, failure)
    allowed = facts.job.spec.retry.max_failures
    # The Job counts pods that the kubelet rejects as failures, and ignores a limit that was raised later.
    spared = any(pod.rejected for pod in ended) or (child.backoff_limit is not None and child.backoff_limit < allowed)
    if ended[-1].unsupported:
        return _after_unsupported(status, facts, step)
    if spared and step.failures <= allowed and not ended[-1].decisive:
        return replace(status, step=next_attempt(step, facts.job))
    record = ended[-1].result(facts.job.run_uid, step.name)
    status = with_known_facts(status, record) if record else status
    return fail(status, facts.job, facts.now, describe_failure(ended[-1], facts.job, step.name))


def _follow_failure_together(
    status: QLoRAJobStatus, facts: Facts, step: StepStatus, child: ChildJob, pods: tuple[Pod, ...]
) -> QLoRAJobStatus:
    """Follow the failed Job of several nodes.

    A permanent cause ends the job. After any other the step gets another Job, for a counted attempt from `renew`, once
    the limits have been checked.
    """
    pod = ending_pod(pods, child)
    if pod is None:
        # Without a pod's record no cause is known to be permanent; if none has run, there is nothing to count.
        waits = bool(step.counted_pod) or not is_over(pods, child)
        return status if waits else replace(status, step=next_attempt(step, facts.job))
    if pod.unsupported:
        return _after_unsupported(status, facts, step)
    if not pod.decisive:
        return status if step.counted_pod else replace(status, step=next_attempt(step, facts.job))
    record = pod.result(facts.job.run_uid, step.name)
    status = with_known_facts(status, record) if record else status
    return fail(status, facts.job, facts.now, describe_failure(pod, facts.job, step.name))


def renew(status: QLoRAJobStatus, job: QLoRAJob) -> QLoRAJobStatus:
    """Give an attempt of several nodes that has been counted another Job.

    All pods start again together: the others have lost their peer, and could not admit one that Kubernetes replaces.
    """
    step = status.step
    if is_finished(status) or step is None or not step.counted_pod or not trains_together(job, step.name):
        return status
    return replace(status, step=next_attempt(step, job))


def _after_unsupported(status: QLoRAJobStatus, facts: Facts, step: StepStatus) -> QLoRAJobStatus:
    """Let the step wait after a trainer of another release.

    This costs no failure. It waits for another image, or until less is expected.
    """
    before, is_shared = status.resolved, facts.shared is not None
    today = with_profile_of_today(before, facts.job, facts.profiles, facts.continued, is_shared=is_shared)
    if today is None or before is None:
        return status
    if today.profile.image == before.profile.image and today.contract_version >= before.contract_version:
        return status
    return replace(status, resolved=today, step=next_attempt(step, facts.job))


def _verified(pods: tuple[Pod, ...], job: QLoRAJob, step: StepName) -> ResultRecord | None:
    # Of several nodes, node 0 has written the adapter.
    for pod in reversed([pod for pod in pods if pod.node == 0]):
        record = pod.result(job.run_uid, step)
        if pod.exited_well and record is not None and (record.outcome, record.exit_code) == ("succeeded", 0):
            return record if step != "publish" or _names_all(record, job.spec.output) else None
    return None


def _names_all(record: ResultRecord, output: OutputSpec) -> bool:
    """Whether a result of publish reports everything that the job asks for."""
    merged = output.merged is None or record.merged is not None
    base = output.base is None or (record.base is not None and record.base.uri is not None)
    gguf = output.gguf is None or (record.adapter is not None and record.adapter.gguf is not None)
    return record.adapter is not None and merged and base and gguf


def _fail_unsigned(status: QLoRAJobStatus, job: QLoRAJob, now: datetime, record: ResultRecord) -> QLoRAJobStatus | None:
    """Fail a job with a signing key in its profile and an unsigned adapter.

    Returns None for any other. A run keeps the trainer that began it, also when it resumes with the current profile,
    and an older trainer ignores the key.
    """
    profile, adapter = status.resolved.profile if status.resolved is not None else None, record.adapter
    if record.step != "publish" or profile is None or profile.signing_key is None:
        return None
    if adapter is None or adapter.lineage == "signed":
        return None
    message = (
        f"the adapter is published at {adapter.uri}, and it is not signed, although profile "
        f"{job.spec.scheduling.profile_name!r} has a signingKey: the trainer of this run is of a release that does "
        "not sign, and no other goes on with it; create the job again to train it with the profile's image of today"
    )
    return fail(status, job, now, failure_of(record.step, "AdapterNotSigned", message, now))


def _complete(status: QLoRAJobStatus, job: QLoRAJob, now: datetime, record: ResultRecord) -> QLoRAJobStatus:
    step = record.step
    if step == "publish":
        base = status.base if record.base is None else record.base
        status = replace(status, adapter=record.adapter, merged=record.merged, gate=record.gate, base=base)
        status = with_publication(status, record, job.spec.training.report_to)
        return succeed(status, job, now)
    if step == "prepare":
        status = replace(with_known_facts(status, record), progress=None)
        status = status if record.work is None else forecast_of_work(status, record.work)
    if step == "train" or record.trained:
        status = with_training_facts(status, record)
    if step == "prepare":
        expected = "" if record.work is None or record.trained else text_of_work(status, job, record.work)
        message = shortened(f"{expected}{record.message or 'model and data are prepared'}", MAX_MESSAGE_LENGTH)
        done = Reason("Done", message)
        status = set_condition(status, job, now, "Prepared", "True", done)
    # If its status was lost, or it was cleaned up: a GPU has nothing to do for a finished run.
    following: StepName = "publish" if record.trained else _NEXT[step]
    return replace(status, step=new_step(job, following, status.first_attempt))


def _complete_unverified(status: QLoRAJobStatus, job: QLoRAJob, now: datetime, step: StepStatus) -> QLoRAJobStatus:
    if step.unverified == 0:
        return replace(status, step=replace(next_attempt(step, job), unverified=1))
    message = (
        f"the {step.name} step completed twice without a readable result: see that nothing deletes its pods, and that "
        "the profile's image is the trainer of this operator's version"
    )
    return fail(status, job, now, failure_of(step.name, "ResultUnreadable", message, now))


def _without_pod(failure: Reason, step: StepStatus, job: QLoRAJob, now: datetime) -> FailureStatus:
    """Return the cause of a failed Job whose pods are gone.

    This is the last failure that was observed, else the Job's own report.
    """
    last = job.status.last_failure
    if last is not None and last.step == step.name:
        return last
    return failure_of(step.name, failure.word or "JobFailed", f"Job {step.job_name}: {failure.sentence}", now)
