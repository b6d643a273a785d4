"""A queue of keys: a key is worked on by one worker at a time, and repeated requests for a key become one.

Namespaces take turns, so that one with thousands of keys delays the others by no more than the work at hand.
"""

import asyncio
import contextlib
import heapq
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a QLoRAJob."""

BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 300.0


class RetryError(Exception):
    """An expected failure: the key is worked on again after a growing pause."""


@dataclass
class Schedule:
    """When each key is due. Holds no clock and no task: `now` is always given, in seconds."""

    _due: dict[Key, float] = field(default_factory=dict)
    _heaps: dict[str, list[tuple[float, Key]]] = field(default_factory=dict)
    """By namespace."""
    _turns: dict[str, int] = field(default_factory=dict)
    """When each namespace with keys had its last turn, or came, counted in turns."""
    _turn: int = 0
    _working: set[Key] = field(default_factory=set)
    _requests: dict[Key, float] = field(default_factory=dict)
    _failures: dict[Key, int] = field(default_factory=dict)

    def add(self, key: Key, due: float) -> None:
        """Request `key` at `due`; an earlier request stays. While the key is worked on, the request waits."""
        if key in self._working:
            self._requests[key] = min(due, self._requests.get(key, due))
        elif due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._turns.setdefault(key[0], self._turn)
            heapq.heappush(self._heaps.setdefault(key[0], []), (due, key))

    def take(self, now: float) -> Key | None:
        """A key that is due, to be worked on until it is `done`; None if none is due.

        Of the namespaces with such keys, the one whose last turn is longest ago; in it, the key due for longest.
        """
        self._prune()
        due = [namespace for namespace, heap in self._heaps.items() if heap[0][0] <= now]
        if not due:
            return None
        namespace = min(due, key=lambda name: (self._turns[name], self._heaps[name][0][0]))
        self._turn += 1
        self._turns[namespace] = self._turn
        _, key = heapq.heappop(self._heaps[namespace])
        del self._due[key]
        self._working.add(key)
        return key

    def done(self, key: Key, again: float | None) -> None:
        """The work on `key` has succeeded; `again`: when it is due without a request."""
        self._failures.pop(key, None)
        self._working.discard(key)
        for due in (again, self._requests.pop(key, None)):
            if due is not None:
                self.add(key, due)

    def failed(self, key: Key, now: float) -> float:
        """The work on `key` has failed: it is due after a pause that doubles each time. Returns the pause."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        pause: float = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** min(count, 16))
        self._working.discard(key)
        self._requests.pop(key, None)
        self.add(key, now + pause)
        return pause

    def next_due(self) -> float | None:
        """When the next key is due; keys that are worked on do not count."""
        self._prune()
        return min((heap[0][0] for heap in self._heaps.values()), default=None)

    def _prune(self) -> None:
        """Drop what an earlier request has replaced from the head of each heap, and namespaces without keys."""
        for namespace, heap in list(self._heaps.items()):
            while heap and self._due.get(heap[0][1]) != heap[0][0]:
                heapq.heappop(heap)
            if not heap:
                del self._heaps[namespace], self._turns[namespace]

    def depth(self, now: float) -> int:
        """How many keys are due and wait for a worker."""
        return sum(due <= now for due in list(self._due.values()))


class WorkQueue:
    """Runs `work(key)` for every key that is due. `work` returns seconds until the key is due again, or None.

    RetryError and every other exception bring the key back after a growing pause; the latter is logged with its
    traceback and reported to `on_error`.
    """

    def __init__(
        self,
        work: Callable[[Key], Awaitable[float | None]],
        *,
        monotonic: Callable[[], float],
        workers: int = 8,
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        self._work = work
        self._now = monotonic
        self._workers = workers
        self._on_error = on_error
        self._schedule = Schedule()
        self._changed = asyncio.Event()

    def add(self, key: Key, after: float = 0.0) -> None:
        """Request `key`, `after` seconds from now."""
        self._schedule.add(key, self._now() + after)
        self._changed.set()

    @property
    def depth(self) -> int:
        """How many keys wait for a worker; may be called from another thread."""
        return self._schedule.depth(self._now())

    async def run(self) -> None:
        """Work until canceled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._run_worker())

    async def _run_worker(self) -> None:
        while True:
            key = self._schedule.take(self._now())
            if key is None:
                await self._wait()
            else:
                await self._serve(key)

    async def _serve(self, key: Key) -> None:
        try:
            after = await self._work(key)
        except RetryError as reason:
            pause = self._schedule.failed(key, self._now())
            logger.info("retried in %.0f s: %s", pause, reason, extra={"key": key})
        except Exception:
            pause = self._schedule.failed(key, self._now())
            logger.exception("reconcile failed, retried in %.0f s", pause, extra={"key": key})
            self._on_error()
        else:
            self._schedule.done(key, None if after is None else self._now() + after)
        self._changed.set()

    async def _wait(self) -> None:
        due = self._schedule.next_due()
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due is None else max(0.0, due - self._now())):
                await self._changed.wait()
