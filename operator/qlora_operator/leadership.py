"""Elects one of several operators by a Lease.

Only the leader works; another candidate takes over when it ends or is cut off.

No wall clock decides: a candidate waits until it has seen the Lease unchanged for the Lease's duration, and the leader
stops by its clock before that. Clocks of different nodes need not agree.

A request may take a sixth of the duration. While none takes longer, the leader stays: from the read of a free Lease to
its second renewal there are three requests and a pause, two thirds of the duration.
"""

import asyncio
import enum
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.errors import ClusterError, ConflictError

logger = logging.getLogger(__name__)

# Parts of the Lease's duration: after how long without a renewal the leader stops, how often it renews, the longest
# request that it waits for, and how often another candidate reads the Lease, which a leader that ends sets free.
_STOP_AFTER = 2 / 3
_RENEW_EVERY = 1 / 6
_LONGEST_REQUEST = 1 / 6
_TRY_EVERY = 1 / 30
_JITTER = 0.2
# Longer than the work needs to stop on request.
_STOPPING_SECONDS = 30.0
_MICRO_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


Work = Callable[[], Coroutine[Any, Any, None]]


class Leases(Protocol):
    """The API server's part in an election. All raise ClusterError."""

    async def get_lease(self, namespace: str, name: str) -> Object | None:
        """Return the Lease, or None if it does not exist."""
        ...

    async def create_lease(self, namespace: str, manifest: Object) -> Object:
        """Create it. Raises ConflictError if the name is taken."""
        ...

    async def replace_lease(self, namespace: str, name: str, manifest: Object) -> Object:
        """Replace it. Raises ConflictError if it has changed since `manifest` was read."""
        ...


class Step(enum.Enum):
    """A candidate's next step with the Lease."""

    CREATE = "create"
    TAKE = "take"
    RENEW = "renew"
    WAIT = "wait"


def decide(lease: Object | None, identity: str, unchanged: float, duration: float) -> Step:
    """Decide the next step of `identity`.

    `unchanged`: seconds since it has seen a change of this Lease. The duration that counts is the holder's
    promise; `duration` counts if the Lease has none.
    """
    if lease is None:
        return Step.CREATE
    spec = lease.get("spec") or {}
    holder = spec.get("holderIdentity")
    if holder == identity:
        return Step.RENEW
    if not holder or unchanged >= (spec.get("leaseDurationSeconds") or duration):
        return Step.TAKE
    return Step.WAIT


@dataclass(frozen=True)
class LeaseSettings:
    """Which Lease is competed for, and for how long it holds."""

    namespace: str
    name: str
    duration: int
    """Seconds."""


class Election:
    """One candidate: competes for the Lease, and runs the work while it holds it."""

    def __init__(
        self,
        leases: Leases,
        settings: LeaseSettings,
        identity: str,
        *,
        monotonic: Callable[[], float],
        clock: Callable[[], datetime],
        on_change: Callable[[bool], None] = lambda _leads: None,
    ) -> None:
        self._leases = leases
        self._settings = settings
        self._identity = identity
        self._now = monotonic
        self._clock = clock
        self._on_change = on_change
        self._version = ""
        self._changed_at = monotonic()
        self._renewed_at: float | None = None
        self._written: Object | None = None
        self._tried_at = monotonic()
        self._failing_since: float | None = None
        self._holder = ""

    @property
    def leads(self) -> bool:
        """Whether this operator is the one that works."""
        return self._renewed_at is not None

    async def run(self, work: Work) -> None:
        """Compete until canceled.

        `work` runs while this operator leads and is canceled before another may lead.
        """
        try:
            while True:
                await self._acquire()
                logger.info("this operator leads: it holds the Lease %s", self._settings.name)
                self._on_change(True)
                try:
                    await self._work(work)
                finally:
                    self._renewed_at = self._written = None
                    self._on_change(False)
                logger.warning("this operator leads no longer and has stopped its work: %s", self._loss())
        finally:
            await self._release()

    def problem(self) -> str | None:
        """Return why this candidate could not take over now, or None if it could."""
        if self._failing_since is None:
            return None
        return f"the Lease {self._settings.namespace}/{self._settings.name} cannot be read or written"

    def stuck(self) -> str | None:
        """Return why this process needs a restart, or None if it does not.

        It no longer competes, or works although it may no longer lead.
        """
        silence = self._now() - self._tried_at
        if silence > self._settings.duration + _STOPPING_SECONDS:
            return f"the Lease has not been tried for {silence:.0f} s"
        if (
            self._renewed_at is not None
            and self._now() - self._renewed_at > self._settings.duration + _STOPPING_SECONDS
        ):
            return "the Lease is lost and the work has not stopped"
        return None

    async def _acquire(self) -> None:
        while not await self._try():
            remaining = self._changed_at + self._settings.duration - self._now()
            pause = self._settings.duration * _TRY_EVERY * random.uniform(1, 1 + _JITTER)  # noqa: S311 - spreads load
            await asyncio.sleep(min(pause, remaining) if remaining > 0 else pause)

    async def _work(self, work: Work) -> None:
        working = asyncio.create_task(work())
        keeping = asyncio.create_task(self._keep())
        try:
            await asyncio.wait({working, keeping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, keeping):
                task.cancel()
            results = await asyncio.gather(working, keeping, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _keep(self) -> None:
        """Renew until another holds the Lease, or could soon take it."""
        while True:
            await asyncio.sleep(min(self._settings.duration * _RENEW_EVERY, max(0.0, self._left())))
            left = self._left()
            if left <= 0 or await self._try(left) is False:
                return

    def _left(self) -> float:
        """Seconds until the leader has to stop."""
        return (self._renewed_at or 0.0) + self._settings.duration * _STOP_AFTER - self._now()

    async def _try(self, limit: float | None = None) -> bool | None:
        """Read the Lease, write it if that helps, and return whether this operator leads.

        Returns None if unknown. `limit`: seconds until it gives up.
        """
        self._tried_at = self._now()
        try:
            async with asyncio.timeout(limit):
                leads = await self._renew() or await self._step()
        except ConflictError:
            # Another candidate has written the Lease in between: the next try reads it.
            return None
        except (ClusterError, TimeoutError) as error:
            self._fail(str(error) or "no answer in time")
            return None
        self._recover()
        return leads

    async def _renew(self) -> bool:
        """Write the Lease as last written, in one request.

        Returns whether it has not changed.
        """
        if self._written is None:
            return False
        asked_at = self._now()
        try:
            self._take(await self._replace(self._manifest(self._written, taken=False)), asked_at)
        except ConflictError:
            # Also if it was deleted.
            self._written = None
        return self._written is not None

    async def _step(self) -> bool:
        asked_at = self._now()
        settings = self._settings
        lease = await self._get()
        # It may have been renewed just before the answer: only from now on has it been seen unchanged.
        self._notice(lease, self._now())
        match decide(lease, self._identity, asked_at - self._changed_at, settings.duration):
            case Step.WAIT:
                return False
            case Step.CREATE:
                async with self._request():
                    written = await self._leases.create_lease(settings.namespace, self._manifest(None, taken=True))
            case step:
                written = await self._replace(self._manifest(lease, taken=step is Step.TAKE))
        self._take(written, asked_at)
        return True

    def _request(self) -> asyncio.Timeout:
        return asyncio.timeout(self._settings.duration * _LONGEST_REQUEST)

    async def _get(self) -> Object | None:
        async with self._request():
            return await self._leases.get_lease(self._settings.namespace, self._settings.name)

    async def _replace(self, manifest: Object) -> Object:
        async with self._request():
            return await self._leases.replace_lease(self._settings.namespace, self._settings.name, manifest)

    def _take(self, written: Object, asked_at: float) -> None:
        self._notice(written, asked_at)
        self._renewed_at, self._written = asked_at, written

    def _notice(self, lease: Object | None, now: float) -> None:
        version = lease["metadata"]["resourceVersion"] if lease else ""
        holder = ((lease or {}).get("spec") or {}).get("holderIdentity") or ""
        if version != self._version:
            self._version, self._changed_at = version, now
        if holder != self._holder:
            self._holder = holder
            if holder and holder != self._identity:
                logger.info("standing by: %s leads", holder)

    def _manifest(self, lease: Object | None, *, taken: bool) -> Object:
        now = self._clock().strftime(_MICRO_TIME)
        spec = dict((lease or {}).get("spec") or {})
        spec |= {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._settings.duration,
            "renewTime": now,
        }
        if taken:
            spec |= {"acquireTime": now, "leaseTransitions": (spec.get("leaseTransitions") or 0) + (lease is not None)}
        metadata = dict(lease["metadata"]) if lease else {"name": self._settings.name}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}

    async def _release(self) -> None:
        """Give the Lease up, so that another candidate need not wait until it has expired."""
        settings = self._settings
        try:
            lease = await self._get()
            if lease is None or decide(lease, self._identity, 0, settings.duration) is not Step.RENEW:
                return
            manifest = self._manifest(lease, taken=False)
            spec = {**manifest["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
            await self._replace({**manifest, "spec": spec})
        except (ClusterError, TimeoutError) as error:
            logger.warning("the Lease cannot be given up, it expires in %d s: %s", settings.duration, error)

    def _loss(self) -> str:
        if self._failing_since is None:
            return f"the Lease is held by {self._holder or 'nobody'}"
        return "the Lease could not be renewed in time"

    def _fail(self, error: str) -> None:
        if self._failing_since is None:
            self._failing_since = self._now()
            logger.warning("the Lease cannot be read or written, tried again: %s", error)

    def _recover(self) -> None:
        if self._failing_since is not None:
            logger.info("the Lease can be read and written again")
            self._failing_since = None
