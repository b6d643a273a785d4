"""Metrics of what a status write changes: phases, failures, ends, and the first optimizer step."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from qlora_api.spec.execution import DEFAULT_PROFILE
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.observed.objects import QLoRAJob, parse_time
from qlora_operator.metrics.shown import ENDED, FAILURE_REASONS, OTHER, as_label

DEFAULT_NAMESPACES = 100
OTHER_NAMESPACES = "_other"
"""No namespace can have this name."""
PHASE_BUCKETS = (10, 60, 300, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400, 172_800, 345_600, 604_800)
"""Seconds: ten seconds to a week."""
UNKNOWN_PROFILE = "unknown"


class TransitionMetrics:
    """Counts changes of jobs by their status writes.

    A job may name a profile that does not exist: no label takes that name.
    `namespaces`: how many namespaces are labels of histograms. Those that have something to count first are, until the
    process ends, as a namespace that changes its label would break rates; the others share OTHER_NAMESPACES.
    """

    def __init__(self, registry: CollectorRegistry, namespaces: int = DEFAULT_NAMESPACES) -> None:
        self._profiles = set[str]()
        self._most, self._namespaces = namespaces, set[str]()
        self.phase_duration = Histogram(
            "qlora_job_phase_duration_seconds",
            "Time that jobs were in a phase, once they have left it.",
            ["namespace", "phase", "profile"],
            buckets=PHASE_BUCKETS,
            registry=registry,
        )
        self.first_step = Histogram(
            "qlora_job_time_to_first_step_seconds",
            "Time from a job's creation to its first report of an optimizer step, with the time in the phases Pending, "
            "Queued and Suspended (waiting: included) and without it (waiting: excluded).",
            ["namespace", "profile", "waiting"],
            buckets=PHASE_BUCKETS,
            registry=registry,
        )
        self.failures = Counter(
            "qlora_job_failures",
            "Attempts and jobs that have failed, by the reason in status.lastFailure.",
            ["profile", "reason"],
            registry=registry,
        )
        self.ended = Counter("qlora_jobs_ended", "Jobs that have ended.", ["phase", "profile"], registry=registry)
        self.canaries_ended = Counter(
            "qlora_canary_jobs_ended",
            "Of the jobs that have ended, those with the image of the profile's canary.",
            ["phase", "profile"],
            registry=registry,
        )
        self.expect(DEFAULT_PROFILE)

    def expect(self, profile: str) -> None:
        """Show the series of a profile that exists, at 0.

        A series that begins with its first failure has no increase: Prometheus has not seen the zero before.
        """
        self._profiles.add(profile)
        for reason in (*FAILURE_REASONS, OTHER):
            self.failures.labels(profile, reason)
        for phase in ENDED:
            self.ended.labels(phase, profile)
            self.canaries_ended.labels(phase, profile)

    def written(self, before: QLoRAJob, after: QLoRAJobStatus, created: str | None) -> None:
        """Note that the status of the job, which was created at that time, has been stored."""
        profile, stored = before.spec.scheduling.profile_name, before.status
        profile = profile if profile in self._profiles else UNKNOWN_PROFILE
        if after.last_failure is not None and after.last_failure != stored.last_failure:
            self.failures.labels(profile, as_label(after.last_failure.reason)).inc()
        seconds = seconds_to_first_step(stored, after, created)
        if seconds is not None:
            of_job = self._label(before.namespace), profile
            self.first_step.labels(*of_job, "included").observe(seconds)
            self.first_step.labels(*of_job, "excluded").observe(max(0.0, seconds - after.waited_seconds))
        if after.phase == stored.phase:
            return
        if after.phase in ENDED:
            self.ended.labels(after.phase, profile).inc()
            if after.resolved is not None and after.resolved.canary:
                self.canaries_ended.labels(after.phase, profile).inc()
        seconds = None if stored.phase in ENDED else seconds_between(stored.phase_since, after.phase_since)
        if stored.phase is not None and seconds is not None:
            self.phase_duration.labels(self._label(before.namespace), stored.phase, profile).observe(seconds)

    def _label(self, namespace: str) -> str:
        if len(self._namespaces) < self._most:
            self._namespaces.add(namespace)
        return namespace if namespace in self._namespaces else OTHER_NAMESPACES


def seconds_to_first_step(stored: QLoRAJobStatus, after: QLoRAJobStatus, created: str | None) -> float | None:
    """Return the seconds to the first report of an optimizer step, if this write has it.

    A retried job may have trained before, and a result after a run without any report has no time of its first step.
    """
    before, now = stored.progress, after.progress
    if now is None or not now.step or after.first_attempt > 1 or (before is not None and before.step):
        return None
    is_reported = before is None or before.updated_at != now.updated_at
    return seconds_between(created, now.updated_at) if is_reported else None


def seconds_between(since: str | None, until: str | None) -> float | None:
    """Return the seconds between two API timestamps, or None if one is unknown."""
    if since is None or until is None:
        return None
    return max(0.0, (parse_time(until) - parse_time(since)).total_seconds())
