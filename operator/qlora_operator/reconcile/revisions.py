"""Reads the ControllerRevisions of jobs, once each, as they never change, and adopts those of restored jobs."""

import logging
from dataclasses import dataclass, replace

from qlora_operator.decisions.manifests.objects import owner_of
from qlora_operator.decisions.observed.objects import Object, QLoRAJob, Reason
from qlora_operator.decisions.observed.stored_job import uid_of_run
from qlora_operator.decisions.revision import (
    is_of_job,
    newest,
    newest_orphan,
    objection_to_restore,
    restore_blocked,
    with_data_of,
)
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import NotFoundError
from qlora_operator.reconcile.shared_pods import SharedPods
from qlora_operator.watch.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Revisions:
    """The revisions of all jobs, kept with the jobs in the store."""

    cluster: Cluster
    store: Store

    async def fixed(self, job: QLoRAJob, *, live: bool) -> QLoRAJob:
        """Return the job with what its revision has fixed, or as it is without one.

        `live`: also find one that its status does not name. Raises ClusterError and UnreadableJobError.
        """
        job_id, name = (job.namespace, job.uid), job.status.current_revision
        found: Object | Reason | None = self.store.revision(job_id)
        if isinstance(found, Reason) or found is None or name not in (None, found["metadata"]["name"]):
            found = await self._find(job, live=live) if name is None else await self._read(job, name)
            if isinstance(found, Reason):
                return replace(job, hold=found)
            if found is not None:
                self.store.note_revision(job_id, found)
        return job if found is None else with_data_of(job, found)

    async def _find(self, job: QLoRAJob, *, live: bool) -> Object | Reason | None:
        """Find a revision that the job's status does not name."""
        if not (live or job.is_restored):
            return None
        listed = await self.cluster.list_revisions(job.namespace, job.name)
        found = newest(job, listed)
        return found if found is not None or not job.is_restored else await self._adopt(job, newest_orphan(listed))

    async def _adopt(self, job: QLoRAJob, orphan: Object | None) -> Object | Reason:
        """Become the owner of a restored revision, or return why not."""
        if orphan is None or (resolved := with_data_of(job, orphan).status.resolved) is None:
            return restore_blocked("the namespace has no ControllerRevision of it without an owner: restore that")
        name = orphan["metadata"]["name"]
        writer = await SharedPods(self.cluster, self.store).read_writer(replace(job, uid=uid_of_run(resolved)))
        has_claim = await self._has_claim(job.namespace, resolved.claim_name)
        if (objection := objection_to_restore(job, name, resolved, writer, has_claim=has_claim)) is not None:
            return objection
        logger.info("adopted ControllerRevision %s", name, extra={"key": (job.namespace, job.name)})
        return await self.cluster.adopt_revision(job.namespace, name, owner_of(job, controller=True))

    async def _has_claim(self, namespace: str, name: str) -> bool:
        try:
            await self.cluster.get_claim(namespace, name)
        except NotFoundError:
            return False
        return True

    async def _read(self, job: QLoRAJob, name: str) -> Object | Reason | None:
        """Read the revision that the job's status names."""
        try:
            found = await self.cluster.get_revision(job.namespace, name)
        except NotFoundError:
            found = None
        if found is not None and is_of_job(job, found):
            return found
        if found is not None and job.is_restored and newest_orphan([found]) is not None:
            # Its status was restored too.
            return await self._adopt(job, found)
        key = (job.namespace, job.name)
        logger.warning("ControllerRevision %s is gone", name, extra={"key": key})
        return None
