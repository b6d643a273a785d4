"""Reads a sweep's report of its pods, and finds writers to a job's folder."""

from dataclasses import dataclass

from pydantic import ValidationError

from qlora_api.naming import child_job_name
from qlora_api.sweep.status import SweepPodStatus
from qlora_operator.decisions.observed.conditions import is_finished
from qlora_operator.decisions.observed.objects import ChildJob, Observed, Pod, QLoRAJob, collect
from qlora_operator.decisions.observed.shared_pod import SharedPod, shared_pod
from qlora_operator.decisions.retry import is_to_be_taken_up
from qlora_operator.kube.client import Cluster
from qlora_operator.watch.store import Store
from qlora_operator.watch.sweep_index import pods_of_sweep


@dataclass(frozen=True)
class SharedPods:
    """The pods of sweeps, as their cells see them."""

    cluster: Cluster
    store: Store

    async def read(self, job: QLoRAJob, *, live: bool) -> SharedPod | None:
        """Read the pod that trains the job with other cells, if a decision depends on it.

        It is as the watches have shown the sweep or, with `live` or before they have, as it is now.
        """
        ended = is_finished(job.status) and not is_to_be_taken_up(job)
        if job.deleting or ended or not job.sweep:
            return None
        known = None if live else self.store.sweeps.pods(job.namespace, job.sweep)
        return shared_pod(job, await self._pods(job) if known is None else known)

    async def read_writer(self, job: QLoRAJob) -> str:
        """Return a pod or Job that may still save a checkpoint of the job, empty for none.

        It is the job's own or its sweep's. Neither the end of a job nor its suspension waits for such a pod: it may
        have a minute to save, or train others.
        """
        own = _left_of_train(job.name, await self._children(job.namespace, job.uid))
        if own or not job.sweep:
            return own
        found = shared_pod(job, await self._pods(job))
        return f"Job {found.child} of QLoRASweep {job.sweep}" if found is not None and found.child else ""

    async def _pods(self, job: QLoRAJob) -> tuple[SweepPodStatus, ...] | None:
        body = await self.cluster.get_sweep(job.namespace, job.sweep)
        try:
            return None if body is None else pods_of_sweep(body)
        except ValidationError:
            # Of another release, which the sweep's own pass reports.
            return ()

    async def _children(self, namespace: str, uid: str) -> Observed:
        """Jobs and pods of the job of that UID, as they are now."""
        pods = await self.cluster.list_pods(namespace, uid)
        # Afterwards: a Job that has not ended may have made a pod in between.
        jobs = await self.cluster.list_jobs(namespace, uid)
        return collect(
            (view.value for view in jobs.items if isinstance(view.value, ChildJob)),
            (view.value for view in pods.items if isinstance(view.value, Pod)),
        )


def _left_of_train(name: str, observed: Observed) -> str:
    """Return a running train pod, or a Job that may start one, for messages.

    Returns an empty string for none.
    """
    train = child_job_name(name, "train", 0).removesuffix("0")
    for pod in observed.live_pods:
        if pod.name.startswith(train):
            return f"pod {pod.name}"
    for child in observed.children:
        if child.name.startswith(train) and not (child.finished or child.deleting):
            return f"Job {child.name}"
    return ""
