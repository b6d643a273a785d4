"""Counts the started jobs of a profile, to enforce the profile's limit."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import dropwhile

from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.keys import Key

SECONDS_FULL = 5.0
SECONDS_BETWEEN_LOOKS = 15.0

Group = tuple[str, str]
"""Namespace and name of a profile."""


@dataclass
class Starts:
    """Starts the jobs of one profile in one namespace in turn, with a true count.

    The count comes from the API, and a job counts once its status has its start. From the count to that write no other
    job of the group is counted: as there is one operator, the limit is not exceeded. State here only saves requests:
    after a restart every job is requeued, and those that wait are noted again.
    """

    profiles_in_use: Callable[[str], AsyncIterator[Sequence[str | None]]]
    """`profile_in_use` of each QLoRAJob of a namespace that has not ended, as stored now, in parts."""
    enqueue: Callable[[Key], None]
    monotonic: Callable[[], float]
    _locks: dict[Group, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    _full: dict[Group, tuple[int, float]] = field(default_factory=dict)
    """Counts that have reached the limit, and how long they stay valid: thousands of jobs may ask."""
    _waiting: dict[Group, dict[Key, None]] = field(default_factory=dict)
    """The waiting jobs, in order."""

    @asynccontextmanager
    async def count(self, job: QLoRAJob, limit: int) -> AsyncIterator[int]:
        """Yield the number of started, unfinished other jobs, fixed until the block ends."""
        group = _group(job)
        if (known := self._known(group)) is not None:
            yield known
            return
        async with self._locks[group]:
            if (known := self._known(group)) is None:
                known = await self._count(group)
                if known >= limit:
                    self._full[group] = (known, self.monotonic() + SECONDS_FULL)
            yield known

    def wait(self, job: QLoRAJob) -> float | None:
        """Requeue the job when another one of its group ends.

        Returns the seconds until the head of the queue is requeued anyway: a place may become free without an event, as
        when a job is replaced by another one of its name.
        """
        waiting, key = self._waiting.setdefault(_group(job), {}), (job.namespace, job.name)
        waiting[key] = None
        return SECONDS_BETWEEN_LOOKS if next(iter(waiting)) == key else None

    def waits(self, key: Key) -> bool:
        """Whether the job was found to wait."""
        return any(key in waiting for waiting in self._waiting.values())

    def place_may_be_free(self, key: Key) -> None:
        """Requeue the job that waits longest: this one has ended or no longer waits.

        It may also be under deletion, or gone.
        """
        for group in [group for group in self._waiting if group[0] == key[0]]:
            waiting = self._waiting[group]
            waiting.pop(key, None)
            self._full.pop(group, None)
            if waiting:
                self.enqueue(next(iter(waiting)))
            else:
                del self._waiting[group]

    def pass_over(self, key: Key) -> None:
        """Requeue the job that waits behind this one, whose pass has failed."""
        for waiting in self._waiting.values():
            behind = dropwhile(lambda each: each != key, waiting)
            if next(behind, None) is not None and (following := next(behind, None)) is not None:
                self.enqueue(following)

    async def _count(self, group: Group) -> int:
        namespace, profile = group
        return sum([page.count(profile) async for page in self.profiles_in_use(namespace)])

    def _known(self, group: Group) -> int | None:
        count, until = self._full.get(group, (0, 0.0))
        return count if self.monotonic() < until else None


def _group(job: QLoRAJob) -> Group:
    return job.namespace, job.spec.scheduling.profile_name
