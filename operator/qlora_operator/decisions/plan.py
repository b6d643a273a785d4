"""Plans a job's actions from the job, its next status, its children and the time."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from qlora_api.naming import child_job_name
from qlora_api.status import QLoRAJobStatus, StepName
from qlora_operator.decisions.announcing import is_to_be_announced
from qlora_operator.decisions.cleanup import clean_job_name, cleanup_at
from qlora_operator.decisions.continued import waits_for_other_job
from qlora_operator.decisions.expiry import is_held_up
from qlora_operator.decisions.observed.conditions import is_finished, is_true
from qlora_operator.decisions.observed.facts import FIRST_JOB
from qlora_operator.decisions.observed.objects import ChildJob, Observed, QLoRAJob, share_of
from qlora_operator.decisions.pods.attempts import active_seconds
from qlora_operator.decisions.pods.blockers import no_pod_at, stuck_at, volumes_at
from qlora_operator.decisions.pods.deletions import next_job_at
from qlora_operator.decisions.pods.nodes import trains_together
from qlora_operator.decisions.pods.rejections import (
    LONGEST_PAUSE_AFTER_REJECTED_POD,
    PAUSE_AFTER_REJECTED_POD,
    next_job_after_rejections,
)
from qlora_operator.decisions.retention import claim_goes_now, is_claim_to_be_deleted
from qlora_operator.decisions.retry import is_to_be_taken_up
from qlora_operator.decisions.status import Decision
from qlora_operator.decisions.usage.budget import budget_at
from qlora_operator.decisions.usage.usage import counted_again_at, still_counts

# Jobs of several nodes get no second pod, whose delay would be Kubernetes': the operator waits as long as that does.
PAUSE_AFTER_FAILURE, LONGEST_PAUSE_AFTER_FAILURE = timedelta(seconds=10), timedelta(minutes=6)
# Nodes that are lost now and then are no reason for a longer pause. A failed Job exists for an hour at least.
FAILURES_WITHIN = timedelta(hours=1)
# Workloads are not watched: a queue needs a moment to report why a Job waits, and then the reason seldom changes.
QUEUE_MOMENT = timedelta(seconds=30)
QUEUE_INTERVAL, FIRST_QUEUE_INTERVAL = timedelta(seconds=60), timedelta(seconds=3)
# No watch may show the end of a pod whose labels a tenant has removed.
DETACHED_INTERVAL = timedelta(seconds=15)
# An event of another job does not requeue a job that waits for its end.
OTHER_JOB_INTERVAL = timedelta(seconds=15)
# No watch shows the revision and the claim of a restored job, and a backup tool may take minutes.
RESTORE_INTERVAL = timedelta(seconds=60)
_SHORTLY = timedelta(seconds=1)


@dataclass(frozen=True)
class CreateClaim:
    """Create the workspace's PersistentVolumeClaim, unless it exists."""


@dataclass(frozen=True)
class TryQueue:
    """Find out, before anything is downloaded or trained, that the queue runs Jobs elsewhere."""

    attempt: int


@dataclass(frozen=True)
class ConnectNodes:
    """Create the missing Service and NetworkPolicy of train pods on several nodes."""


@dataclass(frozen=True)
class CreateJob:
    """Create the Job of a step, unless it exists."""

    step: StepName
    attempt: int
    failures: int = 0
    """How often the step has failed in earlier Jobs."""


@dataclass(frozen=True)
class DeleteJob:
    """Delete this very Job, with its pods."""

    name: str
    uid: str


@dataclass(frozen=True)
class Announce:
    """Write the adapter's entry for servers."""


@dataclass(frozen=True)
class ApplyClaimPolicy:
    """Give the claim the owner that whenDeleted asks for, or take it away."""


@dataclass(frozen=True)
class DeleteClaim:
    """Delete the claim that was created for the job."""


@dataclass(frozen=True)
class DeleteQLoRAJob:
    """Delete the job itself, if it is as it was read."""


Action = (
    TryQueue
    | CreateClaim
    | ConnectNodes
    | CreateJob
    | DeleteJob
    | Announce
    | ApplyClaimPolicy
    | DeleteClaim
    | DeleteQLoRAJob
)
_DELETIONS = (DeleteJob, DeleteClaim, DeleteQLoRAJob)


@dataclass(frozen=True)
class Plan:
    """The actions to take now, and the time of the next pass without an event."""

    actions: tuple[Action, ...] = ()
    look_again: datetime | None = None
    store_first: bool = False
    """Whether to store the status before any action; the next pass decides again."""


def plan(
    job: QLoRAJob,
    decision: Decision,
    observed: Observed,
    now: datetime,
    *,
    counts_itself: bool = False,
    sweep_again: timedelta | None = None,
    expires: datetime | None = None,
) -> Plan:
    """Plan the actions that carry out the decision about the job.

    `counts_itself`: whether the job counts among those of its profile once its status shows that it has started.
    `sweep_again`: time until the next check of its sweep, if the job waits for that. `expires`: see `deletion_at`.
    """
    if job.deleting:
        # Another controller's finalizer may keep it for days, and its pods would run on.
        return Plan(tuple(_delete(child) for child in _outlived(job, observed)))
    status, policy = decision.status, _claim_policy(job, decision.status)
    if decision.ends or decision.restarts:
        # The status that is stored has observed the policy, too.
        return Plan(policy, now + _SHORTLY) if policy else Plan(store_first=True)
    if is_finished(status):
        actions = (*policy, *_after_the_end(job, status, observed, now))
        return _unless_expired(job, status, now, expires, actions)
    actions = (*policy, *_on_the_way(job, status, observed, now, waits=sweep_again is not None))
    times = list(_times(job, status, observed, now))
    look_again = _earliest(iter([*times, now + sweep_again] if sweep_again else times), now)
    return Plan(actions, look_again, store_first=counts_itself and _creates_a_job(actions))


def is_settled(job: QLoRAJob, observed: Observed) -> bool:
    """Whether nothing is left to do for the job, unless something is shown about it."""
    status = job.status
    if job.deleting:
        return not _outlived(job, observed)
    if not is_finished(status) or status.observed_generation != job.generation or cleanup_at(job, status) is not None:
        return False
    if is_to_be_taken_up(job):
        return False  # it waits for a place among the jobs of its profile
    if is_to_be_announced(job, status) or is_claim_to_be_deleted(job, status):
        return False
    if still_counts(job) or observed.live_pods:
        return False  # a pod that has been asked to stop has its GPU until it has saved a checkpoint
    # The clean-up's own Job goes after the clean-up is stored.
    cleaning = observed.child(clean_job_name(job)) if is_true(status, "CleanedUp") else None
    return cleaning is None and not any(_running(observed))


def _creates_a_job(actions: tuple[Action, ...]) -> bool:
    return any(isinstance(action, CreateJob) for action in actions)


def creates_first_job(action: Action) -> bool:
    """Whether it creates the first Job of a job."""
    return action == CreateJob(*FIRST_JOB)


def cannot_be_undone(decision: Decision, actions: tuple[Action, ...]) -> bool:
    """Whether this needs a live read, as the watches may be late.

    It does to delete, to create any Job but the first, and for a final decision.
    """
    return decision.is_final or any(
        isinstance(action, _DELETIONS) or (isinstance(action, CreateJob) and not creates_first_job(action))
        for action in actions
    )


def _on_the_way(
    job: QLoRAJob, status: QLoRAJobStatus, observed: Observed, now: datetime, *, waits: bool
) -> Iterator[Action]:
    step = status.step
    wanted = None if step is None or job.stops else step.job_name
    if job.problem and not job.stops:
        return
    # If a pod was detached from its Job, that Job starts another one, and both write to the workspace.
    detached = step is not None and any(pod.detached and not pod.ended for pod in observed.pods_of(step.job_uid))
    yield from (_delete(child) for child in _running(observed) if child.name != wanted or detached)
    if (cleaning := observed.child(clean_job_name(job))) is not None and cleaning.finished and not cleaning.deleting:
        yield _delete(cleaning)  # of the end before: the next end has another clean-up
    if step is None or wanted is None:
        return
    if trains_together(job, step.name) and any(pod.starting for pod in observed.pods_of(step.job_uid)):
        # A queue may have resumed their Job days after it was created.
        yield ConnectNodes()
    if step.job_uid or observed.child(wanted) is not None or observed.live_pods or waits:
        return
    if any(now < due for due in _pauses(job, status, observed)):
        return
    if step.name != "publish" and status.resolved is not None and status.resolved.queue_name:
        yield TryQueue(step.attempt if step.name == "train" else status.first_attempt)
    if step.name == "prepare" and status.resolved is not None and status.resolved.claim_created:
        yield CreateClaim()
    if trains_together(job, step.name):
        yield ConnectNodes()
    yield CreateJob(step.name, step.attempt, step.failures)


def _pauses(job: QLoRAJob, status: QLoRAJobStatus, observed: Observed) -> Iterator[datetime]:
    """When the next Job may be created."""
    yield from _after_waiting(job, observed)
    yield from _after_failures(job, status, observed)
    for due in (next_job_after_rejections(observed), next_job_at(job, status, observed)):
        if due is not None:
            yield due


def _after_failures(job: QLoRAJob, status: QLoRAJobStatus, observed: Observed) -> Iterator[datetime]:
    """Yield the end of the pause after failed Jobs of several nodes.

    A failure that counts as a disruption, or not at all, has one too.
    """
    step = status.step
    if step is None or step.job_uid or not trains_together(job, step.name):
        return
    names = {child_job_name(job.name, step.name, attempt) for attempt in range(status.first_attempt, step.attempt)}
    failed = [child for child in observed.children if child.name in names and child.failure and not child.expired]
    ended = [child.ended for child in failed if child.ended]
    if ended:
        times = sum(moment > max(ended) - FAILURES_WITHIN for moment in ended)
        pause = PAUSE_AFTER_FAILURE * 2 ** min(times - 1, 10)
        yield max(ended) + min(pause, LONGEST_PAUSE_AFTER_FAILURE)


def _after_waiting(job: QLoRAJob, observed: Observed) -> Iterator[datetime]:
    """Yield the end of the pause after nodes that waited until their limit.

    Each job has a different pause: of two jobs that each hold half of what both need, one must find all of it.
    """
    waited = [pod for pod in observed.pods if pod.missed_peers]
    ended = [pod.termination.finished for pod in waited if pod.termination and pod.termination.finished]
    if ended:
        times = len({pod.owner_uid for pod in waited})
        pause = min(PAUSE_AFTER_REJECTED_POD * 2 ** min(times - 1, 10), LONGEST_PAUSE_AFTER_REJECTED_POD)
        # Multiplied after the cap, which would make the pauses of all jobs equal again.
        yield max(ended) + pause * (1 + share_of(job.uid))


def _after_the_end(job: QLoRAJob, status: QLoRAJobStatus, observed: Observed, now: datetime) -> Iterator[Action]:
    cleaning = observed.child(clean_job_name(job))
    rest = tuple(child for child in observed.children if child != cleaning)
    if is_to_be_announced(job, status):
        yield Announce()
    yield from (_delete(child) for child in _running(observed) if child != cleaning)
    if is_claim_to_be_deleted(job, status) and not observed.live_pods:
        yield DeleteClaim()
    if is_true(status, "CleanedUp"):
        if cleaning is not None and is_true(job.status, "CleanedUp"):
            yield _delete(cleaning)
        return
    due = cleanup_at(job, status)
    if due is None or now < due or status.resolved is None:
        return
    if claim_goes_now(job, status):
        yield from (_delete(child) for child in observed.children if child.finished and not child.deleting)
        return
    if cleaning is None and not observed.live_pods:
        yield CreateJob("clean", 1)
    if cleaning is not None and cleaning.complete:
        yield from (_delete(child) for child in rest if child.finished and not child.deleting)


def _outlived(job: QLoRAJob, observed: Observed) -> tuple[ChildJob, ...]:
    """Return the Jobs of a job under deletion that would run until it is gone."""
    return () if job.orphans else tuple(_running(observed))


def _running(observed: Observed) -> Iterator[ChildJob]:
    return (child for child in observed.children if not child.finished and not child.deleting)


def _delete(child: ChildJob) -> DeleteJob:
    return DeleteJob(child.name, child.uid)


def _times(job: QLoRAJob, status: QLoRAJobStatus, observed: Observed, now: datetime) -> Iterator[datetime]:
    limit = job.spec.active_deadline_seconds
    if limit is not None and any(pod.running for pod in observed.pods):
        yield now + timedelta(seconds=max(1, limit - active_seconds(status, observed, now)))
    if (spent := budget_at(job, status, observed, now)) is not None:
        yield spent
    if (counted := counted_again_at(status, observed.pods)) is not None:
        yield counted
    yield from (due for pod in observed.live_pods if (due := stuck_at(pod)) is not None)
    yield from (no_pod_at(child) for child in _running(observed) if not observed.pods_of(child.uid))
    yield from (due for pod in observed.live_pods if (due := volumes_at(pod)) is not None)
    yield from _pauses(job, status, observed)
    if waits_for_other_job(job):
        yield now + OTHER_JOB_INTERVAL
    if job.adopts and job.status.resolved is None:
        yield now + RESTORE_INTERVAL
    yield from (now + DETACHED_INTERVAL for pod in observed.live_pods if pod.detached)
    yield from (_queue_at(child, now) for child in _running(observed) if child.suspended)


def _queue_at(child: ChildJob, now: datetime) -> datetime:
    fresh = now < (child.suspended_since or child.created) + QUEUE_MOMENT
    return now + (FIRST_QUEUE_INTERVAL if fresh else QUEUE_INTERVAL)


def _unless_expired(
    job: QLoRAJob, status: QLoRAJobStatus, now: datetime, expires: datetime | None, actions: tuple[Action, ...]
) -> Plan:
    """Plan the actions after the end, or the deletion of the job if that is due."""
    times = [due for due in (cleanup_at(job, status), expires) if due is not None]
    if expires is None or now < expires:
        return Plan(actions, _earliest(iter(times), now))
    if is_held_up(dataclasses.replace(job, status=status), expires):
        # No event shows the end of what the operator does itself.
        return Plan(actions, now + _SHORTLY if actions else _earliest(iter(times), now))
    if ApplyClaimPolicy() in actions:
        # First: the owners of the claim decide whether it goes with the job.
        return Plan(actions, now + _SHORTLY)
    # The version that is stored is the one to delete.
    return Plan((DeleteQLoRAJob(),)) if status == job.status else Plan(store_first=True)


def _claim_policy(job: QLoRAJob, status: QLoRAJobStatus) -> tuple[Action, ...]:
    """Apply the retention policy to the claim again once the spec has changed."""
    is_changed = job.generation > max(1, job.status.observed_generation or 0)
    has_claim = status.resolved is not None and status.resolved.claim_created and status.claim_deletion_time is None
    return (ApplyClaimPolicy(),) if is_changed and has_claim and not job.problem else ()


def _earliest(times: Iterator[datetime], now: datetime) -> datetime | None:
    """Return the first time after `now`: anything due earlier has been observed."""
    return min((moment for moment in times if moment > now), default=None)
