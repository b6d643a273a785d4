"""Reads the loss histories of jobs, from the logs of their pods or, where these do not suffice, from the workspaces."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from qlora_client.claims import ClaimReader, reading
from qlora_client.cluster import Cluster
from qlora_client.errors import ClusterError
from qlora_client.history import METRICS, LossHistory, of_metrics, of_records
from qlora_client.job import Job
from qlora_client.losses import read_progress

_MOST_BYTES = 2**28


def read_histories(cluster: Cluster, jobs: Sequence[Job], say: Callable[[str], None]) -> dict[str, LossHistory]:
    """The histories by the jobs' names, as far as they can be read.

    Logs are read at once, and are gone a while after a job; the workspace keeps every step, and takes a pod for each
    claim. `say` is told what is read and why a history is incomplete or missing.
    """
    histories = {job.name: _of_logs(cluster, job, say) for job in jobs}
    for claim, users in _by_claim(job for job in jobs if not histories[job.name].suffices(_total_steps(job))).items():
        try:
            with reading(cluster, users[0], claim, say=say) as reader:
                for job in users:
                    histories[job.name] = _of_workspace(reader, job, histories[job.name], say)
        except ClusterError as error:
            names = ", ".join(job.name for job in users)
            say(f"the curve of {names} is as complete as the logs that are left: {error}")
    return histories


def _of_logs(cluster: Cluster, job: Job, say: Callable[[str], None]) -> LossHistory:
    try:
        return of_records(read_progress(cluster, job))
    except ClusterError as error:
        say(f"the logs of {job.name} cannot be read: {error}")
        return LossHistory()


def _by_claim(jobs: Iterator[Job]) -> Mapping[str, list[Job]]:
    """The jobs that have trained, by the claim of their workspace: the cells of a sweep share one.

    Without those that are running: their volume may be attached to one node, and their pods have logs.
    """
    found: dict[str, list[Job]] = {}
    for job in jobs:
        resolved = job.status.get("resolved")
        idle = job.ended or job.phase == "Suspended"
        if resolved is not None and idle and _total_steps(job):
            found.setdefault(str(resolved["claimName"]), []).append(job)
    return found


def _of_workspace(reader: ClaimReader, job: Job, otherwise: LossHistory, say: Callable[[str], None]) -> LossHistory:
    folder = f"{job.status['resolved']['workspacePath']}/report"
    try:
        return of_metrics(reader.read(folder, METRICS, _MOST_BYTES))
    except (ClusterError, ValueError) as error:
        say(f"the metrics of {job.name} cannot be read: {error}")
        return otherwise


def _total_steps(job: Job) -> int:
    return int(job.progress.get("totalSteps") or 0)
