"""Lists every job at an interval, so that a lost event only delays a job, and notices when a watch is dead."""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qlora_operator.cluster import Cluster, ClusterError, RejectedError
from qlora_operator.decisions.observe import Object
from qlora_operator.listing import KINDS, Kind, Listed, listed
from qlora_operator.store import Store
from qlora_operator.workqueue import Key

logger = logging.getLogger(__name__)

_MISSED_INTERVALS = 3
_BEAT_SECONDS = 20.0
_REJECTED_BEATS = 3
_KEYS_PER_SECOND = 100.0
# What a list shows and its watch has not, the watch is usually about to show.
_SECONDS_FOR_THE_WATCH = 1.0

Identity = tuple[Kind, str, str]

Enqueue = Callable[[Key, float], None]
"""Requests a job, so many seconds from now."""


@dataclass
class WatchMonitor:
    """Compares lists with what the watches have shown.

    If a list has a newer version of an object than its watch has shown, and the watch has still not shown it at a list
    `patience` seconds later, the watch is dead, although its connection may look alive.
    """

    patience: float
    _shown: dict[Identity, int] = field(default_factory=dict)
    _behind: dict[Identity, tuple[int, float]] = field(default_factory=dict)
    _dead: set[Kind] = field(default_factory=set)

    def show(self, identity: Identity, version: str, *, deleted: bool) -> None:
        """Note an event of a watch. `version`: the object's resourceVersion."""
        if deleted:
            self._shown.pop(identity, None)
            self._behind.pop(identity, None)
        elif version.isdigit():
            self._shown[identity] = max(int(version), self._shown.get(identity, 0))

    def compare(self, kind: Kind, listed: dict[Identity, str], now: float, version: str = "") -> None:
        """Note a complete list of one kind, taken at `now` (seconds). `version`: that of the list.

        What is not in it and not newer has been deleted, even if its watch has not shown that.
        """
        if version.isdigit():
            gone = [each for each, shown in self._shown.items() if each[0] == kind and shown <= int(version)]
            for identity in set(gone) - listed.keys():
                del self._shown[identity]
        still_behind = {
            identity: (version, since)
            for identity, (version, since) in self._behind.items()
            if identity[0] == kind and identity in listed and self._shown.get(identity, 0) < version
        }
        overdue = [identity for identity, (_, since) in still_behind.items() if now - since >= self.patience]
        if overdue:
            logger.error("the watch of %s is dead: it has not shown %s", kind, overdue[0][1:])
            self._dead.add(kind)
        else:
            self._dead.discard(kind)
        self._behind = {identity: entry for identity, entry in self._behind.items() if identity[0] != kind}
        for identity, version in listed.items():
            if version.isdigit() and self._shown.get(identity, 0) < int(version):
                self._behind[identity] = still_behind.get(identity, (int(version), now))

    @property
    def dead(self) -> tuple[Kind, ...]:
        """The kinds whose watch is dead."""
        return tuple(sorted(self._dead))


class Resync:
    """Lists every job at an interval, enqueues each of them, and knows whether the operator can do its work."""

    def __init__(
        self,
        cluster: Cluster,
        namespaces: Sequence[str],
        enqueue: Enqueue,
        *,
        store: Store,
        interval: float,
        monotonic: Callable[[], float],
    ) -> None:
        self.monitor = WatchMonitor(patience=interval / 2)
        self._cluster = cluster
        self._namespaces: Sequence[str | None] = tuple(namespaces) or (None,)
        self._enqueue = enqueue
        self._store = store
        self._interval = interval
        self._monotonic = monotonic
        self._listed_at = monotonic()
        self._rejected_beats = 0

    async def run(self) -> None:
        """Resync until canceled, first after one interval. Small requests in between check connection and rights.

        What was deleted before the watches began, and after `fill`, nobody shows: one list soon after the start does.
        """
        due, watched_from_the_start = self._next(), False
        while True:
            await asyncio.sleep(min(_BEAT_SECONDS, max(0.0, due - self._monotonic())))
            try:
                if self._monotonic() >= due:
                    await self.once()
                    due = self._next()
                elif not watched_from_the_start:
                    await self.once(judge=False)
                    watched_from_the_start = True
                else:
                    await self._beat()
                self._rejected_beats = 0
            except ClusterError as error:
                self._rejected_beats += isinstance(error, RejectedError)
                logger.warning("listing all jobs failed: %s", error)
                due = self._monotonic() + min(_BEAT_SECONDS, self._interval)

    def _next(self) -> float:
        return self._monotonic() + self._interval * random.uniform(0.9, 1.1)  # noqa: S311 - only spreads load

    async def _beat(self) -> None:
        for kind in KINDS:
            for namespace in self._namespaces:
                await self._cluster.check_list(kind, namespace)

    async def fill(self) -> None:
        """Show everything that exists to the store, before there is a worker, and request it. Raises ClusterError."""
        finished: list[Key] = []
        for kind in KINDS:
            found: list[Listed] = []
            for where in self._namespaces:
                async for page in self._cluster.pages(kind, where):
                    for body in page:
                        found.append(listed(kind, body))
                        self._show(kind, body)
                        if kind == "qlorajobs" and _is_finished(body):
                            finished.append(found[-1].key)
            self.monitor.compare(kind, _versions(kind, found), self._monotonic())
            if kind == "qlorajobs":
                keys = [each.key for each in found]
        for key in set(keys) - set(finished):
            self._enqueue(key, 0.0)
        self._enqueue_all(finished)
        self._listed_at = self._monotonic()

    def _show(self, kind: Kind, body: Object) -> None:
        if kind == "qlorajobs":
            self._store.job_changed(body)
        else:
            self._store.child_changed(kind, body)

    async def once(self, *, judge: bool = True) -> None:
        """List everything once, and judge by it whether the watches are alive. Raises ClusterError."""
        changed: set[Key] = set()
        for kind in KINDS:
            found: list[Listed] = []
            versions: list[str] = []
            for where in self._namespaces:
                part, version = await self._cluster.list_versions(kind, where)
                changed |= self._store.compare(kind, where, part, version)
                found += part
                versions.append(version)
            if judge:
                self.monitor.compare(kind, _versions(kind, found), self._monotonic(), min(versions, key=_number))
            if kind == "qlorajobs":
                keys = [each.key for each in found]
        # Only now: no pass is to decide from what the lists have shown to be gone.
        rest = [key for key in keys if key not in changed and not self._store.is_settled(key)]
        self._enqueue_all([*changed, *rest], _SECONDS_FOR_THE_WATCH)
        self._listed_at = self._monotonic()

    def _enqueue_all(self, keys: list[Key], after: float = 0.0) -> None:
        """Request all keys, spread over time: thousands at once would delay what the watches show by seconds."""
        apart = min(1 / _KEYS_PER_SECOND, self._interval / (2 * max(1, len(keys))))
        for number, key in enumerate(keys):
            self._enqueue(key, after + number * apart)

    def problem(self) -> str | None:
        """Why the operator should be restarted; None if it should not."""
        if dead := self.monitor.dead:
            return f"the watch of {', '.join(dead)} is dead"
        if self._rejected_beats >= _REJECTED_BEATS:
            return "the API server denies the operator permission to list what it watches"
        silence = self._monotonic() - self._listed_at
        if silence > _MISSED_INTERVALS * self._interval:
            return f"no list has succeeded for {silence:.0f} s"
        return None


def _versions(kind: Kind, found: list[Listed]) -> dict[Identity, str]:
    return {(kind, each.namespace, each.name): each.version for each in found}


def _number(version: str) -> int:
    return int(version) if version.isdigit() else -1


def _is_finished(body: Object) -> bool:
    return (body.get("status") or {}).get("phase") in ("Succeeded", "Failed")
