"""A queue of keys that takes turns between namespaces.

One worker at a time works on a key, and repeated requests for a key become one. None of the namespaces occupies all
workers, so that one with thousands of keys delays no other.

With the default 16 workers, one namespace occupies at most 14: a neighbor's new job needs a worker for two requests
only.
"""

import asyncio
import contextlib
import heapq
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field

from qlora_operator.keys import Key

logger = logging.getLogger(__name__)


BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 300.0
_WORKERS_PER_RESERVED = 8
_WORKERS_PER_FREE, _FEWEST_WITH_A_FREE_ONE = 8, 5
_FEW_ENTRIES = 64


class RetryError(Exception):
    """An expected failure: the key is worked on again after a growing pause."""


@dataclass(frozen=True, slots=True)
class _Request:
    due: float
    first: bool

    def joined(self, other: "_Request | None") -> "_Request":
        """One request for both: as early as the earlier, and first if either is."""
        return self if other is None else _Request(min(self.due, other.due), self.first or other.first)


@dataclass
class _Line:
    """Keys by due time, next the namespace with the longest wait.

    Only namespaces with a due key are read. An entry that a later request has replaced stays until it would
    be next, or until `rebuild`.
    """

    _later: list[tuple[float, Key]] = field(default_factory=list)
    _due: dict[str, list[tuple[float, Key]]] = field(default_factory=dict)
    _turns: dict[str, int] = field(default_factory=dict)
    _turn: int = 0

    def __len__(self) -> int:
        return len(self._later) + sum(len(heap) for heap in self._due.values())

    def push(self, due: float, key: Key) -> None:
        heapq.heappush(self._later, (due, key))

    def rebuild(self, entries: Iterable[tuple[float, Key]]) -> None:
        self._due.clear()
        self._later = sorted(entries)
        left = {key[0] for _, key in self._later}
        self._turns = {namespace: turn for namespace, turn in self._turns.items() if namespace in left}

    def ripen(self, now: float) -> None:
        """Let the keys that are due by `now` take turns."""
        while self._later and self._later[0][0] <= now:
            due, key = heapq.heappop(self._later)
            self._turns.setdefault(key[0], self._turn)
            heapq.heappush(self._due.setdefault(key[0], []), (due, key))

    def next_due(self, is_current: Callable[[float, Key], bool], may_work: Callable[[str], bool]) -> float | None:
        """When the next key of a namespace that `may_work` is due, or when another is to take turns."""
        while self._later and not is_current(*self._later[0]):
            heapq.heappop(self._later)
        for namespace, heap in list(self._due.items()):
            while heap and not is_current(*heap[0]):
                heapq.heappop(heap)
            if not heap:
                del self._due[namespace], self._turns[namespace]
        moments = (heap[0][0] for name, heap in self._due.items() if may_work(name))
        return min(moments, default=self._later[0][0] if self._later else None)

    def pop(self, may_work: Callable[[str], bool]) -> Key:
        """Return the next due key, which must exist by a `next_due` just before."""
        due = (name for name in self._due if may_work(name))
        namespace = min(due, key=lambda name: (self._turns[name], self._due[name][0][0]))
        self._turn += 1
        self._turns[namespace] = self._turn
        return heapq.heappop(self._due[namespace])[1]


@dataclass
class Schedule:
    """The due time of each key, without a clock or task: `now` is in seconds.

    A key whose request is `first` goes before the rest; but `reserved` keys of the rest are worked on at any time, if
    so many are due, so that many new jobs do not stop the others. That divides the workers' time, not their turns: a
    turn of the rest takes several times as long. Of one namespace, at most `most` keys are worked on at a time.
    """

    reserved: int = 1
    most: int | None = None
    _pending: dict[Key, _Request] = field(default_factory=dict)
    _lines: dict[bool, _Line] = field(default_factory=lambda: {True: _Line(), False: _Line()})
    _working: dict[Key, _Request] = field(default_factory=dict)
    _working_of_the_rest: int = 0
    _working_in: Counter[str] = field(default_factory=Counter)
    _requests: dict[Key, _Request] = field(default_factory=dict)
    _failures: dict[Key, int] = field(default_factory=dict)

    def add(self, key: Key, due: float, *, first: bool = False) -> None:
        """Request `key` at `due`, or keep an earlier request.

        While the key is worked on, the request waits.
        """
        request = _Request(due, first)
        if key in self._working:
            self._requests[key] = request.joined(self._requests.get(key))
        else:
            self._put(key, request)

    def take(self, now: float) -> Key | None:
        """Take a due key, to be worked on until it is `done`, or None if none is due.

        A key is in the class of its request: first, or the rest. In each, namespaces take turns; in a namespace, the
        key that has been due for longest is next.
        """
        for line in self._lines.values():
            line.ripen(now)
        due = [first for first in (True, False) if (moment := self._next_due(first)) is not None and moment <= now]
        if not due:
            return None
        first = due[0] if self._working_of_the_rest >= self.reserved else due[-1]
        key = self._lines[first].pop(self._may_work)
        self._working[key] = self._pending.pop(key)
        self._working_in[key[0]] += 1
        self._working_of_the_rest += not first
        return key

    def waited(self, key: Key, now: float) -> float:
        """For how long the key, which is worked on, was due before."""
        return max(0.0, now - self._working[key].due)

    def done(self, key: Key, again: float | None) -> None:
        """Note success of the work on `key`. `again`: when it is due without a request."""
        self._failures.pop(key, None)
        self._release(key)
        if (request := self._requests.pop(key, None)) is not None:
            self._put(key, request)
        if again is not None:
            self.add(key, again)

    def failed(self, key: Key, now: float) -> float:
        """Note failure of the work on `key` and return its pause, which doubles each time.

        After a new request in between it pauses as after the first failure, since a new event may help.
        """
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        pause: float = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** min(count, 16))
        first = self._release(key)
        if (request := self._requests.pop(key, None)) is not None:
            pause = min(pause, max(BACKOFF_SECONDS, request.due - now))
        self._put(key, _Request(now + pause, first or (request is not None and request.first)))
        return pause

    def next_due(self) -> float | None:
        """Return when the next key is due, apart from those that are worked on."""
        return min((due for first in (True, False) if (due := self._next_due(first)) is not None), default=None)

    def depth(self, now: float) -> int:
        """Return the number of due keys that wait for a worker."""
        return sum(request.due <= now for request in list(self._pending.values()))

    @property
    def entries(self) -> int:
        """Return the number of entries of waiting keys: at most about two for each."""
        return sum(len(line) for line in self._lines.values())

    def _release(self, key: Key) -> bool:
        """Release the key from its worker and return whether it was first."""
        first = self._working.pop(key).first
        self._working_of_the_rest -= not first
        self._working_in[key[0]] -= 1
        if not self._working_in[key[0]]:
            del self._working_in[key[0]]
        return first

    def _may_work(self, namespace: str) -> bool:
        return self.most is None or self._working_in[namespace] < self.most

    def _put(self, key: Key, request: _Request) -> None:
        before = self._pending.get(key)
        request = request.joined(before)
        if request == before:
            return
        self._pending[key] = request
        self._lines[request.first].push(request.due, key)
        if self.entries > _FEW_ENTRIES + 2 * len(self._pending):
            self._drop_replaced()

    def _drop_replaced(self) -> None:
        """Drop the entries that an earlier request has replaced.

        Those due in hours would be kept that long.
        """
        for first, line in self._lines.items():
            line.rebuild((entry.due, key) for key, entry in self._pending.items() if entry.first == first)

    def _next_due(self, first: bool) -> float | None:
        return self._lines[first].next_due(
            lambda due, key: self._pending.get(key) == _Request(due, first), self._may_work
        )


class WorkQueue:
    """Runs `work(key)` for every key that is due.

    `work` returns seconds until the key is due again, or None. RetryError and every other exception bring the key back
    after a growing pause; the latter is logged with its traceback and reported to `on_error`. `on_start`: called when a
    worker takes a key, with the seconds that it was overdue. `namespaces`: those that keys can be of; any if empty.
    """

    def __init__(
        self,
        work: Callable[[Key], Awaitable[float | None]],
        *,
        monotonic: Callable[[], float],
        workers: int = 8,
        namespaces: Collection[str] = (),
        on_error: Callable[[], None] = lambda: None,
        on_start: Callable[[float], None] = lambda _waited: None,
    ) -> None:
        self._work = work
        self._now = monotonic
        self._workers = workers
        self._on_error = on_error
        self._on_start = on_start
        # A namespace next to one that has much work finds a worker free, and need not wait for one.
        free = workers // _WORKERS_PER_FREE or int(workers >= _FEWEST_WITH_A_FREE_ONE)
        if len(set(namespaces)) == 1:
            free = 0  # there are no other namespaces
        reserved = min(workers - 1, max(1, workers // _WORKERS_PER_RESERVED))
        self._schedule = Schedule(reserved=reserved, most=workers - free)
        self._changed = asyncio.Event()
        self._paused = False

    def pause(self, paused: bool) -> None:
        """Start no work while paused, but keep requests and let running work end."""
        self._paused = paused
        self._changed.set()

    def add(self, key: Key, after: float = 0.0, *, first: bool = False) -> None:
        """Request `key`, `after` seconds from now. `first`: before the keys that are not."""
        self._schedule.add(key, self._now() + after, first=first)
        self._changed.set()

    @property
    def depth(self) -> int:
        """Return the number of keys that wait for a worker, from any thread."""
        return self._schedule.depth(self._now())

    async def run(self) -> None:
        """Work until canceled."""
        # One task waits for due keys: if each free worker did, all would wake at every change.
        free = asyncio.Semaphore(self._workers)
        async with asyncio.TaskGroup() as group:
            while True:
                await free.acquire()
                key = await self._next()
                self._on_start(self._schedule.waited(key, self._now()))
                group.create_task(self._serve(key)).add_done_callback(lambda _: free.release())

    async def _next(self) -> Key:
        while (key := None if self._paused else self._schedule.take(self._now())) is None:
            await self._wait()
        return key

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
        due = None if self._paused else self._schedule.next_due()
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due is None else max(0.0, due - self._now())):
                await self._changed.wait()
