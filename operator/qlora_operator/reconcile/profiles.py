"""Keeps the profiles current, writes their status, and requeues the jobs that a change concerns."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

from qlora_api.profile_status import QLoRAProfileStatus
from qlora_api.schema import replace
from qlora_operator.decisions.observed.holds import is_spent
from qlora_operator.decisions.observed.objects import Reason
from qlora_operator.decisions.profiles.gpu_nodes import memory_of_nodes, objection_to_nodes
from qlora_operator.decisions.profiles.ledger import is_counted, seconds_of_month, unknown, with_usage
from qlora_operator.decisions.profiles.stored_profile import StoredProfile, judged
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import ClusterError, ConflictError, NotFoundError, RejectedError
from qlora_operator.metrics.shown import ENDED, RUNNING
from qlora_operator.reconcile.accounts import Accounts, Group
from qlora_operator.watch.profiles import ProfileStore
from qlora_operator.watch.store import Store

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_PASSES = 30.0
_PAUSE_AFTER_CHANGE = 0.2
_KEYS_PER_SECOND = 100.0
_WAITING = ("Pending", "Queued")

Enqueue = Callable[[Key, float], None]


class ProfileReconciler:
    """Passes over all profiles: soon after a change, and at an interval.

    They are few, and neither a namespace's labels nor the usage of jobs requests a pass.
    """

    def __init__(
        self,
        cluster: Cluster,
        profiles: ProfileStore,
        jobs: Store,
        *,
        namespaces: Sequence[str],
        enqueue: Enqueue,
        enqueue_sweep: Enqueue,
        on_change: Callable[[str], None],
        clock: Callable[[], datetime],
        accounts: Accounts,
    ) -> None:
        self._cluster = cluster
        self._profiles = profiles
        self._jobs = jobs
        self._namespaces: Sequence[str | None] = tuple(namespaces) or (None,)
        self._enqueue = enqueue
        self._enqueue_sweep = enqueue_sweep
        self._on_change = on_change
        self._clock = clock
        self._accounts = accounts
        self._changed: set[str] = set()
        self._spent: set[Group] = set()
        self._wake = asyncio.Event()
        self._obstacle = ""
        self._problem = ""

    def changed(self, name: str) -> None:
        """Note that a profile has become another for jobs, and request a pass soon."""
        self._changed.add(name)
        self._on_change(name)
        self._wake.set()

    async def first(self) -> None:
        """List all profiles, once the jobs are listed and before any is worked on.

        Without the right to do so, or an answer, new jobs wait until `run` succeeds. Another operator has counted the
        jobs that were deleted before.
        """
        await self._list()
        self._jobs.jobs.counts = True
        for stored in self._profiles.stored:
            self._account(stored, await self._status(stored))
        self._changed.clear()
        self._wake.set()

    async def run(self) -> None:
        """Make passes until canceled."""
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SECONDS_BETWEEN_PASSES):
                        await self._wake.wait()
                # Several changes of one `kubectl apply` are one pass.
                await asyncio.sleep(_PAUSE_AFTER_CHANGE)
                self._wake.clear()
                await self.once()
        finally:
            self._jobs.jobs.counts = False
            self._jobs.jobs.forget(self._jobs.jobs.gone)

    async def once(self) -> None:
        """Make one pass."""
        await self._list()
        for stored in self._profiles.stored:
            status = await self._status(stored)
            self._account(stored, status)
            await self._write(stored, status)
        known = {stored.name for stored in self._profiles.stored}
        self._jobs.jobs.forget([uid for uid, profile in self._jobs.jobs.gone.items() if profile not in known])
        await self._requeue()

    async def _list(self) -> None:
        problem = ""
        try:
            self._profiles.compare(*await self._cluster.list_profiles())
            await self._select()
            await self._look_at_nodes()
        except ClusterError as error:
            problem = str(error)
        if problem and problem != self._problem:
            logger.error("the QLoRAProfiles cannot be listed, tried again: %s", problem)
        elif self._problem and not problem:
            logger.info("the QLoRAProfiles can be listed again")
        self._problem = problem

    async def _select(self) -> None:
        """Read the labels of all namespaces, if a profile selects by them."""
        self._obstacle = ""
        if not any(stored.selects for stored in self._profiles.stored):
            return
        try:
            self._profiles.select(await self._cluster.namespace_labels())
        except RejectedError as error:
            self._obstacle = f"the operator may not list Namespaces: {error}"

    async def _look_at_nodes(self) -> None:
        """Read the labels of each profile's nodes, and requeue the jobs of one whose GPUs become others.

        Without the right to do so nothing is known of the nodes, and all jobs start.
        """
        cuda = {name: profile for name, profile in self._profiles.items() if profile.device == "cuda"}
        found: dict[str, Reason] = {}
        memory: dict[str, str | None] = {}
        try:
            for name, profile in cuda.items():
                nodes = await self._cluster.node_labels(profile.node_selector)
                memory[name] = memory_of_nodes(profile, nodes)
                why = objection_to_nodes(name, nodes)
                found |= {name: why} if why is not None else {}
        except RejectedError as error:
            logger.debug("the operator may not list Nodes: %s", error)
            found, memory = {}, {}
        self._profiles.note_gpu_memory(memory)
        changed = {name for name, _ in found.items() ^ self._accounts.no_gpu.items()}
        self._accounts.no_gpu = found
        self._enqueue_all(self._jobs.jobs.of(changed))

    async def _status(self, stored: StoredProfile) -> QLoRAProfileStatus:
        now, lines = self._clock(), list(self._jobs.jobs.lines(stored.name))
        over = {line.usage.uid for line in lines if line.usage.is_gone and is_counted(stored.status, line.usage)}
        self._jobs.jobs.forget(over)
        lines = [line for line in lines if line.usage.uid not in over]
        status = judged(stored, now, self._obstacle)
        gone = over | await self._deleted(unknown(status, [line.usage for line in lines], over))
        status = with_usage(status, [line.usage for line in lines], gone, now)
        phases = [line.phase for line in lines if not line.usage.is_gone]
        running, waiting = (sum(phase in group for phase in phases) for group in (RUNNING, _WAITING))
        memory = self._profiles.memory_of_nodes(stored)
        return replace(status, running_jobs=running, waiting_jobs=waiting, gpu_memory=memory)

    async def _deleted(self, entries: Mapping[str, str]) -> set[str]:
        """Return the entries whose job, or sweep, does not exist any more.

        A deletion while no operator ran is shown by a list alone. A job that is not known yet stays. `entries`: the
        namespace of each by its UID.
        """
        existing: set[str] = set()
        for namespace in set(entries.values()):
            try:
                jobs, _ = await self._cluster.list_versions("qlorajobs", namespace)
                existing |= {job.uid for job in jobs} | await self._cluster.sweep_uids(namespace)
            except ClusterError as error:
                logger.debug("namespace %s cannot be listed: %s", namespace, error)
                existing |= {uid for uid, where in entries.items() if where == namespace}
        return entries.keys() - existing

    def _account(self, stored: StoredProfile, status: QLoRAProfileStatus) -> None:
        """Let jobs see what their namespace has used, and requeue those that depend on it."""
        name, now, profile = stored.name, self._clock(), self._profiles.get(stored.name)
        used = {(name, each.namespace): seconds_of_month(status, each.namespace, now) for each in status.namespaces}
        kept = {group: seconds for group, seconds in self._accounts.spent.items() if group[0] != name}
        self._accounts.spent = kept | used
        spent = {group for group, seconds in used.items() if profile is not None and is_spent(profile, seconds)}
        before = {group for group in self._spent if group[0] == name}
        self._spent = (self._spent - before) | spent
        for _, namespace in spent ^ before:
            self._enqueue_all(self._jobs.jobs.of([name], namespace))

    async def _write(self, stored: StoredProfile, status: QLoRAProfileStatus) -> None:
        """Store the status if it differs, and requeue ended jobs that can note that they are counted."""
        if not stored.has_status:
            logger.error("QLoRAProfile %s: %s", stored.name, stored.problem)
            return
        try:
            if status != stored.status:
                self._profiles.changed(await self._cluster.apply_profile_status(stored, status.dump()))
        except (ConflictError, NotFoundError):
            logger.debug("QLoRAProfile %s has changed in the meantime", stored.name)
            return
        except ClusterError as error:
            logger.warning("the status of QLoRAProfile %s cannot be written: %s", stored.name, error)
            return
        self._accounts.stored = {each.name: each.status for each in self._profiles.stored}
        for line in self._jobs.jobs.lines(stored.name):
            if line.phase in ENDED and line.usage.settled < line.usage.gpu_seconds and is_counted(status, line.usage):
                self._enqueue(line.key, 0.0)

    async def _requeue(self) -> None:
        """Requeue the jobs of changed profiles, spread over time, and all sweeps."""
        changed, self._changed = self._changed, set()
        if not changed:
            return
        logger.info("changed profiles: %s", ", ".join(sorted(changed)))
        self._enqueue_all(self._jobs.jobs.of(changed))
        try:
            for namespace in self._namespaces:
                for key in await self._cluster.sweep_names(namespace):
                    self._enqueue_sweep(key, 0.0)
        except ClusterError as error:
            logger.debug("the sweeps cannot be listed, and follow the profiles later: %s", error)

    def _enqueue_all(self, keys: Iterable[Key]) -> None:
        for number, key in enumerate(key for key in keys if not self._jobs.is_settled(key)):
            self._enqueue(key, number / _KEYS_PER_SECOND)
