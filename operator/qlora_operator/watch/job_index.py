"""Holds what profiles need of each QLoRAJob and sweep: whose it is, its phase and its GPU time."""

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_api.spec.execution import DEFAULT_PROFILE
from qlora_api.status_types import seconds_of
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.decisions.observed.parsing import is_managed_elsewhere
from qlora_operator.decisions.profiles.ledger import UsageLine
from qlora_operator.keys import Key

# Many more than passes that may not have ended yet.
_MAX_DELETED_SWEEPS = 256


@dataclass(frozen=True, slots=True)
class JobLine:
    """One job, or one sweep without a phase."""

    key: Key
    profile: str
    phase: str
    usage: UsageLine


@dataclass
class JobIndex:
    """The held jobs and sweeps by UID, and deleted ones until their GPU time is in the sums."""

    counts: bool = False
    """Whether this operator counts the GPU time of deleted jobs: on standby, another one does."""

    _jobs: dict[str, JobLine] = field(default_factory=dict)
    _sweeps: dict[str, JobLine] = field(default_factory=dict)
    _gone: dict[str, JobLine] = field(default_factory=dict)
    _deleted_sweeps: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_DELETED_SWEEPS))

    def note(self, body: Object, *, deleted: bool = False) -> None:
        """Note a QLoRAJob of any version, or as it was when it was deleted."""
        if is_managed_elsewhere(body):
            return  # its GPUs are those of another cluster
        metadata, status = body["metadata"], body.get("status") or {}
        usage, uid = status.get("usage") or {}, metadata["uid"]
        if deleted and uid not in self._jobs:
            return  # a list has shown that already, and its GPU time may be in the sums
        seconds, settled = _seconds(usage.get("gpuHours")), _seconds(usage.get("settledGpuHours"))
        profile = str(((body.get("spec") or {}).get("scheduling") or {}).get("profileName") or DEFAULT_PROFILE)
        line = UsageLine(uid, metadata["namespace"], seconds, settled)
        phase = str(status.get("phase") or "Pending")
        self._jobs[uid] = JobLine((metadata["namespace"], metadata["name"]), profile, phase, line)
        if deleted:
            self.drop(uid)

    def note_sweep(self, key: Key, uid: str, profile: str, gpu_seconds: int) -> None:
        """Note the GPU time of a sweep itself."""
        if gpu_seconds and uid not in self._deleted_sweeps:
            self._sweeps[uid] = JobLine(key, profile, "", UsageLine(uid, key[0], gpu_seconds))

    def drop_sweep(self, uid: str) -> None:
        """Note that the sweep is gone, also if a pass over it has not ended."""
        self._deleted_sweeps.append(uid)
        self.drop(uid)

    def drop(self, uid: str) -> None:
        """Note that the job is gone."""
        line = self._jobs.pop(uid, None) or self._sweeps.pop(uid, None)
        if line is not None and line.usage.gpu_seconds > 0 and self.counts:
            self._gone[uid] = replace(line, usage=replace(line.usage, is_gone=True))

    def forget(self, uids: Collection[str]) -> None:
        """Drop deleted jobs: their GPU time is in the sums, or their profile is gone too."""
        for uid in uids:
            self._gone.pop(uid, None)

    def of(self, profiles: Collection[str], namespace: str | None = None) -> list[Key]:
        """Return the jobs of these profiles, in one namespace or in all (None)."""
        lines = (line for line in self._jobs.values() if line.profile in profiles)
        return [line.key for line in lines if namespace in (None, line.key[0])]

    def lines(self, profile: str) -> Iterator[JobLine]:
        """Yield the jobs and sweeps of the profile, deleted ones too."""
        for lines in (self._jobs, self._sweeps, self._gone):
            yield from (line for line in list(lines.values()) if line.profile == profile)

    @property
    def gone(self) -> dict[str, str]:
        """The profile of each deleted job, by its UID."""
        return {uid: line.profile for uid, line in self._gone.items()}


def _seconds(hours: Any) -> int:
    """Return the seconds in hours, 0 if another version has written something else."""
    try:
        return seconds_of(hours) if isinstance(hours, str) else 0
    except ValueError:
        return 0
