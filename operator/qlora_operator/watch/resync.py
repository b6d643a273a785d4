"""Lists every job and sweep at an interval, and detects dead watches.

A lost event so only delays them.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import ClusterError, NotFoundError, RejectedError
from qlora_operator.kube.listing import KINDS, Kind, ObjectVersion, version_number
from qlora_operator.kube.schema_check import NO_DEFINITION
from qlora_operator.watch.store import Store

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 20.0
_PAUSE_AFTER_ERROR = 10.0
_FAILED_BEATS = 3
_FIRST_PAUSE_SECONDS = 10.0
_KEYS_PER_SECOND = 100.0
# An object that a list has and its watch has not, the watch usually shows soon.
_SECONDS_FOR_THE_WATCH = 1.0
# At the start of the work, a watch that shows nothing for so long is not waited for.
_SECONDS_WITHOUT_NEWS = 5.0
_LOOK_SECONDS = 0.1

Identity = tuple[Kind, str, str, str]
"""Kind, namespace, name and UID: a late event of a deleted object must not count for a new one of its name."""


class EnqueueAfter(Protocol):
    """Requests a job, so many seconds from now. `first`: before the jobs that have been started."""

    def __call__(self, key: Key, after: float, /, *, first: bool = False) -> None:
        """Request it."""


@dataclass
class WatchMonitor:
    """Compares lists with what the watches have shown.

    If a list has a newer version of an object than its watch has shown, and the watch has still not shown it at a list
    `patience` seconds later, the watch is dead, although its connection may look alive.
    """

    patience: float
    on_restart: Callable[[], None] = lambda: None
    _shown: dict[Identity, int] = field(default_factory=dict)
    _behind: dict[Identity, tuple[int, float]] = field(default_factory=dict)
    _dead: set[Kind] = field(default_factory=set)
    starts: int = 1
    """How often the watches have started."""

    def show(self, identity: Identity, version: str, *, deleted: bool) -> None:
        """Note an event of a watch. `version`: the object's resourceVersion."""
        if deleted:
            self._shown.pop(identity, None)
            self._behind.pop(identity, None)
        elif (number := version_number(version)) > self._shown.get(identity, 0):
            self._shown[identity] = number

    def compare(self, kind: Kind, listed: dict[Identity, str], now: float, list_version: str = "") -> None:
        """Note a complete list of one kind at `now` (seconds) and `list_version`.

        An object that is not in it and not newer has been deleted, even if its watch has not shown that.
        """
        taken = version_number(list_version)
        gone = [each for each, shown in self._shown.items() if each[0] == kind and shown <= taken]
        for identity in set(gone) - listed.keys():
            del self._shown[identity]
        still_behind = {
            identity: (version, since)
            for identity, (version, since) in self._behind.items()
            if identity[0] == kind and identity in listed and self._shown.get(identity, 0) < version
        }
        overdue = [identity for identity, (_, since) in still_behind.items() if now - since >= self.patience]
        if overdue:
            logger.error("the watch of %s is dead: it has not shown %s", kind, overdue[0][1:3])
            self._dead.add(kind)
        else:
            self._dead.discard(kind)
        self._behind = {identity: entry for identity, entry in self._behind.items() if identity[0] != kind}
        for identity, version in listed.items():
            if (number := version_number(version)) > self._shown.get(identity, 0):
                self._behind[identity] = still_behind.get(identity, (number, now))

    def behind(self, listed: Mapping[Identity, str]) -> list[Identity]:
        """Return the listed objects whose versions the watches have not shown yet."""
        return [each for each, version in listed.items() if version_number(version) > self._shown.get(each, 0)]

    def doubt(self, kind: Kind) -> None:
        """Treat the watch of this kind as dead: it may have missed that its kind was gone."""
        self._dead.add(kind)

    def start_again(self) -> None:
        """Reset at a new start of the watches: earlier gaps are no evidence about them."""
        self._behind.clear()
        self._dead.clear()
        self.starts += 1
        self.on_restart()

    @property
    def dead(self) -> tuple[Kind, ...]:
        """The kinds whose watch is dead."""
        return tuple(sorted(self._dead))


@dataclass
class Access:
    """The operator's right to list, by namespace (None: the cluster)."""

    on_change: Callable[[str | None, bool], None] = lambda _namespace, _denied: None
    _denied: set[str | None] = field(default_factory=set)

    def judge(self, namespace: str | None, error: RejectedError | None) -> bool:
        """Note whether the namespace could be listed, and log a change.

        Returns whether it is back.
        """
        where = f"namespace {namespace}" if namespace else "the cluster"
        back = error is None and namespace in self._denied
        if back:
            logger.info("%s can be listed again", where)
            self._denied.discard(namespace)
        elif error is not None and namespace not in self._denied:
            logger.error("%s cannot be listed, its jobs wait until the right is granted again: %s", where, error)
            self._denied.add(namespace)
        self.on_change(namespace, error is not None)
        return back

    @property
    def denied(self) -> tuple[str, ...]:
        """Return the namespaces that cannot be listed, with "" for the cluster."""
        return tuple(sorted(namespace or "" for namespace in self._denied))


class Resync:
    """Lists and enqueues every job at an interval, and reports problems."""

    def __init__(
        self,
        cluster: Cluster,
        namespaces: Sequence[str],
        enqueue: EnqueueAfter,
        *,
        store: Store,
        interval: float,
        monotonic: Callable[[], float],
        on_access: Callable[[str | None, bool], None] = lambda _namespace, _denied: None,
    ) -> None:
        self.access = Access(on_access)
        self.monitor = WatchMonitor(patience=interval / 2)
        self._cluster = cluster
        self._namespaces: Sequence[str | None] = tuple(namespaces) or (None,)
        self._enqueue = enqueue
        self._store = store
        self._interval = interval
        self._monotonic = monotonic
        self._listed = False
        self._failures = 0
        self._failing_since = monotonic()
        self._unknown = False
        self._starts = 0
        """Start of the watches that a list has been compared with."""
        self._due = monotonic()

    async def first(self) -> set[Key]:
        """Compare the store with lists, before any worker, and return the jobs that have to be read live.

        Lists until the API server answers, with pauses of at most ten seconds, and waits while the watches still show
        what the lists have.
        """
        pause = 1.0
        while True:
            self._starts = self.monitor.starts
            try:
                lists = await self._list_all()
            except ClusterError as error:
                self._failed(error)
            else:
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, _FIRST_PAUSE_SECONDS)
        await self._wait_for_watches(lists)
        self._succeeded()
        changed = set[Key]()
        for each in lists:
            changed |= self._store.compare(each.kind, each.namespace, each.found, each.version)
        return changed

    def request_all(self, changed: set[Key]) -> None:
        """Request these jobs and all of the store: the new ones first, those that have ended last."""
        new, known, ended = self._store.keys()
        for key in new:
            self._enqueue(key, 0.0, first=True)
        for key in {**dict.fromkeys(known), **dict.fromkeys(changed)}:
            self._enqueue(key, 0.0)
        self._enqueue_all([key for key in ended if key not in changed])

    async def _list_all(self) -> list["_Listed"]:
        """List all kinds.

        Raises ClusterError. A namespace that is denied is left out, unless there is no other.
        """
        rejected: dict[str | None, RejectedError] = {}
        lists = list[_Listed]()
        for kind in KINDS:
            found = await self._list(kind, rejected)
            self.monitor.compare(kind, _versions(found), self._monotonic())
            lists += found
        self._judge(rejected)
        return lists

    async def _wait_for_watches(self, lists: Sequence["_Listed"]) -> None:
        """Wait until the watches have shown the listed objects, or show no more of them."""
        behind, since = self._behind(lists), self._monotonic()
        while behind and self._monotonic() - since < _SECONDS_WITHOUT_NEWS:
            await asyncio.sleep(_LOOK_SECONDS)
            left = self._behind(lists)
            if left < behind:
                since = self._monotonic()
            behind = left

    def _behind(self, lists: Sequence["_Listed"]) -> int:
        """Return the number of listed objects that neither a watch nor a deletion has shown."""
        shown = self.monitor.behind(_versions(lists))
        return sum(not self._store.is_buried(uid) for _, _, _, uid in shown)

    async def run(self) -> None:
        """Resync until canceled, first after one interval.

        Small requests in between check connection and rights. No watch shows an object that was deleted before the
        watches began again: one list soon after each start does.
        """
        self._due = self._next()
        while True:
            await asyncio.sleep(min(_BEAT_SECONDS, max(0.0, self._due - self._monotonic())))
            started = self.monitor.starts
            try:
                if self._monotonic() >= self._due:
                    self._due = self._next()
                    await self.once()
                elif started != self._starts:
                    await self.once(judge=False)
                    self._starts = started
                else:
                    await self._beat()
            except ClusterError as error:
                self._failed(error)
                self._due = self._monotonic() + min(_BEAT_SECONDS, self._interval)
            else:
                self._succeeded()

    def _failed(self, error: ClusterError) -> None:
        self._failures += 1
        self._unknown = isinstance(error, NotFoundError)
        if self._failures == 1:
            self._failing_since = self._monotonic()
        if self._failures == 1 and not isinstance(error, RejectedError):
            reason = NO_DEFINITION if self._unknown else error
            logger.warning("the jobs cannot be listed, tried again: %s", reason)

    def _succeeded(self) -> None:
        self._listed = True
        if self._failures:
            silence = self._monotonic() - self._failing_since
            logger.info("the jobs can be listed again, after %.0f s", silence)
            if self._unknown:
                self.monitor.doubt("qlorajobs")
            self._failures, self._unknown = 0, False

    def _next(self) -> float:
        return self._monotonic() + self._interval * random.uniform(0.9, 1.1)  # noqa: S311 - only spreads load

    async def _beat(self) -> None:
        rejected: dict[str | None, RejectedError] = {}
        for kind in KINDS:
            for namespace in self._namespaces:
                try:
                    await self._cluster.check_list(kind, namespace)
                except RejectedError as error:
                    rejected.setdefault(namespace, error)
        self._judge(rejected)

    async def once(self, *, judge: bool = True) -> None:
        """List everything once, and check by it whether the watches are alive.

        Raises ClusterError, but not for one denied namespace of several.
        """
        rejected: dict[str | None, RejectedError] = {}
        changed: set[Key] = set()
        keys: list[Key] = []
        rest: list[Key] = []
        try:
            for kind in KINDS:
                found = await self._compare(kind, changed, rejected, judge=judge)
                if kind == "qlorajobs":
                    keys = [each.key for part in found for each in part.found]
            rest = [key for key in keys if key not in changed and not self._store.is_settled(key)]
        finally:
            # Only now: no pass may decide from objects that the lists have shown to be gone. Requests the changed ones
            # in any case: objects that the store has dropped are in no later list.
            self._enqueue_all([*changed, *rest], _SECONDS_FOR_THE_WATCH)
        self._judge(rejected)

    async def _compare(
        self, kind: Kind, changed: set[Key], rejected: dict[str | None, RejectedError], *, judge: bool
    ) -> list["_Listed"]:
        """List and compare one kind, and add to `changed` and `rejected`.

        Raises ClusterError.
        """
        lists = await self._list(kind, rejected)
        for each in lists:
            changed |= self._store.compare(kind, each.namespace, each.found, each.version)
        if judge and lists:
            version = min((each.version for each in lists), key=version_number)
            self.monitor.compare(kind, _versions(lists), self._monotonic(), version)
        return lists

    async def _list(self, kind: Kind, rejected: dict[str | None, RejectedError]) -> list["_Listed"]:
        """List one kind, and add to `rejected`. Raises ClusterError."""
        lists = list[_Listed]()
        for where in self._namespaces:
            try:
                found, version = await self._cluster.list_versions(kind, where)
            except RejectedError as error:
                rejected.setdefault(where, error)
                continue
            lists.append(_Listed(kind, where, found, version))
        return lists

    def look_at_all(self) -> None:
        """Request every unsettled job for a live read: the watches may lack fields."""
        self._enqueue_all(self._store.distrust_all())

    def _enqueue_all(self, keys: list[Key], after: float = 0.0) -> None:
        """Request all keys, spread over time.

        Thousands at the same time would delay the watches' events by seconds.
        """
        apart = min(1 / _KEYS_PER_SECOND, self._interval / (2 * max(1, len(keys))))
        for number, key in enumerate(keys):
            self._enqueue(key, after + number * apart)

    def _judge(self, rejected: dict[str | None, RejectedError]) -> None:
        """Note the rights of each namespace. Raises RejectedError if none can be listed."""
        back = [namespace for namespace in self._namespaces if self.access.judge(namespace, rejected.get(namespace))]
        if back:
            # Its jobs have waited for longer and longer: they are not to wait for the next regular list too.
            self._due = self._monotonic()
        if len(rejected) == len(self._namespaces):
            raise next(iter(rejected.values()))

    def starting(self) -> str | None:
        """Return that nothing has been listed yet, or None from the first list on."""
        return None if self._listed else "the jobs have not been listed yet"

    def note(self) -> str | None:
        """Return the problem of some namespaces, or None without one."""
        if denied := self.access.denied:
            return f"not served, as the API server denies permission to list: {', '.join(denied)}"
        return None

    def problem(self) -> str | None:
        """Return why the operator cannot do its work, or None if it can."""
        if dead := self.monitor.dead:
            return f"the watch of {', '.join(dead)} is dead"
        if self._failures >= _FAILED_BEATS:
            if len(self.access.denied) == len(self._namespaces):
                return "the API server denies the operator permission to list what it watches"
            if self._unknown:
                return NO_DEFINITION
            return f"no list has succeeded for {self._monotonic() - self._failing_since:.0f} s"
        return None


class _Listed(NamedTuple):
    """A complete list of one kind in one namespace, or in all (None)."""

    kind: Kind
    namespace: str | None
    found: list[ObjectVersion]
    version: str


def _versions(lists: Sequence[_Listed]) -> dict[Identity, str]:
    return {(part.kind, each.namespace, each.name, each.uid): each.version for part in lists for each in part.found}


async def look_at_all_sweeps(
    cluster: Cluster,
    namespaces: Sequence[str],
    enqueue: Callable[[Key], None],
    interval: float,
    known: Callable[[], Iterable[Key]] = tuple,
) -> None:
    """Request all sweeps of the namespaces, or of the cluster, at each interval.

    Runs until canceled. A list that fails is tried again soon: each failure is logged once. `known`: sweeps that are
    counted. One that no list has is requested too, because the watch may have missed its deletion.
    """
    said = ""
    while True:
        pause, problem, listed = interval, "", set[Key]()
        for namespace in namespaces or (None,):
            try:
                listed.update(await cluster.sweep_names(namespace))
            except ClusterError as error:
                pause, problem = min(interval, _PAUSE_AFTER_ERROR), str(error)
        for key in listed.union(() if problem else known()):
            enqueue(key)
        if problem and problem != said:
            logger.warning("the sweeps cannot be listed, tried again: %s", problem)
        said = problem
        await asyncio.sleep(pause)
