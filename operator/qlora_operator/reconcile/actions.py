"""Carries out a plan: deletes and creates Jobs and the other objects of a job."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime

from qlora_api.artifact_status import AdapterStatus
from qlora_api.naming import JOB_UID_LABEL
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, Resolved, StepName
from qlora_operator.decisions.announcing import (
    Announced,
    build_config_map,
    build_patches,
    build_withdrawal,
    config_map_name,
    rejection_of_entry,
    reserved_config_map,
    with_announcement,
    without_announcement,
)
from qlora_operator.decisions.manifests.network import Dns
from qlora_operator.decisions.manifests.objects import (
    build_claim,
    build_job,
    build_peer_policy,
    build_peer_service,
    owners_of_claim,
)
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Object, QLoRAJob, Reason, format_time
from qlora_operator.decisions.observed.parsing import controller_uid, foreign_manager
from qlora_operator.decisions.observed.shared_pod import with_size_of_pod
from qlora_operator.decisions.plan import (
    Action,
    Announce,
    ApplyClaimPolicy,
    ConnectNodes,
    CreateClaim,
    CreateJob,
    DeleteClaim,
    DeleteJob,
    DeleteQLoRAJob,
    TryQueue,
    creates_first_job,
)
from qlora_operator.decisions.pods.kueue import not_supported
from qlora_operator.decisions.revision import build_revision, is_of_job
from qlora_operator.decisions.status import with_child, with_rejection, with_unfixed
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import AlreadyExistsError, ClusterError, ForbiddenError, NotFoundError, RejectedError
from qlora_operator.kube.listing import as_revision
from qlora_operator.reconcile.pauses import Postponed
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.watch.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """The outcome of the actions of one pass."""

    status: QLoRAJobStatus
    changed: bool
    """Whether one of them has written to the API, or has made the store show a newer state."""
    blocked: bool = False
    """Whether one of them cannot be done now. No event shows that a quota has room again, or that a name is free."""
    look_again: datetime | None = None
    """When an action is tried again that nothing else waits for, or None."""


class _BlockedError(Exception):
    """An action cannot be done now. `reason` is for the status."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.sentence)
        self.reason = reason


@dataclass(frozen=True)
class Actions:
    """Carries out the actions of one job in turn, until one cannot be done now."""

    cluster: Cluster
    store: Store
    dns: Dns
    isolate: Callable[[str], Awaitable[None]]
    """Brings the NetworkPolicies of all jobs to a namespace. Raises ClusterError."""
    announcements: Postponed = field(default_factory=Postponed)

    async def fix(self, facts: Facts, status: QLoRAJobStatus) -> QLoRAJobStatus | None:
        """Create the revision that the status names, before the status is stored or anything follows from it.

        Returns None once it exists, or the status to store if it cannot be created now.
        """
        job, name, resolved = facts.job, status.current_revision, status.resolved
        if name is None or resolved is None or name == job.revision:
            return None
        key, manifest = (job.namespace, job.name), build_revision(job, name, resolved)
        try:
            await self.cluster.create_revision(job.namespace, manifest)
            logger.info("created ControllerRevision %s", name, extra={"key": key})
        except AlreadyExistsError:
            found = await self.cluster.get_revision(job.namespace, name)
            if not (is_of_job(job, found) and found["data"] == manifest["data"]):
                return self._unfixed(facts, status, f"ControllerRevision {name} exists with other content: delete it")
        except RejectedError as error:
            return self._unfixed(facts, status, f"the API server rejects ControllerRevision {name}: {error}")
        self.store.note_revision((job.namespace, job.uid), as_revision(manifest))
        return None

    @staticmethod
    def _unfixed(facts: Facts, status: QLoRAJobStatus, why: str) -> QLoRAJobStatus:
        """Return the status of a job whose next revision does not exist: nothing follows from it."""
        logger.warning("%s", why, extra={"key": (facts.job.namespace, facts.job.name)})
        return with_unfixed(status, facts.job, facts.now, Reason("RevisionRejected", why))

    async def carry_out(self, facts: Facts, status: QLoRAJobStatus, actions: tuple[Action, ...]) -> Result:
        """Carry them out. The status of the result is the one after the actions."""
        job, resolved, changed = facts.job, status.resolved, False
        key, again = (job.namespace, job.name), None
        for action in actions:
            try:
                match action:
                    case DeleteJob(name, uid):
                        await self._delete_job(job, name, uid)
                        changed = True
                    case TryQueue(attempt) if resolved is not None:
                        await self._try_queue(job, resolved, attempt)
                    case CreateClaim() if resolved is not None:
                        changed |= await self._create_claim(job, resolved)
                    case ConnectNodes():
                        await self._connect_nodes(job)
                    case ApplyClaimPolicy() if resolved is not None:
                        await self._apply_claim_policy(job, resolved)
                    case DeleteClaim() if status.workspace is not None:
                        await self._delete_claim(job, status.workspace.claim_name)
                        status = replace(status, claim_deletion_time=format_time(facts.now))
                    case DeleteQLoRAJob():
                        await self.cluster.delete_qlora_job(job)
                        logger.info("deleted, as its time after the end is over", extra={"key": key})
                    case Announce():
                        # The clean-up does not wait for a success.
                        status, written = await self._announce(facts, status)
                        changed, again = changed | written, self.announcements.due(key)
                    case CreateJob() if resolved is not None:
                        await self._isolate(job)
                        sized = with_size_of_pod(job, facts.shared)
                        created, is_new = await self._create_job(sized, resolved, action)
                        job_uid, changed = str(created["metadata"]["uid"]), changed | is_new
                        again = _followed_at(created, facts.now) or again
                        # The next pass derives the status with the first Job from what it observes.
                        status = status if creates_first_job(action) else with_child(status, facts, job_uid)
            except _BlockedError as blocked:
                logger.warning("%s", blocked, extra={"key": key})
                status = with_rejection(status, job, facts.now, blocked.reason)
                return Result(status, changed, blocked=True, look_again=again)
        return Result(status, changed, look_again=again)

    async def _delete_job(self, job: QLoRAJob, name: str, uid: str) -> None:
        """Delete this very Job. Raises _BlockedError if the API server does not allow it."""
        try:
            await self.cluster.delete_job(job.namespace, name, uid)
            logger.info("deleted Job %s", name, extra={"key": (job.namespace, job.name)})
        except RejectedError as error:
            sentence = f"the API server rejects the deletion of Job {name}: {error}"
            raise _BlockedError(Reason("JobRejected", sentence)) from error

    async def _create_job(self, job: QLoRAJob, resolved: Resolved, action: CreateJob) -> tuple[Object, bool]:
        """Create the step's Job and return it, and whether it is new to the store.

        It may exist already, by a pass that was interrupted. Raises _BlockedError.
        """
        key, new = (job.namespace, job.name), True
        manifest = build_job(job, resolved, action.step, action.attempt, action.failures)
        name = manifest["metadata"]["name"]
        try:
            created = await self.cluster.create_job(job.namespace, manifest)
            logger.info("created Job %s", name, extra={"key": key})
        except RejectedError as error:
            sentence = f"the API server rejects Job {name}: {error}"
            raise _BlockedError(Reason("JobRejected", sentence)) from error
        except AlreadyExistsError as error:
            created, new = await self._existing(self.cluster.get_job(job.namespace, name)), False
            if (reason := _name_taken(created, job, action.step)) is not None:
                raise _BlockedError(reason) from error
        shown = self.store.child_changed("jobs", created)
        return created, new or key in shown

    async def _try_queue(self, job: QLoRAJob, resolved: Resolved, attempt: int) -> None:
        """Raise _BlockedError if the job's queue gives its train Job to another controller."""
        manifest = build_job(job, resolved, "train", attempt)
        try:
            managed_by = foreign_manager(await self.cluster.try_job(job.namespace, manifest))
        except AlreadyExistsError:
            return  # its manager is read as that of any Job
        except RejectedError as error:
            # That of a real Job is reported: by then, the quota that lacks room now may have some.
            logger.warning("the queue cannot be tried: %s", error, extra={"key": (job.namespace, job.name)})
            return
        if managed_by:
            raise _BlockedError(not_supported(manifest["metadata"]["name"], managed_by, resolved.queue_name))

    async def _create_claim(self, job: QLoRAJob, resolved: Resolved) -> bool:
        """Whether it was created now. Raises _BlockedError."""
        name = resolved.claim_name
        try:
            await self.cluster.create_claim(job.namespace, build_claim(job, resolved))
            logger.info("created PersistentVolumeClaim %s", name, extra={"key": (job.namespace, job.name)})
        except RejectedError as error:
            sentence = f"the API server rejects PersistentVolumeClaim {name}: {error}"
            raise _BlockedError(Reason("ClaimRejected", sentence)) from error
        except AlreadyExistsError as error:
            existing = await self._existing(self.cluster.get_claim(job.namespace, name))
            if not _is_claim_of(job, existing):
                sentence = f"a PersistentVolumeClaim {name} exists that was not created for this job: delete it"
                raise _BlockedError(Reason("ClaimNameTaken", sentence)) from error
            if job.began_as:
                # A backup tool has restored it, without its owners.
                await self._apply_claim_policy(job, resolved)
            return False
        return True

    async def _isolate(self, job: QLoRAJob) -> None:
        """Cut off the pods of all jobs of the namespace. Raises _BlockedError."""
        try:
            await self.isolate(job.namespace)
        except RejectedError as error:
            sentence = f"the API server rejects a NetworkPolicy for the pods of jobs (jobNetworkPolicies): {error}"
            raise _BlockedError(Reason("NetworkPolicyRejected", sentence)) from error

    async def _apply_claim_policy(self, job: QLoRAJob, resolved: Resolved) -> None:
        """Let the claim be deleted with the job, or not, as its policy asks for now.

        Raises ClusterError.
        """
        found = await self._own_claim(job, resolved.claim_name)
        before = () if found is None else found["metadata"].get("ownerReferences") or ()
        owners = owners_of_claim(job, resolved.profile, before)
        if found is not None and owners != list(before):
            await self.cluster.change_claim_owners(job.namespace, found, owners)
            logger.info("changed the owners of its claim", extra={"key": (job.namespace, job.name)})

    async def _delete_claim(self, job: QLoRAJob, name: str) -> None:
        """Delete the claim that was created for the job, if it exists.

        Raises _BlockedError if the API server does not allow it.
        """
        try:
            if (found := await self._own_claim(job, name)) is not None:
                await self.cluster.delete_claim(job.namespace, found)
                logger.info("deleted PersistentVolumeClaim %s", name, extra={"key": (job.namespace, job.name)})
        except RejectedError as error:
            sentence = f"the API server rejects the deletion of PersistentVolumeClaim {name}: {error}"
            raise _BlockedError(Reason("ClaimRejected", sentence)) from error

    async def _own_claim(self, job: QLoRAJob, name: str) -> Object | None:
        """Read the claim that was created for the job, None if there is no such."""
        try:
            found = await self.cluster.get_claim(job.namespace, name)
        except NotFoundError:
            return None
        return found if _is_claim_of(job, found) else None

    async def _connect_nodes(self, job: QLoRAJob) -> None:
        """Create the Service and NetworkPolicy of train pods on several nodes.

        Their names have the job's UID: an existing Service is the job's own, or a user with the right to do so has made
        it. Raises _BlockedError.
        """
        for kind, write, manifest in (
            ("NetworkPolicy", self.cluster.apply_network_policy, build_peer_policy(job, self.dns)),
            ("Service", self.cluster.create_service, build_peer_service(job)),
        ):
            name = manifest["metadata"]["name"]
            try:
                await write(job.namespace, manifest)
            except AlreadyExistsError:
                logger.debug("%s %s exists already", kind, name, extra={"key": (job.namespace, job.name)})
            except RejectedError as error:
                sentence = f"the API server rejects {kind} {name}, by which the train pods reach one another: {error}"
                raise _BlockedError(Reason("PeersRejected", sentence)) from error

    async def _announce(self, facts: Facts, status: QLoRAJobStatus) -> tuple[QLoRAJobStatus, bool]:
        """Write the entry for servers and return the status, and whether it was written.

        Nothing is tried before it is due: the API server mostly rejects again until a user acts.
        """
        job, name, key = facts.job, config_map_name(facts.job), (facts.job.namespace, facts.job.name)
        if status.adapter is None:
            raise AssertionError("a job without an adapter has nothing to announce")
        if (reserved := reserved_config_map(job.spec, facts.profiles.values())) is not None:
            return without_announcement(status, reserved.sentence), False
        if (due := self.announcements.due(key)) is not None and facts.now < due:
            return status, False
        try:
            await self._write_entry(job, status.adapter)
        except ClusterError as error:
            logger.warning("ConfigMap %s: %s", name, error, extra={"key": key})
            self.announcements.postpone(key, facts.now)
            if isinstance(error, RejectedError):
                status = without_announcement(status, rejection_of_entry(job, str(error)))
            return status, False
        self.announcements.end(key)
        logger.info("announced in ConfigMap %s", name, extra={"key": key})
        return with_announcement(status, job), True

    async def _write_entry(self, job: QLoRAJob, adapter: AdapterStatus) -> None:
        """Write the adapter's entry.

        Raises ClusterError: RejectedError if the ConfigMap is not the operator's, or must not be written.
        """
        name, (beside_others, as_the_first) = config_map_name(job), build_patches(job, adapter)
        try:
            await self.cluster.patch_config_map(job.namespace, name, beside_others)
        except NotFoundError:
            # Raises ConflictError if another job creates it now: the next try finds it.
            await self.cluster.create_config_map(job.namespace, build_config_map(job, adapter))
        except ForbiddenError:
            raise
        except RejectedError as error:
            try:
                await self.cluster.patch_config_map(job.namespace, name, as_the_first)
            except RejectedError:
                raise error from None

    async def withdraw(self, namespace: str, announced: Announced) -> None:
        """Remove the entry of a deleted job, unless it is another's by now.

        Raises ClusterError if the API server cannot be reached.
        """
        try:
            await self.cluster.patch_config_map(namespace, announced.config_map, build_withdrawal(announced))
            logger.info("removed %s from ConfigMap %s", announced.key, announced.config_map)
        except (NotFoundError, RejectedError) as error:
            logger.info("ConfigMap %s keeps %s, if it exists: %s", announced.config_map, announced.key, error)

    async def _existing(self, get: Awaitable[Object]) -> Object:
        try:
            return await get
        except NotFoundError as error:
            raise RetryError("the object of the same name has just been deleted") from error


def _name_taken(found: Object, job: QLoRAJob, step: StepName) -> Reason | None:
    """Return why an existing Job of the step's name is not the step's."""
    name = found["metadata"]["name"]
    if controller_uid(found) != job.uid:
        waiting = "the clean-up" if step == "clean" else f"the {step} step"
        sentence = (
            f"a Job {name} of another owner exists, perhaps of a deleted QLoRAJob of the same name: "
            f"{waiting} of this job starts when that Job is gone"
        )
        return Reason("NameTaken", sentence)
    if not _has_label(found, job):
        # No watch and no list would show it, so that each pass would create it again.
        sentence = (
            f"a Job {name} exists that names this job as its controller and does not have its label {JOB_UID_LABEL}, "
            "so that nobody watches it: delete that Job, and this job goes on"
        )
        return Reason("NameTaken", sentence)
    return None


def _has_label(found: Object, job: QLoRAJob) -> bool:
    """Whether the object has the label of what was created for the job."""
    return bool((found["metadata"].get("labels") or {}).get(JOB_UID_LABEL) == job.uid)


def _is_claim_of(job: QLoRAJob, found: Object) -> bool:
    """Whether the claim was created for the job, or for the one that began its run."""
    return (found["metadata"].get("labels") or {}).get(JOB_UID_LABEL) in (job.uid, job.run_uid)


def _followed_at(created: Object, now: datetime) -> datetime | None:
    """Return when to follow the new Job, or None for one that gets events.

    Kubernetes' own controller leaves a Job of another alone.
    """
    return now if foreign_manager(created) else None
