"""Reconciles one sweep: read it and its cells, decide, act, write the status once.

Nothing is kept between passes. There are few sweeps, and a pass for each needs two requests at rest, four with
cellsPerPod: it reads from the API server, and so never decides from what a watch has shown late.
"""

import dataclasses
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property

from qlora_api.profile import Profile
from qlora_api.schema import replace
from qlora_api.sweep.spec import SWEEP_KIND, Cell
from qlora_api.sweep.status import QLoRASweepStatus, SweepPodStatus
from qlora_operator.decisions.events import sweep_event, unreadable_event
from qlora_operator.decisions.observed.holds import hold_of
from qlora_operator.decisions.observed.objects import Object, Reason, format_time
from qlora_operator.decisions.observed.parsing import is_managed_elsewhere
from qlora_operator.decisions.sweeps.best_cell import ENDED, cells_to_publish, published
from qlora_operator.decisions.sweeps.expiry import deletion_at, is_claim_to_be_deleted, is_sweep_held_up
from qlora_operator.decisions.sweeps.halving import has_new_verdict
from qlora_operator.decisions.sweeps.objection import fault_of_cells, objection_to_sweep
from qlora_operator.decisions.sweeps.plan import (
    Action,
    CreateCell,
    SetCleanup,
    SetSuspend,
    StopCell,
    held_up,
    invalid,
    next_status,
    plan,
    table,
)
from qlora_operator.decisions.sweeps.sweep import (
    CellJob,
    QLoRASweep,
    StoredSweep,
    UnreadableSweepError,
    build_cell,
    build_sweep_claim,
    cleanup,
    is_of_sweep,
    parse_cell,
    parse_sweep,
    stop,
    suspension,
)
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import AlreadyExistsError, ClusterError, ConflictError, NotFoundError, RejectedError
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.accounts import Accounts
from qlora_operator.reconcile.counted import counted
from qlora_operator.reconcile.events import post
from qlora_operator.reconcile.pauses import Pauses
from qlora_operator.reconcile.progress import ProgressReader
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.reconcile.revisions import Revisions
from qlora_operator.reconcile.sweep_pods import SweepPods
from qlora_operator.watch.store import Store

logger = logging.getLogger(__name__)

_SECONDS_WHILE_HELD_UP = 15.0


class _BlockedError(Exception):
    """An action cannot be done now. `reason` is for the status."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.sentence)
        self.reason = reason


class _DeniedError(_BlockedError):
    """The API server rejects a cell or its claim, for example by a quota or a webhook."""


@dataclass(frozen=True, slots=True)
class _Denial:
    """A denied creation of cells, not tried again at each event of another cell."""

    reason: Reason
    until: datetime
    generation: int
    """Of the spec: a user's change may remove the cause."""


@dataclass(frozen=True)
class _Done:
    """The outcome of a pass."""

    jobs: dict[str, CellJob]
    """The cells that it has created or changed, as they are since."""
    blocked: Reason | None = None
    again: float | None = None
    """Seconds until the next pass over the sweep; None if the next event is enough."""


@dataclass(frozen=True)
class SweepReconciler:
    """One pass over one sweep."""

    cluster: Cluster
    profiles: Mapping[str, Profile]
    clock: Callable[[], datetime]
    progress: ProgressReader | None = None
    metrics: Metrics = field(default_factory=Metrics)
    blocked: Pauses = field(default_factory=Pauses)
    accounts: Accounts = field(default_factory=Accounts)
    store: Store = field(default_factory=Store)
    enqueue: Callable[[Key, float], None] = lambda _key, _after: None
    enqueue_cell: Callable[[Key], None] = lambda _key: None
    note_usage: Callable[[Key, str, str, int], None] = lambda _key, _uid, _profile, _seconds: None
    """Notes the sweep's GPU seconds so far, with its key, UID and profile."""
    _denials: dict[Key, _Denial] = field(default_factory=dict)

    @cached_property
    def _pods(self) -> SweepPods:
        revisions = Revisions(self.cluster, self.store)
        return SweepPods(self.cluster, revisions, self.profiles, self.progress, self.clock, self.enqueue)

    async def reconcile(self, key: Key) -> float | None:
        """Return the seconds until the next pass, or None if the next event is enough.

        Raises RetryError.
        """
        with self.metrics.work.sweeps.duration.time():
            try:
                return await self._reconcile(key)
            except (ConflictError, NotFoundError) as error:
                raise RetryError(f"changed or deleted in the meantime: {error}") from error
            except ClusterError as error:
                self.metrics.work.sweeps.errors.inc()
                raise RetryError(str(error)) from error

    async def _reconcile(self, key: Key) -> float | None:
        found = await self.cluster.get_sweep(*key)
        self._note(key, found)
        body = None if found is None or is_managed_elsewhere(found) else found
        self.metrics.sweeps.show(key, body)
        sweep = None if body is None else await self._readable(key, body)
        if sweep is None or sweep.deleting:
            self._let_go(key)
            return None
        self._note_usage(key, sweep, sweep.status)
        try:
            cells = sweep.cells()
        except ValueError as error:
            return await self._end(sweep, invalid(sweep, Reason("InvalidCells", str(error)), self.clock()), {})
        try:
            jobs = await self._jobs(sweep)
        except RejectedError as error:
            sentence = f"the API server does not let the operator read the QLoRAJobs of this namespace: {error}"
            await self._write(sweep, held_up(sweep, Reason("CellsNotReadable", sentence), self.clock()))
            return self.blocked.next(key)
        if fault := fault_of_cells(sweep, cells, jobs):
            return await self._end(sweep, invalid(sweep, fault, self.clock()), jobs)
        objection = objection_to_sweep(sweep, cells, self.profiles)
        if has_new_verdict(sweep, lines := table(sweep, cells, jobs)):
            best = published(sweep, lines, jobs)
            await self._write(sweep, next_status(sweep, lines, objection, None, self.clock(), best, sweep.status.pods))
            return 0.0
        try:
            actions = tuple(plan(sweep, cells, jobs, objection))
        except ValueError as error:
            done = _Done({}, Reason("CellsNotReadable", str(error)), self.blocked.next(key))
        else:
            done = await self._carry_out_all(key, sweep, actions)
        jobs |= done.jobs
        followed = await self._pods.follow(sweep, cells, jobs)
        lines = table(sweep, cells, jobs)
        best = published(sweep, lines, jobs)
        status = next_status(sweep, lines, objection, done.blocked, self.clock(), best, followed.pods)
        expiry = await self._end(sweep, status, jobs, followed.pods)
        pause = self.blocked.next(key) if followed.blocked and done.blocked is None else None
        return min((each for each in (done.again, followed.again, pause, expiry) if each is not None), default=None)

    def _note(self, key: Key, found: Object | None) -> None:
        """Note the sweep, and request the cells that a change concerns."""
        # Its watch may never show the change, and then the cells would wait for ever.
        body = found or {"metadata": {"namespace": key[0], "name": key[1]}}
        for cell in self.store.sweeps.note(body, deleted=found is None):
            self.enqueue_cell((key[0], cell))

    async def _end(
        self,
        sweep: QLoRASweep,
        status: QLoRASweepStatus,
        jobs: Mapping[str, CellJob],
        pods: Sequence[SweepPodStatus] = (),
    ) -> float | None:
        """Store the status, and carry out what is due after the end.

        `pods`: those that this pass has followed. Returns the seconds until something is due.
        """
        now, goes = self.clock(), is_claim_to_be_deleted(sweep, status, jobs, self.profiles)
        if goes and status == sweep.status:
            await self._delete_claim(sweep)
            status = replace(status, claim_deletion_time=format_time(now))
        await self._write(sweep, status)
        if goes:
            return 0.0
        due = deletion_at(sweep, status, jobs, self.profiles)
        if due is None:
            return None
        if now >= due and is_sweep_held_up(pods, jobs, due):
            # No watch may show the end of a pod.
            return _SECONDS_WHILE_HELD_UP
        if now < due or status != sweep.status:
            return max(0.0, (due - now).total_seconds())
        await self.cluster.delete_sweep(sweep)
        logger.info("deleted, as its time after the end is over", extra={"key": (sweep.namespace, sweep.name)})
        return None

    async def _delete_claim(self, sweep: QLoRASweep) -> None:
        """Delete the claim that was created for the cells, if it exists."""
        try:
            claim = await self.cluster.get_claim(sweep.namespace, sweep.claim_name)
            if is_of_sweep(claim, sweep):
                await self.cluster.delete_claim(sweep.namespace, claim)
                logger.info("deleted its PersistentVolumeClaim", extra={"key": (sweep.namespace, sweep.name)})
        except NotFoundError:
            logger.debug("its claim is already gone", extra={"key": (sweep.namespace, sweep.name)})

    async def _carry_out_all(self, key: Key, sweep: QLoRASweep, actions: tuple[Action, ...]) -> _Done:
        """Carry out the actions that are possible now.

        Cells whose creation was denied wait for their time; nothing else waits for them. Raises ConflictError, in the
        end, if a cell has changed since it was read: the next pass decides from that.
        """
        denial = self._denial(key, sweep)
        waits = denial is not None and any(isinstance(action, CreateCell) for action in actions)
        jobs: dict[str, CellJob] = {}
        error: _BlockedError | None = None
        overtaken: ConflictError | None = None
        for action in actions:
            if waits and isinstance(action, CreateCell):
                continue
            try:
                jobs |= await self._carry_out(sweep, action)
            except _BlockedError as found:
                logger.warning("%s", found, extra={"key": key})
                error = found
            except ConflictError as found:
                overtaken = found
        if overtaken is not None:
            raise overtaken
        now = self.clock()
        if error is not None:
            pause = self.blocked.next(key)
            if isinstance(error, _DeniedError):
                self._denials[key] = _Denial(error.reason, now + timedelta(seconds=pause), sweep.generation)
            return _Done(jobs, error.reason, pause)
        if denial is not None and waits:
            return _Done(jobs, denial.reason, max(0.0, (denial.until - now).total_seconds()))
        self._let_go(key)
        return _Done(jobs)

    def _denial(self, key: Key, sweep: QLoRASweep) -> _Denial | None:
        """Return why no cell may be created yet.

        Returns None if it may be tried, or tried again.
        """
        denial = self._denials.get(key)
        if denial is None or denial.generation != sweep.generation or self.clock() >= denial.until:
            return None
        return denial

    def _let_go(self, key: Key) -> None:
        """Nothing is in the way of the sweep any more, or it is gone."""
        self.blocked.end(key)
        self._denials.pop(key, None)

    async def _carry_out(self, sweep: QLoRASweep, action: Action) -> dict[str, CellJob]:
        """Carry out the action and return the cell that it created or changed, by name.

        Raises _BlockedError.
        """
        match action:
            case SetSuspend(job, suspend):
                word = "suspension" if suspend else "resumption"
                return await self._change(sweep, job, suspension(job, suspend), word)
            case StopCell(job, why):
                logger.info("%s %s", job.name, why, extra={"key": (sweep.namespace, sweep.name)})
                return await self._change(sweep, job, stop(job, why), "suspension")
            case SetCleanup(job, seconds):
                return await self._change(sweep, job, cleanup(job, seconds), "clean-up")
            case CreateCell(cell, cells_in_pod):
                await self._create_claim(sweep)
                return await self._create(sweep, cell, cells_in_pod)

    def _note_usage(self, key: Key, sweep: QLoRASweep, status: QLoRASweepStatus) -> None:
        seconds = sum(pod.usage.gpu_seconds for pod in status.pods if pod.usage is not None)
        self.note_usage(key, sweep.uid, sweep.spec.template.spec.scheduling.profile_name, seconds)

    async def _readable(self, key: Key, body: Object) -> QLoRASweep | None:
        try:
            return parse_sweep(body)
        except UnreadableSweepError as error:
            logger.error("%s", error, extra={"key": key})  # noqa: TRY400 - the message names the fields
            await post(self.cluster, key, unreadable_event(dict(body), str(error), self.clock(), SWEEP_KIND))
            if error.stored is not None:
                await self._write(error.stored, held_up(error.stored, Reason("InvalidSpec", str(error)), self.clock()))
            return None

    async def _jobs(self, sweep: QLoRASweep) -> dict[str, CellJob]:
        """Read the current QLoRAJobs of the cells, by name.

        A cell without its label, which a tenant has removed, is read by its name, as long as its end has not been
        observed, or its run must be published.
        """
        jobs = {job.name: job for job in await self.cluster.list_cells(sweep.namespace, sweep.uid)}
        of_best = () if sweep.status.published is None else (sweep.status.published,)
        lines = (*sweep.status.cells, *of_best)
        names = [line.name for line in lines if line.uid and line.phase not in ENDED] + cells_to_publish(sweep)
        for name in names:
            if name in jobs:
                continue
            try:
                found = parse_cell(await self.cluster.get_cell(sweep.namespace, name), sweep.uid)
            except NotFoundError:
                continue
            jobs |= {name: found} if found is not None else {}
        return {name: self._held(job) for name, job in jobs.items()}

    def _held(self, cell: CellJob) -> CellJob:
        """Return the cell with the reason why its profile stops it, if that does."""
        if cell.job is None:
            return cell
        hold = hold_of(cell.job, self.profiles, self.accounts.spent_seconds(cell.job))
        return dataclasses.replace(cell, job=dataclasses.replace(cell.job, hold=hold))

    async def _change(self, sweep: QLoRASweep, job: CellJob, change: Object, word: str) -> dict[str, CellJob]:
        """Return the cell after the change, a `word` for people.

        Raises _BlockedError, and ConflictError if it has changed since it was read.
        """
        try:
            changed = await self.cluster.change_cell(sweep.namespace, job.name, change)
        except NotFoundError:
            logger.debug("cell %s is already gone", job.name, extra={"key": (sweep.namespace, sweep.name)})
            return {}
        except RejectedError as error:
            sentence = f"the API server rejects the {word} of QLoRAJob {job.name}: {error}"
            raise _BlockedError(Reason("CellRejected", sentence)) from error
        return _parsed(changed, sweep)

    async def _create(self, sweep: QLoRASweep, cell: Cell, cells_in_pod: int) -> dict[str, CellJob]:
        """Create the cell's QLoRAJob, unless an interrupted pass has done so.

        Raises _BlockedError.
        """
        try:
            created = await self.cluster.create_cell(sweep.namespace, build_cell(sweep, cell, cells_in_pod))
            logger.info("created QLoRAJob %s", cell.name, extra={"key": (sweep.namespace, sweep.name)})
        except RejectedError as error:
            sentence = f"the API server rejects QLoRAJob {cell.name}: {error}"
            raise _DeniedError(Reason("CellRejected", sentence)) from error
        except AlreadyExistsError as error:
            created = await self._existing(self.cluster.get_cell, sweep, cell.name)
            if not (found := _parsed(created, sweep)):
                sentence = (
                    f"a QLoRAJob {cell.name} exists that is not a cell of this sweep, perhaps of a deleted sweep of "
                    "the same name: the sweep goes on when that QLoRAJob is gone"
                )
                raise _BlockedError(Reason("NameTaken", sentence)) from error
            return found
        return _parsed(created, sweep)

    async def _create_claim(self, sweep: QLoRASweep) -> None:
        """Create the claim of all cells, if missing and not named by the template.

        Raises _BlockedError.
        """
        template, name = sweep.spec.template.spec, sweep.claim_name
        if template.workspace.claim_name is not None:
            return
        try:
            manifest = build_sweep_claim(sweep, self.profiles[template.scheduling.profile_name])
            await self.cluster.create_claim(sweep.namespace, manifest)
            logger.info("created PersistentVolumeClaim %s", name, extra={"key": (sweep.namespace, sweep.name)})
        except RejectedError as error:
            sentence = f"the API server rejects PersistentVolumeClaim {name}: {error}"
            raise _DeniedError(Reason("ClaimRejected", sentence)) from error
        except AlreadyExistsError as error:
            if not is_of_sweep(await self._existing(self.cluster.get_claim, sweep, name), sweep):
                sentence = f"a PersistentVolumeClaim {name} exists that was not created for this sweep: delete it"
                raise _BlockedError(Reason("ClaimNameTaken", sentence)) from error

    @staticmethod
    async def _existing(get: Callable[[str, str], Awaitable[Object]], sweep: QLoRASweep, name: str) -> Object:
        try:
            return await get(sweep.namespace, name)
        except NotFoundError as error:
            raise RetryError("the object of the same name has just been deleted") from error

    async def _write(self, sweep: QLoRASweep | StoredSweep, status: QLoRASweepStatus) -> None:
        """Store the status if it differs, and post an Event if the phase changes."""
        key = (sweep.namespace, sweep.name)
        if status == sweep.status:
            return
        await counted(self.cluster.apply_sweep_status(sweep, status.dump()), self.metrics.work.sweeps)
        self.metrics.sweeps.written(key, sweep.status, status)
        if isinstance(sweep, QLoRASweep):
            self.metrics.gpu_seconds.note_sweep(sweep, status)
            self._note_usage(key, sweep, status)
        if event := sweep_event(sweep, status, self.clock()):
            logger.info("phase %s, was %s", status.phase, sweep.status.phase, extra={"key": key})
            await post(self.cluster, key, event)


def _parsed(body: Object, sweep: QLoRASweep) -> dict[str, CellJob]:
    """Parse the cell, by its name, or nothing if the sweep does not control it."""
    found = parse_cell(body, sweep.uid)
    return {found.name: found} if found is not None else {}
