"""Counters of the GPU seconds that jobs have used and lost."""

from prometheus_client import CollectorRegistry, Counter

from qlora_api.status import QLoRAJobStatus
from qlora_api.usage import LostGpuSeconds, UsageStatus
from qlora_operator.decisions.observe import QLoRAJob


class GpuSeconds:
    """Counts what each write of a status adds to its usage.

    As the usage is stored, a second counts once, also after a restart, with which counters begin at 0 again. There are
    as many series as namespaces with jobs times profiles, and four times as many for what was lost.
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
        """Count what the status has, now that it is stored, and the job's stored one had not."""
        if written.usage is not None:
            before = job.status.usage or UsageStatus()
            self.add(job.namespace, job.spec.scheduling.profile, written.usage, before)

    def add(self, namespace: str, profile: str, usage: UsageStatus, before: UsageStatus | None = None) -> None:
        """Count what the usage has more than `before`."""
        before = before or UsageStatus()
        self._used.labels(namespace, profile).inc(max(0, usage.gpu_seconds - before.gpu_seconds))
        for cause in LostGpuSeconds.model_fields:
            more = getattr(usage.lost_gpu_seconds, cause) - getattr(before.lost_gpu_seconds, cause)
            self._lost.labels(namespace, profile, cause).inc(max(0, more))
