"""Metrics of what a status write changes: phases, failures and ends of jobs."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.observed.objects import QLoRAJob, parse_time
from qlora_operator.metrics.shown import ENDED, FAILURE_REASONS, OTHER, as_label

PHASE_BUCKETS = (10, 60, 300, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400, 172_800, 345_600, 604_800)
"""Seconds: ten seconds to a week."""
UNKNOWN_PROFILE = "unknown"


class TransitionMetrics:
    """Counts changes of jobs by their status writes.

    A job may name a profile that does not exist: no label takes that name. `profiles`: the names of those that exist.
    """

    def __init__(self, registry: CollectorRegistry, profiles: Iterable[str]) -> None:
        self._profiles = frozenset(profiles)
        self.phase_duration = Histogram(
            "qlora_job_phase_duration_seconds",
            "Time that jobs were in a phase, once they have left it.",
            ["phase", "profile"],
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
        # A series that begins with its first failure has no increase: Prometheus has not seen the zero before.
        for profile in self._profiles:
            for reason in (*FAILURE_REASONS, OTHER):
                self.failures.labels(profile, reason)
            for phase in ENDED:
                self.ended.labels(phase, profile)

    def written(self, before: QLoRAJob, after: QLoRAJobStatus) -> None:
        """Note that the status of the job has been stored."""
        profile, stored = before.spec.scheduling.profile, before.status
        profile = profile if profile in self._profiles else UNKNOWN_PROFILE
        if after.last_failure is not None and after.last_failure != stored.last_failure:
            self.failures.labels(profile, as_label(after.last_failure.reason)).inc()
        if after.phase == stored.phase:
            return
        if after.phase in ENDED:
            self.ended.labels(after.phase, profile).inc()
        seconds = None if stored.phase in ENDED else seconds_between(stored.phase_since, after.phase_since)
        if stored.phase is not None and seconds is not None:
            self.phase_duration.labels(stored.phase, profile).observe(seconds)


def seconds_between(since: str | None, until: str | None) -> float | None:
    """Return the seconds between two API timestamps, or None if one is unknown."""
    if since is None or until is None:
        return None
    return max(0.0, (parse_time(until) - parse_time(since)).total_seconds())
