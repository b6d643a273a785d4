"""The operator, with its real client, handlers of events, store, queues and passes, in virtual time."""

from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar
from unittest.mock import patch

import kopf

from qlora_api.profile import Profile
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.reconcile.profile_limit import Starts
from qlora_operator.reconcile.progress import ProgressReader
from qlora_operator.reconcile.queue import RetryError, Schedule
from qlora_operator.reconcile.sweep import SweepReconciler
from qlora_operator.watch.handlers import Hooks, _register_events
from qlora_operator.watch.resync import Resync
from qlora_operator.watch.store import Store
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import NAMESPACE, ApiServer, Object

T = TypeVar("T")
_RESYNC_SECONDS = 300
_MOST_PASSES = 25
"""Over one job at one moment."""
_METRICS = Metrics()


class PlayedOperator:
    """One process of the operator: its watches show everything, it compares that with lists, and works."""

    def __init__(self, api: ApiServer, agenda: Agenda, profiles: Mapping[str, Profile]) -> None:
        self.is_stopped = False
        self._api, self._agenda = api, agenda
        self._jobs, self._sweeps, store = Schedule(), Schedule(), Store()
        self._passes: Counter[Key] = Counter()
        cluster, clock = Cluster(api), lambda: agenda.moment
        progress = ProgressReader(cluster.read_log, self._seconds, concurrent=8)
        starts = Starts(cluster.profiles_in_use, self._ask, self._seconds)
        self._job = Reconciler(cluster, profiles, progress, _METRICS, clock, starts, store)
        self._sweep = SweepReconciler(cluster, profiles, clock, progress, _METRICS, store=store, enqueue_cell=self._ask)
        self._resync = Resync(cluster, (), self._ask, store=store, interval=_RESYNC_SECONDS, monotonic=self._seconds)
        # Shown jobs are counted in other tests: here that would take a tenth of the time.
        hooks = Hooks(self._ask, self._resync.monitor, _ignore, lambda: None, store, self._ask_sweep)
        self._handlers = _handlers(hooks)
        for kind in ("qlorajobs", "qlorasweeps", "jobs", "pods"):
            for body in api.all(kind):
                self.show(kind, None, body)
        self._list(self._first)

    async def _first(self) -> None:
        self._resync.request_all(await self._resync.first())

    def _list(self, look: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """List everything, once and then at an interval."""
        if self.is_stopped:
            return
        errors, self._api.errors = self._api.errors, 0.0
        finished(look())
        self._api.errors = errors
        for body in self._api.all("qlorasweeps"):
            self._ask_sweep((NAMESPACE, body["metadata"]["name"]))
        self._agenda.add(_RESYNC_SECONDS, lambda: self._list(self._resync.once), of_operator=True)

    def show(self, kind: str, event: str | None, body: Object) -> None:
        """Show an event of a watch."""
        if not self.is_stopped:
            finished(self._handlers[kind](event={"type": event, "object": body}))

    def look(self, key: Key) -> None:
        """Make passes over the job or the sweep, apart from the queue, until it may wait."""
        reconciler = self._sweep if self._api.get("qlorasweeps", key[1]) else self._job
        while finished(reconciler.reconcile(key)) == 0:
            pass

    def _work(self) -> None:
        self._passes.clear()
        for schedule, reconcile in ((self._jobs, self._job.reconcile), (self._sweeps, self._sweep.reconcile)):
            while not self.is_stopped and (key := schedule.take(self._seconds())) is not None:
                self._passes[key] += 1
                assert self._passes[key] < _MOST_PASSES, f"the passes over {key[1]} do not end"
                self._pass(schedule, reconcile, key)

    def _pass(
        self, schedule: Schedule, reconcile: Callable[[Key], Coroutine[Any, Any, float | None]], key: Key
    ) -> None:
        try:
            again = finished(reconcile(key))
        except RetryError:
            again = schedule.failed(key, self._seconds())
        else:
            schedule.done(key, None if again is None else self._seconds() + again)
        if again is not None:
            self._wake(again)

    def _ask(self, key: Key, after: float = 0.0, *, first: bool = False) -> None:
        self._jobs.add(key, self._seconds() + after, first=first)
        self._wake(after)

    def _ask_sweep(self, key: Key, after: float = 0.0) -> None:
        self._sweeps.add(key, self._seconds() + after)
        self._wake(after)

    def _wake(self, after: float) -> None:
        self._agenda.add(after, self._work, of_operator=True)

    def _seconds(self) -> float:
        return float(self._agenda.now)


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that waits for nothing, without an event loop."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("a request in memory waits")


def _ignore(body: Mapping[str, Any], *, deleted: bool = False) -> None:
    """Ignore a job that is shown to the metrics."""


def _handlers(hooks: Hooks) -> dict[str, Callable[..., Coroutine[Any, Any, None]]]:
    """Return the operator's handlers of events, as kopf calls them."""
    found: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {}

    def register(*resource: str, **_: Any) -> Callable[[Callable[..., Any]], Any]:
        return lambda handler: found.setdefault(resource[-1], handler)

    with patch.object(kopf.on, "event", register):
        _register_events(kopf.OperatorRegistry(), hooks)
    return found
