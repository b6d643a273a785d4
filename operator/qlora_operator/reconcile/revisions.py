"""Reads the ControllerRevisions of jobs: once each, as they never change."""

import logging
from dataclasses import dataclass

from qlora_operator.decisions.observed.objects import Object, QLoRAJob
from qlora_operator.decisions.revision import is_of_job, newest, with_data_of
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import NotFoundError
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
        found = self.store.revision(job_id)
        if found is None or name not in (None, found["metadata"]["name"]):
            found = await self._read(job, live=live)
            if found is not None:
                self.store.note_revision(job_id, found)
        return job if found is None else with_data_of(job, found)

    async def _read(self, job: QLoRAJob, *, live: bool) -> Object | None:
        name = job.status.current_revision
        if name is None:
            return newest(job, await self.cluster.list_revisions(job.namespace, job.uid)) if live else None
        try:
            found = await self.cluster.get_revision(job.namespace, name)
        except NotFoundError:
            found = None
        if found is not None and is_of_job(job, found):
            return found
        key = (job.namespace, job.name)
        logger.warning("ControllerRevision %s is gone", name, extra={"key": key})
        return None
