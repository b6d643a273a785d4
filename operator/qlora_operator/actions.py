"""Carries out what a plan asks for: deletes and creates the Jobs of a job, and what its pods need beside them."""

import logging
from collections.abc import Awaitable
from dataclasses import dataclass

from qlora_api.naming import JOB_UID_LABEL
from qlora_api.status import QLoRAJobStatus, Resolved
from qlora_operator.cluster import AlreadyExistsError, Cluster, NotFoundError, RejectedError
from qlora_operator.decisions.facts import Facts
from qlora_operator.decisions.manifests import build_claim, build_job, build_peer_policy, build_peer_service
from qlora_operator.decisions.observe import Object, QLoRAJob, Reason
from qlora_operator.decisions.parsing import controller_uid
from qlora_operator.decisions.plan import (
    Action,
    ConnectNodes,
    CreateClaim,
    CreateJob,
    DeleteJob,
    creates_first_job,
)
from qlora_operator.decisions.status import with_child, with_rejection
from qlora_operator.pauses import Pauses
from qlora_operator.store import Store
from qlora_operator.workqueue import RetryError

logger = logging.getLogger(__name__)


class _BlockedError(Exception):
    """An action cannot be done now; `reason` says why, for the status."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.sentence)
        self.reason = reason


@dataclass(frozen=True)
class Actions:
    """Carries out the actions of one job after the other, until one of them cannot be done now."""

    cluster: Cluster
    store: Store
    blocked: Pauses
    dns_ports: tuple[int, ...]

    async def carry_out(
        self, facts: Facts, status: QLoRAJobStatus, actions: tuple[Action, ...]
    ) -> tuple[QLoRAJobStatus, float | None]:
        """The status after the actions, and seconds until the next try if one of them is blocked."""
        job, resolved = facts.job, status.resolved
        for action in actions:
            try:
                match action:
                    case DeleteJob(name, uid):
                        await self._delete_job(job, name, uid)
                    case CreateClaim() if resolved is not None:
                        await self._create_claim(job, resolved)
                    case ConnectNodes():
                        await self._connect_nodes(job)
                    case CreateJob() if resolved is not None:
                        job_uid = await self._create_job(job, resolved, action)
                        # The status that tells of the first Job follows from what the next pass sees.
                        status = status if creates_first_job(action) else with_child(status, facts, job_uid)
            except _BlockedError as blocked:
                logger.warning("%s", blocked, extra={"key": (job.namespace, job.name)})
                # Nothing shows when a quota has room again, or a name is free that an object without the label has.
                return with_rejection(status, facts, blocked.reason), self.blocked.next((job.namespace, job.name))
        self.blocked.end((job.namespace, job.name))
        return status, None

    async def _delete_job(self, job: QLoRAJob, name: str, uid: str) -> None:
        """Delete this very Job. Raises _BlockedError if the API server does not allow it."""
        try:
            await self.cluster.delete_job(job.namespace, name, uid)
            logger.info("deleted Job %s", name, extra={"key": (job.namespace, job.name)})
        except RejectedError as error:
            sentence = f"the API server rejects the deletion of Job {name}: {error}"
            raise _BlockedError(Reason("JobRejected", sentence)) from error

    async def _create_job(self, job: QLoRAJob, resolved: Resolved, action: CreateJob) -> str:
        """UID of the step's Job, created now or by a pass that was interrupted. Raises _BlockedError."""
        manifest = build_job(job, resolved, action.step, action.attempt, action.failures)
        name = manifest["metadata"]["name"]
        try:
            created = await self.cluster.create_job(job.namespace, manifest)
            logger.info("created Job %s", name, extra={"key": (job.namespace, job.name)})
        except RejectedError as error:
            sentence = f"the API server rejects Job {name}: {error}"
            raise _BlockedError(Reason("JobRejected", sentence)) from error
        except AlreadyExistsError as error:
            created = await self._existing(self.cluster.get_job(job.namespace, name))
            if controller_uid(created) != job.uid:
                sentence = (
                    f"a Job {name} of another owner exists, perhaps of a deleted QLoRAJob of the same name: "
                    "this job starts when that Job is gone"
                )
                raise _BlockedError(Reason("NameTaken", sentence)) from error
        self.store.child_changed("jobs", created)
        return str(created["metadata"]["uid"])

    async def _create_claim(self, job: QLoRAJob, resolved: Resolved) -> None:
        name = resolved.claim_name
        try:
            await self.cluster.create_claim(job.namespace, build_claim(job, resolved))
            logger.info("created PersistentVolumeClaim %s", name, extra={"key": (job.namespace, job.name)})
        except RejectedError as error:
            sentence = f"the API server rejects PersistentVolumeClaim {name}: {error}"
            raise _BlockedError(Reason("ClaimRejected", sentence)) from error
        except AlreadyExistsError as error:
            existing = await self._existing(self.cluster.get_claim(job.namespace, name))
            if (existing["metadata"].get("labels") or {}).get(JOB_UID_LABEL) != job.uid:
                sentence = f"a PersistentVolumeClaim {name} exists that was not created for this job: delete it"
                raise _BlockedError(Reason("ClaimNameTaken", sentence)) from error

    async def _connect_nodes(self, job: QLoRAJob) -> None:
        """Create the Service and the NetworkPolicy of train pods on several nodes. Raises _BlockedError.

        Their names have the job's UID: what exists is the job's own, or was made by somebody who may do so.
        """
        for kind, create, manifest in (
            ("NetworkPolicy", self.cluster.create_network_policy, build_peer_policy(job, self.dns_ports)),
            ("Service", self.cluster.create_service, build_peer_service(job)),
        ):
            name = manifest["metadata"]["name"]
            try:
                await create(job.namespace, manifest)
                logger.info("created %s %s", kind, name, extra={"key": (job.namespace, job.name)})
            except AlreadyExistsError:
                logger.debug("%s %s exists already", kind, name, extra={"key": (job.namespace, job.name)})
            except RejectedError as error:
                sentence = f"the API server rejects {kind} {name}, by which the train pods reach one another: {error}"
                raise _BlockedError(Reason("PeersRejected", sentence)) from error

    async def _existing(self, get: Awaitable[Object]) -> Object:
        try:
            return await get
        except NotFoundError as error:
            raise RetryError("the object of the same name has just been deleted") from error
