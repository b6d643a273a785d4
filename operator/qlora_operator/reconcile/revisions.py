"""Reads the ControllerRevisions of jobs, once each, as they never change, and adopts those of restored jobs."""

import logging
from dataclasses import dataclass, replace

from qlora_operator.decisions.manifests.objects import owner_of
from qlora_operator.decisions.observed.objects import Object, QLoRAJob, Reason
from qlora_operator.decisions.restore import objection_to_adoption, restore_blocked, revision_to_adopt
from qlora_operator.decisions.revision import is_of_job, newest, with_data_of
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import NotFoundError, RejectedError
from qlora_operator.watch.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Revisions:
    """The revisions of all jobs, kept with the jobs in the store."""

    cluster: Cluster
    store: Store

    async def fixed(self, job: QLoRAJob, *, live: bool, adopts: bool = False) -> QLoRAJob:
        """Return the job with what its revision has fixed, or as it is without one.

        `live`: also find one that its status does not name. `adopts`: become the owner of that of a restored job, or
        hold the job. Raises ClusterError and UnreadableJobError.
        """
        job_id, name = (job.namespace, job.uid), job.status.current_revision
        found = self.store.revision(job_id)
        if found is None or name not in (None, found["metadata"]["name"]):
            found, listed = await self._find(job, live=live) if name is None else await self._read(job, name)
            if found is None and adopts and job.adopts:
                adopted = await self._adopt(job, listed)
                if isinstance(adopted, Reason):
                    return replace(job, hold=adopted)
                found = adopted
            if found is not None:
                self.store.note_revision(job_id, found)
        return job if found is None else with_data_of(job, found)

    async def _find(self, job: QLoRAJob, *, live: bool) -> tuple[Object | None, list[Object]]:
        """Return the job's newest revision, and all of its name."""
        listed = await self.cluster.list_revisions(job.namespace, job.name) if live else []
        return newest(job, listed), listed

    async def _read(self, job: QLoRAJob, name: str) -> tuple[Object | None, list[Object]]:
        """Return the revision of the name in the status: if the job owns it, and in any case."""
        try:
            found = await self.cluster.get_revision(job.namespace, name)
        except NotFoundError:
            found = None
        if found is not None and is_of_job(job, found):
            return found, [found]
        if not job.is_restored:
            logger.warning("ControllerRevision %s is gone", name, extra={"key": (job.namespace, job.name)})
        return None, [] if found is None else [found]

    async def _adopt(self, job: QLoRAJob, listed: list[Object]) -> Object | Reason:
        """Become the owner of the restored revision, or return why not."""
        chosen = revision_to_adopt(job, listed)
        if isinstance(chosen, Reason):
            return chosen
        unfinished = await self.cluster.list_unfinished_of_earlier(job.namespace, job.name, job.uid)
        claim = await self._claim(job.namespace, chosen.resolved.claim_name)
        if (why := objection_to_adoption(job, chosen.resolved, claim, unfinished)) is not None:
            return why
        owner = owner_of(job, controller=True)
        try:
            adopted = await self.cluster.adopt_revision(job.namespace, chosen.name, chosen.version, owner)
        except RejectedError as error:
            return restore_blocked(job, f"the API server keeps ControllerRevision {chosen.name} from it: {error}")
        logger.info("adopted ControllerRevision %s", chosen.name, extra={"key": (job.namespace, job.name)})
        return adopted

    async def _claim(self, namespace: str, name: str) -> Object | None:
        try:
            return await self.cluster.get_claim(namespace, name)
        except NotFoundError:
            return None
