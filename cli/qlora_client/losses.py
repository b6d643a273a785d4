"""The training losses of a job so far, from the logs of its pods: the status has the latest only."""

from collections.abc import Iterator

from qlora_api.contract import ProgressRecord, decode_record
from qlora_client.cluster import Cluster
from qlora_client.errors import MissingError
from qlora_client.job import Job
from qlora_client.pods import CONTAINER, pods_of


def read_losses(cluster: Cluster, job: Job) -> dict[int, float]:
    """Training loss by optimizer step, in their order: what the train pods that are still there have reported.

    They report every few seconds, so not each step is there. Raises ForbiddenError if the user may not read logs, and
    ClusterError.
    """
    losses: dict[int, float] = {}
    for record in read_progress(cluster, job):
        add_loss(losses, record.training_step, record.loss)
    return losses


def read_progress(cluster: Cluster, job: Job) -> Iterator[ProgressRecord]:
    """What the train pods that are still there have reported, pod by pod. Raises as `read_losses` does."""
    for pod in pods_of(cluster, job):
        if pod.step != "train" or not pod.has_log:
            continue
        try:
            for entry in cluster.log(pod.name, CONTAINER):
                record = decode_record(entry.text, job_uid=job.uid, pod_uid=pod.uid)
                if isinstance(record, ProgressRecord):
                    yield record
        except MissingError:
            # Deleted since it was listed.
            continue


def add_loss(losses: dict[int, float], step: int, loss: float | None) -> None:
    """Add the latest loss. Those of later steps are dropped: the run has gone back to a checkpoint."""
    if loss is None or step < 1:
        return
    while losses and next(reversed(losses)) >= step:
        losses.popitem()
    losses[step] = loss
