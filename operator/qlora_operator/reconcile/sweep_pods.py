"""Follows a sweep's shared pods: reads their Jobs as they are now, decides, acts."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from qlora_api.profile import Profile
from qlora_api.schema import replace
from qlora_api.sweep.spec import Cell
from qlora_api.sweep.status import SweepPodStatus
from qlora_operator.decisions.observed.objects import ChildJob, Observed, Pod, QLoRAJob, Reason, collect
from qlora_operator.decisions.observed.parsing import controller_uid
from qlora_operator.decisions.observed.stored_job import UnreadableJobError
from qlora_operator.decisions.plan import CreateJob, DeleteJob
from qlora_operator.decisions.pods.kueue import queue_reason
from qlora_operator.decisions.sweeps.pods import (
    PodFacts,
    PodPlan,
    as_job,
    build_pod_job,
    cells_of,
    name_of,
    next_pod,
    of_pod,
    pods_of,
)
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import AlreadyExistsError, ClusterError, NotFoundError, RejectedError
from qlora_operator.reconcile.progress import LogReading, ProgressReader
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.reconcile.revisions import Revisions

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 15.0
"""While a pod has a Job: no watch may show its end."""


@dataclass(frozen=True)
class FollowedPods:
    """The pods of a sweep after one pass."""

    pods: tuple[SweepPodStatus, ...] = ()
    again: float | None = None
    """Seconds until the next pass over them; None if the next event is enough."""
    blocked: bool = False
    """Whether a Job cannot be created or deleted now."""


@dataclass(frozen=True)
class SweepPods:
    """The pods of sweeps with spec.cellsPerPod."""

    cluster: Cluster
    revisions: Revisions
    profiles: Mapping[str, Profile]
    progress: ProgressReader | None
    clock: Callable[[], datetime]
    enqueue: Callable[[Key, float], None]

    async def follow(self, sweep: QLoRASweep, cells: Sequence[Cell], jobs: Mapping[str, CellJob]) -> FollowedPods:
        """Carry out the due actions for the sweep's pods.

        Raises ClusterError and RetryError.
        """
        stored = pods_of(sweep, cells)
        if not stored:
            return FollowedPods()
        jobs = {name: await self._fixed(cell) for name, cell in jobs.items()}
        observed = await self._observed(sweep)
        found, seconds, blocked = list[SweepPodStatus](), list[float](), False
        for pod, names in stored:
            facts, again = await self._facts(sweep, pod, names, jobs, observed)
            planned = next_pod(sweep, pod, names, jobs, facts)
            status = planned.status
            if planned.store_first and status != pod:
                seconds.append(0.0)
            else:
                rejection = await self._carry_out(sweep, planned, jobs)
                if rejection is not None:
                    status = replace(status, reason=rejection.word, message=rejection.sentence)
                    blocked = True
            found.append(status)
            if planned.look_again is not None:
                seconds.append((planned.look_again - facts.now).total_seconds())
            seconds += [] if again is None else [again]
            seconds += [_SECONDS_BETWEEN_LOOKS] if status.cells else []
        return FollowedPods(tuple(found), min(seconds, default=None), blocked)

    async def _fixed(self, cell: CellJob) -> CellJob:
        """Return the cell with what its revision has fixed."""
        try:
            job = None if cell.job is None else await self.revisions.fixed(cell.job, live=False)
        except UnreadableJobError:
            job = None
        return dataclasses.replace(cell, job=job)

    async def _observed(self, sweep: QLoRASweep) -> Observed:
        jobs = await self.cluster.list_jobs(sweep.namespace, sweep.uid)
        pods = await self.cluster.list_pods(sweep.namespace, sweep.uid)
        return collect(
            (view.value for view in jobs.items if isinstance(view.value, ChildJob)),
            (view.value for view in pods.items if isinstance(view.value, Pod)),
        )

    async def _facts(
        self,
        sweep: QLoRASweep,
        pod: SweepPodStatus,
        names: Sequence[str],
        jobs: Mapping[str, CellJob],
        of_sweep: Observed,
    ) -> tuple[PodFacts, float | None]:
        """Observations of the pod, and seconds until its log is read again."""
        job, log, observed = as_job(sweep, pod, names, jobs), LogReading(), of_pod(of_sweep, name_of(sweep, pod))
        if job is not None and self.progress is not None:
            enqueue = partial(self.enqueue, (sweep.namespace, sweep.name), 0.0)
            beside = [cell.uid for cell in cells_of(pod, jobs)]
            log = await self.progress.read((job.namespace, job.name), job, observed, enqueue, beside=beside)
        facts = PodFacts(
            observed=observed,
            now=self.clock(),
            profiles=self.profiles,
            progress=log.record,
            progress_beside=log.beside,
            log_read=log.done,
            queue=None if job is None else await self._queue(job, observed),
        )
        return facts, log.again

    async def _queue(self, job: QLoRAJob, observed: Observed) -> Reason | None:
        """Read why the pod's Job waits in a queue, or None without a known reason."""
        child = observed.child(job.status.step.job_name) if job.status.step else None
        if child is None or not child.suspended or child.finished:
            return None
        try:
            return queue_reason(child, await self.cluster.find_workload(job.namespace, child.uid), None)
        except ClusterError as error:
            logger.debug("Workloads cannot be read: %s", error, extra={"key": (job.namespace, job.name)})
            return None

    async def _carry_out(self, sweep: QLoRASweep, planned: PodPlan, jobs: Mapping[str, CellJob]) -> Reason | None:
        """Create and delete Jobs. Returns why one of them cannot be, None if all is done."""
        key = (sweep.namespace, sweep.name)
        for action in planned.actions:
            try:
                match action:
                    case DeleteJob(name, uid):
                        await self.cluster.delete_job(sweep.namespace, name, uid)
                        logger.info("deleted Job %s", name, extra={"key": key})
                    case CreateJob():
                        reason = await self._create(sweep, planned.status, action, jobs)
                        if reason is not None:
                            return reason
            except RejectedError as error:
                logger.warning("%s", error, extra={"key": key})
                return Reason("JobRejected", f"the API server rejects a change of the Jobs of this pod: {error}")
        return None

    async def _create(
        self, sweep: QLoRASweep, pod: SweepPodStatus, action: CreateJob, jobs: Mapping[str, CellJob]
    ) -> Reason | None:
        """Create the pod's Job, which may exist already, by a pass that was interrupted."""
        manifest = build_pod_job(sweep, name_of(sweep, pod), action, cells_of(pod, jobs))
        name = manifest["metadata"]["name"]
        try:
            await self.cluster.create_job(sweep.namespace, manifest)
            logger.info("created Job %s", name, extra={"key": (sweep.namespace, sweep.name)})
        except AlreadyExistsError:
            try:
                found = await self.cluster.get_job(sweep.namespace, name)
            except NotFoundError as error:
                raise RetryError("the object of the same name has just been deleted") from error
            if controller_uid(found) != sweep.uid:
                sentence = f"a Job {name} of another owner exists: this pod's Job is created when that Job is gone"
                return Reason("NameTaken", sentence)
        return None
