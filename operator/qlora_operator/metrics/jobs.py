"""Metrics of jobs: phases, progress and GPU seconds."""

import collections
from collections.abc import Iterable, Iterator
from heapq import nsmallest

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_api.status import QLoRAJobStatus
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_api.usage import LostGpuTime, UsageStatus
from qlora_operator.decisions.observed.objects import Object, QLoRAJob
from qlora_operator.decisions.sweeps.sweep import QLoRASweep
from qlora_operator.keys import Key
from qlora_operator.metrics.shown import FIGURES, PHASES, ShownJob, read_shown

DEFAULT_RUNNING_JOBS = 1000
_JOB = ("namespace", "name")
SERIES_PER_RUNNING_JOB = len(FIGURES) + 2
"""The figures, qlora_job_info and qlora_job_without_progress."""


class JobMetrics(Collector):
    """The observed jobs.

    `running_jobs`: the number of jobs with separate series: those that began first, also after a restart.
    """

    def __init__(self, running_jobs: int = DEFAULT_RUNNING_JOBS) -> None:
        self._most = running_jobs
        self.works = True
        """Whether this operator is the one that works: its standbys observe the same jobs."""
        self._jobs: dict[Key, dict[str, ShownJob]] = {}
        """Of each name, by UID: a job and its replacement exist together for a moment."""
        self._running: dict[str, ShownJob] = {}
        """Those that run, by UID."""

    def show(self, body: Object, *, deleted: bool = False) -> None:
        """Note a job as it is stored, or was when it was deleted."""
        metadata = body["metadata"]
        key, uid = (metadata["namespace"], metadata["name"]), metadata["uid"]
        job = None if deleted else read_shown(body)
        if job is None:
            self._drop(key, uid)
            return
        self._jobs.setdefault(key, {})[uid] = job
        if job.runs:
            self._running[uid] = job
        else:
            self._running.pop(uid, None)

    def show_unstored(self, job: QLoRAJob, status: Object) -> None:
        """Note figures of a running job that are not stored."""
        metadata = {"namespace": job.namespace, "name": job.name, "uid": job.uid}
        spec = {"scheduling": {"profileName": job.spec.scheduling.profile_name}}
        self.show({"metadata": metadata, "spec": spec, "status": status})

    def gone(self, key: Key, *, replaced_by: str = "") -> None:
        """Note that no job of that name exists, but the one with the UID `replaced_by`."""
        for uid in tuple(self._jobs.get(key, ())):
            if uid != replaced_by:
                self._drop(key, uid)

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment, none on standby."""
        jobs = [job for jobs in self._jobs.values() for job in jobs.values()] if self.works else []
        running = self._running if self.works else {}
        yield _by_phase(jobs)
        yield _failed(jobs)
        yield _queued_since(jobs)
        stalled = sum(not job.progresses for job in jobs)
        yield GaugeMetricFamily(
            "qlora_jobs_without_progress", "QLoRAJobs whose condition Progressing is False.", stalled
        )
        left_out = max(0, len(running) - self._most)
        yield GaugeMetricFamily(
            "qlora_jobs_left_out",
            "Running jobs without metrics of their own, as there are more than settings.metrics.runningJobs.",
            left_out,
        )
        longest = nsmallest(self._most, running.values(), key=lambda job: (job.started, job.uid))
        yield from _of_each(tuple(longest))

    def _drop(self, key: Key, uid: str) -> None:
        jobs = self._jobs.get(key, {})
        jobs.pop(uid, None)
        self._running.pop(uid, None)
        if not jobs:
            self._jobs.pop(key, None)


def _by_phase(jobs: Iterable[ShownJob]) -> Metric:
    family = GaugeMetricFamily("qlora_jobs", "QLoRAJobs by phase.", labels=("namespace", "phase"))
    counted = collections.Counter((job.namespace, job.phase) for job in jobs)
    for namespace in sorted({namespace for namespace, _ in counted}):
        for phase in PHASES:
            family.add_metric((namespace, phase), counted[namespace, phase])
    return family


def _failed(jobs: Iterable[ShownJob]) -> Metric:
    family = GaugeMetricFamily(
        "qlora_jobs_failed", "QLoRAJobs in phase Failed, by the reason why.", labels=("namespace", "reason")
    )
    counted = collections.Counter((job.namespace, job.failure) for job in jobs if job.failure)
    for labels, count in sorted(counted.items()):
        family.add_metric(labels, count)
    return family


def _queued_since(jobs: Iterable[ShownJob]) -> Metric:
    family = GaugeMetricFamily(
        "qlora_jobs_queued_since_timestamp_seconds",
        "When the job that has been in phase Queued for longest entered it, in seconds since 1970.",
        labels=("namespace",),
    )
    since: dict[str, float] = {}
    for job in jobs:
        if job.phase == "Queued" and job.phase_since is not None:
            since[job.namespace] = min(job.phase_since, since.get(job.namespace, job.phase_since))
    for namespace, moment in sorted(since.items()):
        family.add_metric((namespace,), moment)
    return family


def _of_each(jobs: tuple[ShownJob, ...]) -> Iterator[Metric]:
    """The series of the running jobs: SERIES_PER_RUNNING_JOB of each at most."""
    labels = ("phase", "profile", "persistentvolumeclaim")
    info = GaugeMetricFamily(
        "qlora_job_info", "1 for each running job: its phase, profile and workspace.", labels=(*_JOB, *labels)
    )
    stalled = GaugeMetricFamily(
        "qlora_job_without_progress", "1 if the running job's condition Progressing is False, else 0.", labels=_JOB
    )
    for job in jobs:
        info.add_metric((job.namespace, job.name, job.phase, job.profile, job.claim), 1)
        stalled.add_metric((job.namespace, job.name), not job.progresses)
    yield info
    yield stalled
    for figure in FIGURES:
        family = GaugeMetricFamily(figure.metric, figure.meaning, labels=_JOB)
        for job in jobs:
            if figure.metric in job.figures:
                family.add_metric((job.namespace, job.name), job.figures[figure.metric])
        yield family


class GpuSeconds:
    """Counts what each write of a status adds to its usage.

    As the usage is stored, a second counts once, also after a restart, when counters begin at 0 again. There are as
    many series as namespaces with jobs times profiles, and four times as many for lost time.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._used = Counter(
            "qlora_gpu_seconds",
            "GPU seconds that train pods have had, by namespace and profile of their jobs.",
            ["namespace", "profile"],
            registry=registry,
        )
        self._lost = Counter(
            "qlora_gpu_lost_seconds",
            "GPU seconds that are in no checkpoint, by cause: startup, disruption, failure or suspension.",
            ["namespace", "profile", "cause"],
            registry=registry,
        )

    def expect(self, namespace: str, profile: str) -> None:
        """Show the series at 0, of a job that is about to use GPUs.

        A series that begins with its first seconds has no increase: Prometheus has not seen the zero before.
        """
        self.add(namespace, profile, UsageStatus())

    def note(self, job: QLoRAJob, written: QLoRAJobStatus) -> None:
        """Count the usage that a stored status adds to the job's earlier one."""
        gives_gpus = written.resolved is not None and written.resolved.profile.gpu_resource is not None
        if gives_gpus or written.usage is not None:
            usage = written.usage or UsageStatus()
            self.add(job.namespace, job.spec.scheduling.profile_name, usage, job.status.usage)

    def note_sweep(self, sweep: QLoRASweep, written: QLoRASweepStatus) -> None:
        """Count the added usage of the sweep itself: the parts of cells that have ended."""
        before = {pod.number: pod.usage for pod in sweep.status.pods}
        for pod in written.pods:
            if pod.usage is not None:
                profile = sweep.spec.template.spec.scheduling.profile_name
                self.add(sweep.namespace, profile, pod.usage, before.get(pod.number))

    def add(self, namespace: str, profile: str, usage: UsageStatus, before: UsageStatus | None = None) -> None:
        """Count what the usage has more than `before`."""
        before = before or UsageStatus()
        self._used.labels(namespace, profile).inc(max(0, usage.gpu_seconds - before.gpu_seconds))
        for cause in LostGpuTime.model_fields:
            more = getattr(usage.lost_gpu_seconds, cause) - getattr(before.lost_gpu_seconds, cause)
            self._lost.labels(namespace, profile, cause).inc(max(0, more))
