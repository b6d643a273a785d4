"""Lists every job at an interval, so that a lost event only delays a job, and notices when a watch is dead."""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qlora_operator.cluster import Cluster, ClusterError, NotFoundError, RejectedError
from qlora_operator.schema_check import NO_DEFINITION
from qlora_operator.workqueue import Key

logger = logging.getLogger(__name__)

Kind = Literal["qlorajobs", "jobs", "pods"]
KINDS: tuple[Kind, ...] = ("qlorajobs", "jobs", "pods")
_BEAT_SECONDS = 20.0
_FAILED_BEATS = 3
_FIRST_PAUSE_SECONDS = 10.0

Identity = tuple[Kind, str, str]


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

    def compare(self, kind: Kind, listed: dict[Identity, str], now: float) -> None:
        """Note a complete list of one kind, taken at `now` (seconds)."""
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

    def doubt(self, kind: Kind) -> None:
        """Take the watch of this kind for dead: it cannot know that its kind was gone and is there again."""
        self._dead.add(kind)

    def start_again(self) -> None:
        """The watches start again: what they have not shown before says nothing about them."""
        self._behind.clear()
        self._dead.clear()

    @property
    def dead(self) -> tuple[Kind, ...]:
        """The kinds whose watch is dead."""
        return tuple(sorted(self._dead))


@dataclass
class Access:
    """What the API server lets the operator list, judged for each namespace on its own (None: for the cluster)."""

    on_change: Callable[[str | None, bool], None] = lambda _namespace, _denied: None
    _denied: set[str | None] = field(default_factory=set)

    def judge(self, namespace: str | None, error: RejectedError | None) -> bool:
        """Note whether the namespace could be listed, and say so if that is new. Returns whether it is back."""
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
        """The namespaces that cannot be listed; "" is the cluster."""
        return tuple(sorted(namespace or "" for namespace in self._denied))


class Resync:
    """Lists every job at an interval, enqueues each of them, and knows whether the operator can do its work."""

    def __init__(
        self,
        cluster: Cluster,
        namespaces: Sequence[str],
        enqueue: Callable[[Key], None],
        *,
        interval: float,
        monotonic: Callable[[], float],
        on_access: Callable[[str | None, bool], None] = lambda _namespace, _denied: None,
    ) -> None:
        self.access = Access(on_access)
        self.monitor = WatchMonitor(patience=interval / 2)
        self._cluster = cluster
        self._namespaces: Sequence[str | None] = tuple(namespaces) or (None,)
        self._enqueue = enqueue
        self._interval = interval
        self._monotonic = monotonic
        self._listed = False
        self._failures = 0
        self._failing_since = monotonic()
        self._unknown = False
        self._due = monotonic()

    async def first(self) -> None:
        """List everything once, however long the API server cannot answer: with a pause of at most ten seconds."""
        pause = 1.0
        while True:
            try:
                await self.once()
            except ClusterError as error:
                self._failed(error)
            else:
                self._succeeded()
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _FIRST_PAUSE_SECONDS)

    async def run(self) -> None:
        """Resync until canceled, first after one interval. Small requests in between check connection and rights."""
        self._due = self._next()
        while True:
            await asyncio.sleep(min(_BEAT_SECONDS, max(0.0, self._due - self._monotonic())))
            try:
                if self._monotonic() >= self._due:
                    self._due = self._next()
                    await self.once()
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

    async def once(self) -> None:
        """List everything once. Raises ClusterError, but not for one denied namespace of several."""
        rejected: dict[str | None, RejectedError] = {}
        for kind in KINDS:
            listed: dict[Identity, str] = {}
            for namespace in self._namespaces:
                try:
                    bodies = await self._cluster.list_metadata(kind, namespace)
                except RejectedError as error:
                    rejected.setdefault(namespace, error)
                    continue
                for body in bodies:
                    metadata = body["metadata"]
                    listed[kind, metadata["namespace"], metadata["name"]] = metadata["resourceVersion"]
            self.monitor.compare(kind, listed, self._monotonic())
            if kind == "qlorajobs":
                for _, namespace_name, name in listed:
                    self._enqueue((namespace_name, name))
        self._judge(rejected)

    def _judge(self, rejected: dict[str | None, RejectedError]) -> None:
        """Each namespace on its own. Raises RejectedError if there is none that can be listed."""
        back = [namespace for namespace in self._namespaces if self.access.judge(namespace, rejected.get(namespace))]
        if back:
            # Its jobs have waited for longer and longer: they are not to wait for the next regular list too.
            self._due = self._monotonic()
        if len(rejected) == len(self._namespaces):
            raise next(iter(rejected.values()))

    def starting(self) -> str | None:
        """That nothing has been listed yet; None from the first list on."""
        return None if self._listed else "the jobs have not been listed yet"

    def note(self) -> str | None:
        """What is wrong with a part of the namespaces only; None if nothing is."""
        if denied := self.access.denied:
            return f"not served, as the API server denies permission to list: {', '.join(denied)}"
        return None

    def problem(self) -> str | None:
        """Why the operator cannot do its work; None if it can."""
        if dead := self.monitor.dead:
            return f"the watch of {', '.join(dead)} is dead"
        if self._failures >= _FAILED_BEATS:
            if len(self.access.denied) == len(self._namespaces):
                return "the API server denies the operator permission to list what it watches"
            if self._unknown:
                return NO_DEFINITION
            return f"no list has succeeded for {self._monotonic() - self._failing_since:.0f} s"
        return None
