"""The losses of jobs over their optimizer steps, from logs of pods, from statuses or from workspaces."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from qlora_api.contract import ProgressRecord, decode_record
from qlora_client.files.claims import ClaimReader, reading
from qlora_client.jobs.job import Job
from qlora_client.jobs.pods import CONTAINER, pods_of
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError, MissingError

METRICS = "metrics.jsonl"
_FEW_POINTS = 20
_LATE_START = 20


@dataclass(frozen=True)
class LossHistory:
    """Losses by optimizer step, in their order."""

    training: Mapping[int, float] = field(default_factory=dict)
    """Nats per target token, or per pair if the objective compares answers."""
    held_out: Mapping[int, float] = field(default_factory=dict)
    """The same on the held-out rows, for each evaluation."""

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best evaluation, the earliest of equals, or None."""
        return min(self.held_out.items(), key=lambda point: point[1], default=None)

    def suffices(self, total_steps: int) -> bool:
        """Whether a curve shows the run: it has the start, and enough points."""
        if not self.training:
            return False
        complete = len(self.training) >= min(_FEW_POINTS, total_steps)
        return complete and min(self.training) <= max(1, total_steps // _LATE_START)


def of_metrics(content: bytes) -> LossHistory:
    """Return the losses of a workspace's `metrics.jsonl`, of every step.

    Raises ValueError for an invalid line.
    """
    history = _Growing()
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            entry = json.loads(line)
            history.add(int(entry["step"]), _number(entry.get("loss")), _number(entry.get("evalLoss")))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{METRICS}:{number}: {error!r}") from None
    return history.finished()


def of_records(records: Iterable[ProgressRecord]) -> LossHistory:
    """The losses of the trainer's logs: a point every few seconds.

    A record repeats the latest evaluation, so that one is taken for a new one if its loss differs from the one before.
    """
    history, latest = _Growing(), None
    for record in records:
        fresh = record.eval_loss if record.eval_loss != latest else None
        history.add(record.training_step, record.loss, fresh)
        latest = record.eval_loss
    return history.finished()


def of_status(job: Job) -> LossHistory:
    """The losses that the job's status keeps: a point now and then."""
    history = _Growing()
    for line in csv.DictReader(str(job.status.get("history") or "").splitlines()):
        history.add(int(line["step"]), _number(line["train_loss"] or None), _number(line["valid_loss"] or None))
    return history.finished()


def _number(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is None or isfinite(number) else None


class _Growing:
    """Collects points, and drops those that a resumed run repeats, with all after."""

    def __init__(self) -> None:
        self._training: dict[int, float] = {}
        self._held_out: dict[int, float] = {}

    def add(self, step: int, loss: float | None, eval_loss: float | None) -> None:
        if step < max(self._training, default=0):
            self._forget(step)
        if loss is not None and step > 0:
            self._training[step] = loss
        if eval_loss is not None:
            self._held_out[step] = eval_loss

    def _forget(self, step: int) -> None:
        for points in (self._training, self._held_out):
            for later in [each for each in points if each >= step]:
                del points[later]

    def finished(self) -> LossHistory:
        return LossHistory(dict(sorted(self._training.items())), dict(sorted(self._held_out.items())))


def read_progress(cluster: Cluster, job: Job) -> Iterator[ProgressRecord]:
    """Return the records of the remaining train pods, pod by pod.

    Raises ForbiddenError if the user may not read logs, and ClusterError.
    """
    for pod in pods_of(cluster, job):
        if pod.step != "train" or not pod.has_log:
            continue
        try:
            for entry in cluster.log(pod.name, CONTAINER):
                record = decode_record(entry.text, job_uid=job.run_uid, pod_uid=pod.uid)
                if isinstance(record, ProgressRecord):
                    yield record
        except MissingError:
            # Deleted since it was listed.
            continue


_MOST_BYTES = 2**28


def read_histories(cluster: Cluster, jobs: Sequence[Job], say: Callable[[str], None]) -> dict[str, LossHistory]:
    """The histories by the jobs' names, as far as they can be read.

    Logs are read directly, and are deleted a while after a job; the status keeps some steps, and the workspace every
    one, which takes a pod for each claim. `say` receives progress messages, and the reason for an incomplete or missing
    history.
    """
    histories = {job.name: _without_pod(cluster, job, say) for job in jobs}
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


def _without_pod(cluster: Cluster, job: Job, say: Callable[[str], None]) -> LossHistory:
    """The history of the logs, or that of the status if it has more points."""
    return max(_of_logs(cluster, job, say), of_status(job), key=lambda history: len(history.training))


def _by_claim(jobs: Iterator[Job]) -> Mapping[str, list[Job]]:
    """The jobs that have trained, by the claim of their workspace: the cells of a sweep share one.

    Without those that are running: their volume may be attached to one node, and their pods have logs.
    """
    found: dict[str, list[Job]] = {}
    for job in jobs:
        workspace = job.status.get("workspace")
        idle = job.ended or job.phase == "Suspended"
        if workspace is not None and idle and _total_steps(job):
            found.setdefault(str(workspace["claimName"]), []).append(job)
    return found


def _of_workspace(reader: ClaimReader, job: Job, otherwise: LossHistory, say: Callable[[str], None]) -> LossHistory:
    folder = f"{job.status['workspace']['path']}/report"
    try:
        return of_metrics(reader.read(folder, METRICS, _MOST_BYTES))
    except (ClusterError, ValueError) as error:
        say(f"the metrics of {job.name} cannot be read: {error}")
        return otherwise


def _total_steps(job: Job) -> int:
    return int(job.progress.get("totalSteps") or 0)
