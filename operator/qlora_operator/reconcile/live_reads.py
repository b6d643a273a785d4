"""Reads what the watches, and the lists by a job's label, do not show of it."""

import logging
from dataclasses import replace

from qlora_operator.decisions.continued import is_at_rest, waits_for_other_job
from qlora_operator.decisions.observed.conditions import condition
from qlora_operator.decisions.observed.objects import Observed, Pod, QLoRAJob, Reason
from qlora_operator.decisions.observed.parsing import controller_uid, is_managed_elsewhere, parse_child
from qlora_operator.decisions.observed.stored_job import UnreadableJobError, parse_job
from qlora_operator.decisions.pods.detached import hides_a_pod, misses_running_pod
from qlora_operator.decisions.pods.kueue import queue_reason
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import ClusterError, NotFoundError
from qlora_operator.kube.listing import ChildView
from qlora_operator.reconcile.revisions import Revisions
from qlora_operator.reconcile.shared_pods import SharedPods

logger = logging.getLogger(__name__)


async def with_current_job(cluster: Cluster, job: QLoRAJob, observed: Observed) -> Observed:
    """Add the current step's Job if its label or owner was removed: it still runs.

    For a job under deletion, the Job must still have its owner: its Jobs may be left alone on purpose
    (`--cascade=orphan`), and nothing else shows that after the garbage collector has run.
    """
    step = job.status.step
    if step is None or not step.job_uid or observed.child(step.job_name) is not None:
        return observed
    try:
        body = await cluster.get_job(job.namespace, step.job_name)
    except NotFoundError:
        return observed
    if job.deleting and controller_uid(body) != job.uid:
        return observed
    found = parse_child(body)
    return replace(observed, children=(*observed.children, found)) if found.uid == step.job_uid else observed


async def read_hidden_pods(cluster: Cluster, job: QLoRAJob, observed: Observed) -> list[Pod]:
    """Read pods of the current step without the label that watches select by.

    Others may be among them.
    """
    step, found = job.status.step, list[ChildView]()
    if step is None:
        return []
    missing = misses_running_pod(observed, step)
    if missing and step.running_pod_name:
        found += await cluster.list_pods_named(job.namespace, step.running_pod_name)
    if hides_a_pod(observed, step) or (missing and not step.running_pod_name):
        found += await cluster.list_pods_of_child(job.namespace, step.job_uid)
    # With the label it has only just been created: the watch is about to show it.
    return [replace(view.value, detached=view.job_uid != job.uid) for view in found if isinstance(view.value, Pod)]


async def read_queue(cluster: Cluster, job: QLoRAJob, observed: Observed) -> Reason | None:
    """Read why the current step's Job waits in a queue.

    Returns None without a known reason. Nothing else waits for it: without Kueue, the right to read Workloads or an
    answer, the status has less detail.
    """
    child = observed.child(job.status.step.job_name) if job.status.step else None
    if child is None or not child.suspended or child.finished:
        return None
    try:
        workload = await cluster.find_workload(job.namespace, child.uid)
    except ClusterError as error:
        logger.debug("Workloads cannot be read: %s", error, extra={"key": (job.namespace, job.name)})
        return None
    return queue_reason(child, workload, condition(job.status, "Succeeded"))


async def read_continued(
    cluster: Cluster, shared_pods: SharedPods, revisions: Revisions, job: QLoRAJob
) -> tuple[QLoRAJob | None, str]:
    """Read the job that spec.continues names, until that is settled, and its writer.

    The writer may still save a checkpoint of that job. Returns None if no job can be read.
    """
    if not waits_for_other_job(job):
        return None, ""
    body = await cluster.get_qlora_job(job.namespace, str(job.spec.continues))
    try:
        is_here = body is not None and not is_managed_elsewhere(body)
        other = await revisions.fixed(parse_job(body), live=True) if is_here and body is not None else None
    except UnreadableJobError as error:
        logger.warning("%s: %s", job.spec.continues, error, extra={"key": (job.namespace, job.name)})
        return None, ""
    return other, await shared_pods.read_writer(other) if other is not None and is_at_rest(other) else ""
