"""Starts the operator: `python -m qlora_operator --settings FILE`."""

import argparse
import asyncio
import gc
import logging
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.connection import connect
from qlora_operator.kube.errors import ClusterError
from qlora_operator.kube.schema_check import SchemaCheck
from qlora_operator.leadership import Election, LeaseSettings
from qlora_operator.logs import configure_logging
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.probes import Answer, Health, PortError, serving
from qlora_operator.reconcile.accounts import Accounts
from qlora_operator.reconcile.isolation import Isolation
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.reconcile.profile_limit import Starts
from qlora_operator.reconcile.profiles import ProfileReconciler
from qlora_operator.reconcile.progress import ProgressReader
from qlora_operator.reconcile.queue import WorkQueue
from qlora_operator.reconcile.sweep import SweepReconciler
from qlora_operator.settings import ENV_SETTINGS, Settings, SettingsError, find_settings, load_settings
from qlora_operator.watch.handlers import Hooks, watch
from qlora_operator.watch.profiles import ProfileStore
from qlora_operator.watch.resync import Resync, look_at_all_sweeps
from qlora_operator.watch.store import Store

logger = logging.getLogger("qlora_operator")

_GC_THRESHOLDS = (20_000, 20, 20)

# Of sweeps there are few, and their passes read from the API server.
_SWEEP_WORKERS = 2

FAILED = 1
BAD_SETTINGS = 2

_NAMESPACE_OF_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal, also while the API server is absent or denies everything.

    Returns the exit status: 0 after a signal, 1 after an error, 2 for bad settings.
    """
    parser = argparse.ArgumentParser(prog="qlora-operator", description="Runs QLoRAJobs on Kubernetes.")
    parser.add_argument(
        "--settings", type=Path, help=f"file with the settings, in YAML; by default the one that {ENV_SETTINGS} names"
    )
    try:
        settings = load_settings(find_settings(parser.parse_args(arguments).settings))
        lease = _lease_settings(settings)
    except SettingsError as error:
        print(f"qlora-operator: {error}", file=sys.stderr)  # noqa: T201 - the log is not configured yet
        return BAD_SETTINGS
    configure_logging(settings.log_level)
    try:
        asyncio.run(_connect_and_run(settings, lease))
    except ClusterError as error:
        logger.critical("the cluster cannot be used: %s", error)
        return FAILED
    except PortError as error:
        logger.critical("%s", error)
        return FAILED
    except Exception:
        logger.critical("the operator has failed", exc_info=True)
        return FAILED
    return 0


def _lease_settings(settings: Settings) -> LeaseSettings | None:
    """Return the Lease to compete for, or None without one. Raises SettingsError."""
    election = settings.leader_election
    in_pod = _NAMESPACE_OF_POD.exists()
    if not (in_pod if election.enabled is None else election.enabled):
        return None
    if election.namespace is None and not in_pod:
        raise SettingsError("leaderElection.namespace: not set; outside a pod, name the namespace of the Lease")
    namespace = election.namespace or _NAMESPACE_OF_POD.read_text().strip()
    return LeaseSettings(namespace, election.lease_name, election.lease_duration_seconds)


async def _connect_and_run(settings: Settings, lease: LeaseSettings | None) -> None:
    signals = Signals()
    signals.take()
    shown, health = settings.metrics, Health()
    metrics = Metrics(shown.running_jobs, shown.namespaces)
    ports: dict[int, dict[str, Callable[[], Answer]]] = {
        settings.probe_port: {"/healthz": health.liveness, "/readyz": health.readiness},
    }
    ports.setdefault(settings.metrics_port, {})["/metrics"] = lambda: Answer(*metrics.page())
    async with connect(on_request=metrics.requests.observe) as cluster, serving(ports):
        operator = Operator(settings, lease, cluster, metrics, health, signals)
        await signals.run(operator.run())


class Signals:
    """Ends the process on SIGTERM and SIGINT, after its work has stopped."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()

    def take(self) -> None:
        """Handle both signals from now on, in place of any other handler."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work until a signal. Raises what it raises."""
        working, stopping = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait({working, stopping})
        if not working.cancelled():
            working.result()


class Operator:
    """Wait until this release can work here, watch, be elected, work.

    A standby watches too: when it is elected, one list of versions shows that it has everything.
    """

    def __init__(
        self,
        settings: Settings,
        lease: LeaseSettings | None,
        cluster: Cluster,
        metrics: Metrics,
        health: Health,
        signals: Signals,
    ) -> None:
        self._settings = settings
        self._lease = lease
        self._cluster = cluster
        self._metrics = metrics
        self._health = health
        self._signals = signals
        self._check = SchemaCheck(cluster, self._follow_schema)
        self._follow_in_work: Callable[[bool], None] = lambda _lacks: None
        self._store = Store()
        self._queue: WorkQueue | None = None
        """Of jobs; None while this operator does not work, and requests nothing."""
        self._sweeps: WorkQueue | None = None
        self._accounts = Accounts()
        self._profiles = ProfileStore(lambda name: self._followed.changed(name))
        self._followed = ProfileReconciler(
            cluster,
            self._profiles,
            self._store,
            namespaces=settings.namespaces,
            enqueue=self._request,
            enqueue_sweep=self._request_sweep,
            on_change=metrics.transitions.expect,
            clock=lambda: datetime.now(UTC),
            accounts=self._accounts,
        )
        self._resync = Resync(
            cluster,
            settings.namespaces,
            self._request,
            store=self._store,
            interval=settings.resync_seconds,
            monotonic=time.monotonic,
            on_access=metrics.namespace_is_denied,
        )

    async def run(self) -> None:
        """Run until canceled."""
        self._health.ready = {"schema": self._schema_problem}
        await self._check.run()
        hooks = Hooks(
            self._request,
            self._resync.monitor,
            self._metrics.show,
            self._signals.take,
            self._store,
            self._request_sweep,
            self._metrics.watches.event,
            self._profiles,
        )
        self._resync.monitor.on_restart = self._metrics.watches.restarted
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(self._check.watch()), group.create_task(watch(self._settings, hooks))]
            await self._lead()
            for task in beside:
                task.cancel()

    def _request(self, key: Key, after: float = 0.0, *, first: bool = False) -> None:
        if self._queue is not None:
            self._queue.add(key, after, first=first)

    def _request_sweep(self, key: Key, after: float) -> None:
        if self._sweeps is not None:
            self._sweeps.add(key, after)

    async def _lead(self) -> None:
        if self._lease is None:
            await self._work()
            return
        identity = f"{socket.gethostname()}_{uuid.uuid4()}"
        election = Election(
            self._cluster, self._lease, identity, monotonic=time.monotonic, clock=lambda: datetime.now(UTC)
        )
        self._health.live = {"election": election.stuck}
        self._health.ready = {"election": election.problem, "schema": self._schema_problem}
        await election.run(self._work)

    def _schema_problem(self) -> str | None:
        return self._check.problem

    def _follow_schema(self, lacks: bool) -> None:
        self._metrics.schema_outdated.set(lacks)
        self._follow_in_work(lacks)

    async def _work(self) -> None:
        settings, (queue, sweeps) = self._settings, self._new_queues()
        with self._at_work((queue, sweeps)):
            changed = await self._resync.first()
            await self._followed.first()
            _keep_what_is_there()
            self._queue, self._sweeps = queue, sweeps
            self._resync.request_all(changed)
            where = ", ".join(settings.namespaces) or "all namespaces"
            logger.info("working in %s; profiles: %s", where, ", ".join(sorted(self._profiles)) or "none")
            async with asyncio.TaskGroup() as group:
                group.create_task(queue.run())
                group.create_task(sweeps.run())
                group.create_task(self._resync.run())
                group.create_task(self._followed.run())
                known, interval = self._metrics.sweeps.known, settings.resync_seconds
                listing = look_at_all_sweeps(self._cluster, settings.namespaces, sweeps.add, interval, known)
                group.create_task(listing)

    def _new_queues(self) -> tuple[WorkQueue, WorkQueue]:
        """Return the queues of jobs and sweeps, without a start."""
        settings, metrics, progress = self._settings, self._metrics, self._progress_reader()
        queue = WorkQueue(
            # It requests others, when one has ended that they wait for.
            self._reconciler(progress, self._request).reconcile,
            monotonic=time.monotonic,
            workers=settings.workers,
            namespaces=settings.namespaces,
            on_error=metrics.work.jobs.errors.inc,
            on_start=metrics.work.jobs.wait.observe,
        )
        sweeps = WorkQueue(
            SweepReconciler(
                self._cluster,
                self._profiles,
                clock=lambda: datetime.now(UTC),
                progress=progress,
                metrics=metrics,
                accounts=self._accounts,
                store=self._store,
                enqueue=self._request_sweep,
                enqueue_cell=self._request,
                note_usage=self._store.jobs.note_sweep,
            ).reconcile,
            monotonic=time.monotonic,
            workers=_SWEEP_WORKERS,
            on_error=metrics.work.sweeps.errors.inc,
            on_start=metrics.work.sweeps.wait.observe,
        )
        return queue, sweeps

    @contextmanager
    def _at_work(self, queues: tuple[WorkQueue, WorkQueue]) -> Iterator[None]:
        """Show the work in probes and metrics until the block ends.

        The work pauses while the schema lacks fields.
        """
        health, resync, candidate = self._health, self._resync, dict(self._health.ready)

        def follow_schema(lacks: bool) -> None:
            for queue in queues:
                queue.pause(lacks)
            if not lacks:
                resync.look_at_all()

        health.ready = {"resync": lambda: resync.problem() or resync.starting(), "schema": self._schema_problem}
        health.note = resync.note
        for queue in queues:
            queue.pause(self._check.problem is not None)
        self._follow_in_work = follow_schema
        jobs, sweeps = queues
        self._metrics.works((lambda: jobs.depth, lambda: sweeps.depth))
        try:
            yield
        finally:
            self._queue = self._sweeps = None
            self._follow_in_work = lambda _lacks: None
            self._metrics.works(None)
            health.ready, health.note = candidate, lambda: None

    def _progress_reader(self) -> ProgressReader | None:
        progress = self._settings.progress
        if not progress.enabled:
            return None
        concurrent = max(1, self._settings.workers // 2)
        return ProgressReader(self._cluster.read_log, time.monotonic, concurrent, progress.reads_per_second)

    def _reconciler(self, progress: ProgressReader | None, enqueue: Callable[[Key], None]) -> Reconciler:
        settings, cluster = self._settings, self._cluster
        network = settings.job_network_policies
        return Reconciler(
            cluster=cluster,
            profiles=self._profiles,
            accounts=self._accounts,
            progress=progress,
            metrics=self._metrics,
            clock=lambda: datetime.now(UTC),
            starts=Starts(cluster.profiles_in_use, enqueue, time.monotonic),
            store=self._store,
            dns=network.dns,
            isolate=Isolation(cluster, network, self._profiles, time.monotonic).apply,
            suspect_schema=self._check.suspect,
        )


def _keep_what_is_there() -> None:
    """Make the garbage collector run seldom, and only over objects from now on."""
    # Objects from before stay, so the collector skips them: it is quick without them, and so runs before there are
    # many.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    # Requests and events make thousands of objects a second that reference counting frees immediately: collecting
    # garbage among them after every 700 takes a twentieth of a pass, and finds next to nothing.
    gc.set_threshold(*_GC_THRESHOLDS)


if __name__ == "__main__":
    sys.exit(main())
