"""Adds up the GPU memory of jobs that are trained together, from what each of them has found out by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from qlora_api.memory.estimate import LOW_FACTOR, MemoryEstimate
from qlora_api.status import MemoryStatus


@dataclass(frozen=True, slots=True)
class ShareOfMemory:
    """What one of the jobs that are trained together takes, in bytes."""

    expected: int
    """Alone."""
    low: int
    """Alone, at the very least."""
    shared: int
    """The part of `expected` that is there once, however many jobs are trained together."""

    @classmethod
    def of(cls, memory: MemoryStatus | None) -> Self | None:
        """What prepare has found out; None if it has not, as of a job that is trained alone."""
        if memory is None:
            return None
        expected, low, shared = memory.estimate_bytes, memory.low_bytes, memory.shared_bytes
        return None if expected is None or low is None or shared is None else cls(expected, low, shared)


@dataclass(frozen=True, slots=True)
class JointPeak:
    """What jobs that are trained together take, in bytes."""

    expected: int
    low: int
    """At the very least."""


def shared_bytes(alone: MemoryEstimate, together: MemoryEstimate, jobs: int) -> int:
    """The part of a job's estimate that is there once when `jobs` jobs like it, at least 2, take `together`."""
    for_each_further = (together.expected - alone.expected) / (jobs - 1)
    return max(0, alone.expected - math.ceil(for_each_further))


def add_up(shares: Sequence[ShareOfMemory]) -> JointPeak:
    """The peak of at least one job.

    It is that of a joint pass for jobs that are alike, if they are as many as each was told that there are. Of
    others it is not above that: a pass takes the more for each further token, the more it has, and the least that
    is shared is that of the job whose pass is the largest.
    """
    shared = min(share.shared for share in shares)
    expected = shared + sum(share.expected - share.shared for share in shares)
    low = LOW_FACTOR * shared + sum(share.low - LOW_FACTOR * share.shared for share in shares)
    return JointPeak(expected, math.floor(low))
