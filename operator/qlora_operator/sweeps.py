"""Reconciles one sweep: reads it and its cells as they are now, decides, acts, writes the status once.

Nothing is kept between passes. There are few sweeps, and a pass for each needs two requests at rest: it asks the API
server, and so can never decide from what a watch has shown late.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from qlora_api.profile import Profile
from qlora_api.sweep import SWEEP_KIND, Cell
from qlora_api.sweep_status import QLoRASweepStatus
from qlora_operator.cluster import (
    AlreadyExistsError,
    Cluster,
    ClusterError,
    ConflictError,
    NotFoundError,
    RejectedError,
)
from qlora_operator.decisions.events import sweep_event, unreadable_event
from qlora_operator.decisions.observe import Object, Reason
from qlora_operator.decisions.stored_job import UnreadableJobError
from qlora_operator.decisions.sweep import (
    CellJob,
    QLoRASweep,
    build_cell,
    build_sweep_claim,
    is_of_sweep,
    parse_cell,
    parse_sweep,
    stop,
    suspension,
)
from qlora_operator.decisions.sweep_plan import (
    ENDED,
    Action,
    CreateCell,
    SetSuspend,
    StopCell,
    invalid,
    judges_anew,
    next_status,
    objection_to_sweep,
    plan,
    table,
)
from qlora_operator.pauses import Pauses
from qlora_operator.workqueue import Key, RetryError

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_PASSES = 2.0
"""Cells change their status in these seconds one after the other, and the sweep is looked at once."""


class _BlockedError(Exception):
    """An action cannot be done now; `reason` says why, for the status."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.sentence)
        self.reason = reason


@dataclass(frozen=True)
class SweepReconciler:
    """One pass over one sweep."""

    cluster: Cluster
    profiles: Mapping[str, Profile]
    clock: Callable[[], datetime]
    blocked: Pauses = field(default_factory=Pauses)

    async def reconcile(self, key: Key) -> float | None:
        """Seconds until the sweep is reconciled again; None if the next event is enough. Raises RetryError."""
        try:
            return await self._reconcile(key)
        except ClusterError as error:
            raise RetryError(str(error)) from error

    async def _reconcile(self, key: Key) -> float | None:
        body = await self.cluster.get_sweep(*key)
        sweep = None if body is None else await self._readable(key, body)
        if sweep is None or sweep.deleting:
            self.blocked.end(key)
            return None
        try:
            cells = sweep.cells()
        except ValueError as error:
            await self._write(sweep, invalid(sweep, Reason("InvalidCells", str(error)), self.clock()))
            return None
        jobs = await self._jobs(sweep)
        objection = objection_to_sweep(sweep, self.profiles, self.clock())
        if judges_anew(sweep, lines := table(sweep, cells, jobs)):
            await self._write(sweep, next_status(sweep, lines, objection, None, self.clock()))
            return 0.0
        blocked: Reason | None = None
        for action in tuple(plan(sweep, cells, jobs, objection)):
            try:
                jobs |= await self._carry_out(sweep, action)
            except _BlockedError as error:
                logger.warning("%s", error, extra={"key": key})
                blocked = error.reason
        lines = table(sweep, cells, jobs)
        await self._write(sweep, next_status(sweep, lines, objection, blocked, self.clock()))
        if blocked is not None:
            return self.blocked.next(key)
        self.blocked.end(key)
        return None

    async def _carry_out(self, sweep: QLoRASweep, action: Action) -> dict[str, CellJob]:
        """The cell that the action has created or changed, by its name. Raises _BlockedError."""
        match action:
            case SetSuspend(job, suspend):
                word = "suspension" if suspend else "resumption"
                return await self._change(sweep, job, suspension(job, suspend), word)
            case StopCell(job, why):
                logger.info("%s %s", job.name, why, extra={"key": (sweep.namespace, sweep.name)})
                return await self._change(sweep, job, stop(job, why), "suspension")
            case CreateCell(cell):
                await self._create_claim(sweep)
                return await self._create(sweep, cell)

    async def _readable(self, key: Key, body: Object) -> QLoRASweep | None:
        try:
            return parse_sweep(body)
        except UnreadableJobError as error:
            logger.error("%s", error, extra={"key": key})  # noqa: TRY400 - the message names the fields
            await self._post(key, unreadable_event(dict(body), str(error), self.clock(), SWEEP_KIND))
            return None

    async def _jobs(self, sweep: QLoRASweep) -> dict[str, CellJob]:
        """The QLoRAJobs of the cells as they are now, by name.

        One that somebody has taken the label from is asked for by its name, as long as its end has not been seen.
        """
        jobs = {job.name: job for job in await self.cluster.list_cells(sweep.namespace, sweep.uid)}
        for line in sweep.status.cells:
            if line.uid and line.name not in jobs and line.phase not in ENDED:
                try:
                    found = parse_cell(await self.cluster.get_cell(sweep.namespace, line.name), sweep.uid)
                except NotFoundError:
                    continue
                jobs |= {line.name: found} if found is not None else {}
        return jobs

    async def _change(self, sweep: QLoRASweep, job: CellJob, change: Object, word: str) -> dict[str, CellJob]:
        """The cell after the change, which is a `word` for people. Raises _BlockedError."""
        try:
            changed = await self.cluster.change_cell(sweep.namespace, job.name, change)
        except (NotFoundError, ConflictError):
            logger.debug("cell %s is already gone", job.name, extra={"key": (sweep.namespace, sweep.name)})
            return {}
        except RejectedError as error:
            sentence = f"the API server rejects the {word} of QLoRAJob {job.name}: {error}"
            raise _BlockedError(Reason("CellRejected", sentence)) from error
        return _parsed(changed, sweep)

    async def _create(self, sweep: QLoRASweep, cell: Cell) -> dict[str, CellJob]:
        """The cell's QLoRAJob. It may exist already, by a pass that was interrupted. Raises _BlockedError."""
        try:
            created = await self.cluster.create_cell(sweep.namespace, build_cell(sweep, cell))
            logger.info("created QLoRAJob %s", cell.name, extra={"key": (sweep.namespace, sweep.name)})
        except RejectedError as error:
            sentence = f"the API server rejects QLoRAJob {cell.name}: {error}"
            raise _BlockedError(Reason("CellRejected", sentence)) from error
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
        """Create the claim of all cells, if the template names none and it is not there yet. Raises _BlockedError."""
        template, name = sweep.spec.template.spec, sweep.claim_name
        if template.workspace.claim_name is not None:
            return
        try:
            manifest = build_sweep_claim(sweep, self.profiles[template.scheduling.profile])
            await self.cluster.create_claim(sweep.namespace, manifest)
            logger.info("created PersistentVolumeClaim %s", name, extra={"key": (sweep.namespace, sweep.name)})
        except RejectedError as error:
            sentence = f"the API server rejects PersistentVolumeClaim {name}: {error}"
            raise _BlockedError(Reason("ClaimRejected", sentence)) from error
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

    async def _write(self, sweep: QLoRASweep, status: QLoRASweepStatus) -> None:
        """Store the status if it differs from the stored one, and post an Event if the phase changes."""
        key = (sweep.namespace, sweep.name)
        if status == sweep.status:
            return
        await self.cluster.apply_sweep_status(sweep, status.dump())
        if event := sweep_event(sweep, status, self.clock()):
            logger.info("phase %s, was %s", status.phase, sweep.status.phase, extra={"key": key})
            await self._post(key, event)

    async def _post(self, key: Key, event: Object) -> None:
        try:
            await self.cluster.create_event(key[0], event)
        except AlreadyExistsError:
            logger.debug("this Event exists already", extra={"key": key})
        except ClusterError as error:
            logger.warning("an Event cannot be posted: %s", error, extra={"key": key})


def _parsed(body: Object, sweep: QLoRASweep) -> dict[str, CellJob]:
    """The cell by its name; nothing if the sweep does not control it."""
    found = parse_cell(body, sweep.uid)
    return {found.name: found} if found is not None else {}
