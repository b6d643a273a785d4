"""Adds up the GPU memory of jobs that train together from the share of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from qlora_api.memory.estimate import UNSURE_CONTEXT_BYTES, MemoryEstimate
from qlora_api.status import MemoryStatus


@dataclass(frozen=True, slots=True)
class ShareOfMemory:
    """One job's share of the memory of jobs that train together, in bytes."""

    expected: int
    """Alone."""
    low: int
    """Alone, at the very least."""
    shared: int
    """The part of `expected` that is shared, however many jobs train together."""

    @classmethod
    def from_status(cls, memory: MemoryStatus | None) -> Self | None:
        """Read prepare's result, or None without one, as of a job that trains alone."""
        if memory is None:
            return None
        expected, low, shared = memory.estimate_bytes, memory.low_bytes, memory.shared_bytes
        return None if expected is None or low is None or shared is None else cls(expected, low, shared)


@dataclass(frozen=True, slots=True)
class JointPeak:
    """The peak memory of jobs that train together, in bytes."""

    expected: int
    low: int
    """At the very least."""


def shared_bytes(alone: MemoryEstimate, together: MemoryEstimate, jobs: int) -> int:
    """Return the shared part of a job's estimate.

    `together`: the estimate of `jobs` jobs like it, at least 2.
    """
    for_each_further = (together.expected - alone.expected) / (jobs - 1)
    return max(0, alone.expected - math.ceil(for_each_further))


def add_up(shares: Sequence[ShareOfMemory]) -> JointPeak:
    """Add up the peak of at least one job.

    It is that of a joint pass for jobs that are alike, if the number of jobs is the one that prepare estimated each
    with. For other jobs it is not below the peak: a pass takes the more for each further token, the more it has, and
    the least shared part is that of the job whose pass is the largest.
    """
    shared = min(share.shared for share in shares)
    expected = shared + sum(share.expected - share.shared for share in shares)
    # Each low bound has the least of the context, which is shared. That of an earlier release may be below it.
    own = sum(max(0, share.low - max(0, share.shared - UNSURE_CONTEXT_BYTES)) for share in shares)
    return JointPeak(expected, max(0, shared - UNSURE_CONTEXT_BYTES) + own)
