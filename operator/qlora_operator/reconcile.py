"""Reconciles one job: gather, decide by pure functions, act, write the status once."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from qlora_api.naming import JOB_UID_LABEL
from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus, Resolved
from qlora_operator.cluster import Cluster, ClusterError, ConflictError, NotFoundError, RejectedError
from qlora_operator.decisions.cleanup import cleanup_at
from qlora_operator.decisions.conditions import is_finished, is_true
from qlora_operator.decisions.events import phase_event, progress_event, unreadable_event
from qlora_operator.decisions.facts import Facts
from qlora_operator.decisions.manifests import build_claim, build_job
from qlora_operator.decisions.observe import (
    Object,
    Observed,
    QLoRAJob,
    Reason,
    UnreadableJobError,
    controller_uid,
    observe,
    parse_job,
)
from qlora_operator.decisions.plan import Action, CreateClaim, CreateJob, DeleteJob, plan
from qlora_operator.decisions.starting import limit_of_jobs, waits_for_others
from qlora_operator.decisions.status import next_status, with_child, with_rejection
from qlora_operator.metrics import Metrics
from qlora_operator.progress import LogReading, ProgressReader
from qlora_operator.starts import Starts
from qlora_operator.workqueue import Key, RetryError

logger = logging.getLogger(__name__)

_SECONDS_AFTER_REJECTION = 30.0
_SECONDS_AFTER_NAME_TAKEN = 5.0


class _BlockedError(Exception):
    """An action cannot be done now; `reason` says why, for the status. `again`: seconds until the next try."""

    def __init__(self, reason: Reason, again: float) -> None:
        super().__init__(reason.sentence)
        self.reason = reason
        self.again = again


@dataclass(frozen=True)
class Reconciler:
    """One pass over one job. Keeps nothing between passes that a restart may not lose: all state is in the API."""

    cluster: Cluster
    profiles: Mapping[str, Profile]
    progress: ProgressReader | None
    metrics: Metrics
    clock: Callable[[], datetime]
    starts: Starts

    async def reconcile(self, key: Key) -> float | None:
        """Seconds until the job is reconciled again; None if the next event is enough. Raises RetryError."""
        with self.metrics.reconcile_duration.time():
            try:
                return await self._reconcile(key)
            except (ConflictError, NotFoundError) as error:
                raise RetryError(f"changed or deleted in the meantime: {error}") from error
            except ClusterError as error:
                self.metrics.reconcile_errors.inc()
                raise RetryError(str(error)) from error

    async def _reconcile(self, key: Key) -> float | None:
        job = await self._gather_job(key)
        if job is None or job.deleting or _is_settled(job):
            self._forget(key)
            if job is None or job.deleting:
                self.starts.leave(key)
            return None
        async with self._count_started(job) as others:
            return await self._pass(key, job, others)

    @asynccontextmanager
    async def _count_started(self, job: QLoRAJob) -> AsyncIterator[int]:
        limit = limit_of_jobs(job, self.profiles)
        if limit is None:
            yield 0
            return
        async with self.starts.count(job, limit) as others:
            yield others

    async def _pass(self, key: Key, job: QLoRAJob, others: int) -> float | None:
        observed = await self._observe(job)
        log = await self.progress.read(key, job, observed) if self.progress else LogReading()
        facts = Facts(job, observed, self.profiles, self.clock(), log.record, log.done, jobs_of_profile=others)
        status = next_status(facts)
        planned = plan(job, status, observed, facts.now)
        status, again = await self._act(facts, status, planned.actions)
        await self._write(facts, status)
        self._follow_waiting(key, facts, status)
        look_again = (planned.look_again - facts.now).total_seconds() if planned.look_again else None
        return min((seconds for seconds in (look_again, log.again, again) if seconds is not None), default=None)

    async def _observe(self, job: QLoRAJob) -> Observed:
        """The job's children. Before it has started it has none, whatever labels others give their own objects."""
        if job.status.resolved is None:
            return Observed()
        return observe(
            job.uid,
            await self.cluster.list_jobs(job.namespace, job.uid),
            await self.cluster.list_pods(job.namespace, job.uid),
        )

    def _follow_waiting(self, key: Key, facts: Facts, status: QLoRAJobStatus) -> None:
        """After the write: when a job has ended, or has started after it waited, the next in the row is looked at."""
        if waits_for_others(facts):
            self.starts.wait(facts.job)
        elif self.starts.waits(key) or (is_finished(status) and not is_finished(facts.job.status)):
            self.starts.leave(key)

    async def _gather_job(self, key: Key) -> QLoRAJob | None:
        body = await self.cluster.get_qlora_job(*key)
        if body is None:
            return None
        try:
            return parse_job(body)
        except UnreadableJobError as error:
            logger.error("%s", error, extra={"key": key})  # noqa: TRY400 - the message names the fields
            await self._post(key, unreadable_event(dict(body), str(error), self.clock()))
            return None

    async def _act(
        self, facts: Facts, status: QLoRAJobStatus, actions: tuple[Action, ...]
    ) -> tuple[QLoRAJobStatus, float | None]:
        """The status after the actions, and seconds until the next try if one of them is blocked."""
        job, resolved = facts.job, status.resolved
        for action in actions:
            try:
                match action:
                    case DeleteJob(name, uid):
                        logger.info("delete Job %s", name, extra={"key": (job.namespace, job.name)})
                        await self.cluster.delete_job(job.namespace, name, uid)
                    case CreateClaim() if resolved is not None:
                        await self._create_claim(job, resolved)
                    case CreateJob() if resolved is not None:
                        status = with_child(status, facts, await self._create_job(job, resolved, action))
            except _BlockedError as blocked:
                logger.warning("%s", blocked, extra={"key": (job.namespace, job.name)})
                return with_rejection(status, facts, blocked.reason), blocked.again
        return status, None

    async def _create_job(self, job: QLoRAJob, resolved: Resolved, action: CreateJob) -> str:
        """UID of the step's Job, created now or by a pass that was interrupted. Raises _BlockedError."""
        manifest = build_job(job, resolved, action.step, action.attempt, action.failures)
        name = manifest["metadata"]["name"]
        try:
            created = await self.cluster.create_job(job.namespace, manifest)
            logger.info("created Job %s", name, extra={"key": (job.namespace, job.name)})
        except RejectedError as error:
            raise _BlockedError(
                Reason("JobRejected", f"the API server rejects Job {name}: {error}"), _SECONDS_AFTER_REJECTION
            ) from error
        except ConflictError as error:
            created = await self._existing(self.cluster.get_job(job.namespace, name))
            if controller_uid(created) != job.uid:
                sentence = (
                    f"a Job {name} of another owner exists, perhaps of a deleted QLoRAJob of the same name: "
                    "this job starts when that Job is gone"
                )
                raise _BlockedError(Reason("NameTaken", sentence), _SECONDS_AFTER_NAME_TAKEN) from error
        return str(created["metadata"]["uid"])

    async def _create_claim(self, job: QLoRAJob, resolved: Resolved) -> None:
        name = resolved.claim_name
        try:
            await self.cluster.create_claim(job.namespace, build_claim(job, resolved))
            logger.info("created PersistentVolumeClaim %s", name, extra={"key": (job.namespace, job.name)})
        except RejectedError as error:
            raise _BlockedError(
                Reason("ClaimRejected", f"the API server rejects PersistentVolumeClaim {name}: {error}"),
                _SECONDS_AFTER_REJECTION,
            ) from error
        except ConflictError as error:
            existing = await self._existing(self.cluster.get_claim(job.namespace, name))
            if (existing["metadata"].get("labels") or {}).get(JOB_UID_LABEL) != job.uid:
                sentence = f"a PersistentVolumeClaim {name} exists that was not created for this job: delete it"
                raise _BlockedError(Reason("ClaimNameTaken", sentence), _SECONDS_AFTER_NAME_TAKEN) from error

    async def _existing(self, get: Awaitable[Object]) -> Object:
        try:
            return await get
        except NotFoundError as error:
            raise RetryError("the object of the same name has just been deleted") from error

    async def _write(self, facts: Facts, status: QLoRAJobStatus) -> None:
        """Store the status if it differs from the stored one, and post an Event if the phase changes."""
        job, content = facts.job, status.dump()
        key = (job.namespace, job.name)
        if content == job.status.dump():
            return
        if event := phase_event(job, status, facts.now):
            logger.info("phase %s, was %s", status.phase, job.status.phase, extra={"key": key})
            await self._post(key, event)
        if event := progress_event(job, status, facts.now):
            logger.warning("%s", event["message"], extra={"key": key})
            await self._post(key, event)
        await self.cluster.apply_status(job, content)
        self.metrics.status_writes.inc()
        self.metrics.job_is_in(key, status.phase)

    async def _post(self, key: Key, event: Object) -> None:
        try:
            await self.cluster.create_event(key[0], event)
        except ConflictError:
            logger.debug("this Event exists already", extra={"key": key})
        except ClusterError as error:
            logger.warning("an Event cannot be posted: %s", error, extra={"key": key})

    def _forget(self, key: Key) -> None:
        if self.progress is not None:
            self.progress.forget(key)


def _is_settled(job: QLoRAJob) -> bool:
    """Whether nothing is left to do, so that the children need not be listed."""
    status = job.status
    done = is_true(status, "Succeeded") and status.observed_generation == job.generation
    return done and not is_true(status, "CleanedUp") and cleanup_at(job, status) is None
