"""Counts the writes of a status, and their errors."""

from collections.abc import Awaitable
from typing import TypeVar

from qlora_operator.kube.errors import RejectedError, UnavailableError
from qlora_operator.metrics.work import KindMetrics

T = TypeVar("T")


async def counted(write: Awaitable[T], work: KindMetrics) -> T:
    """Await the write of a status and count it, or its error unless the object has changed."""
    try:
        written = await write
    except (RejectedError, UnavailableError):
        work.write_errors.inc()
        raise
    work.writes.inc()
    return written
