"""Reads the other jobs of a job's group, and lets the jobs of one group join it one after the other."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from qlora_operator.decisions.groups.group import left_of_train, lingering, trains_now
from qlora_operator.decisions.observed.conditions import is_finished
from qlora_operator.decisions.observed.members import GroupFacts, Member, fitting_members, member_of
from qlora_operator.decisions.observed.objects import ChildJob, Observed, Pod, QLoRAJob, collect
from qlora_operator.decisions.observed.stored_job import UnreadableJobError, parse_job
from qlora_operator.decisions.retry import is_to_be_taken_up
from qlora_operator.kube.client import Cluster
from qlora_operator.watch.store import Store

logger = logging.getLogger(__name__)

_Group = tuple[str, str]
"""Namespace and name."""


@dataclass
class Groups:
    """The groups of jobs that are trained together.

    Who leads a group is decided from all of its jobs and stored in one of them. In between, no other job of the group
    is decided about: as there is one operator, a job is never trained by two others.
    """

    cluster: Cluster
    store: Store
    _locks: WeakValueDictionary[_Group, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    """While somebody uses them."""

    @asynccontextmanager
    async def joining(self, job: QLoRAJob) -> AsyncIterator[None]:
        """In the body, no other job of its group is about to join it, if the job may be."""
        group = job.spec.group
        if group is None or not _takes_part(job) or job.status.group is not None:
            yield
            return
        lock = self._locks.setdefault((job.namespace, group.name), asyncio.Lock())
        async with lock:
            yield

    async def read(self, job: QLoRAJob, *, live: bool) -> GroupFacts | None:
        """The others: as the watches have shown them or, with `live`, as those are now that matter for the job."""
        if job.spec.group is None or not _takes_part(job):
            return None
        shown = [each for each in self.store.groups.of(job.namespace, job.spec.group.name) if each.uid != job.uid]
        if not live:
            return GroupFacts(tuple(shown))
        asked_for = _that_matter(job, shown)
        bodies = await self._read_all(job.namespace, (member.name for member in asked_for))
        members = (member_of(body) for body in bodies if body.uid != job.uid)
        others = [
            *(member for member in members if member is not None),
            *(each for each in shown if each not in asked_for),
        ]
        led = tuple(body for body in bodies if trains_now(job, body))
        return GroupFacts(tuple(others), led, await self._lingering(job, bodies))

    async def read_writer(self, job: QLoRAJob) -> str:
        """A pod or Job, the job's own or its leader's, that may still save a checkpoint of it; empty for none.

        Neither the end of a job nor its suspension waits for such a pod: it may have a minute to save, or train others.
        """
        own = left_of_train(job.name, await self._children(job.namespace, job.name, job.uid))
        joined = job.status.group
        if own or joined is None:
            return own
        led = await self._lingering(job, await self._read_all(job.namespace, [joined.leader]))
        return f"{led} of QLoRAJob {joined.leader}" if led else ""

    async def _read_all(self, namespace: str, names: Iterable[str]) -> list[QLoRAJob]:
        """The jobs as they are now, in the order of their names, without those that are gone or cannot be read."""
        bodies = []
        for name in sorted(names):
            body = await self.cluster.get_qlora_job(namespace, name)
            try:
                bodies += [] if body is None else [parse_job(body)]
            except UnreadableJobError as error:
                logger.warning("%s: %s", name, error, extra={"key": (namespace, name)})
        return bodies

    async def _lingering(self, job: QLoRAJob, bodies: Iterable[QLoRAJob]) -> str:
        """What is left of the train Jobs in which the job's leader has trained it; empty for nothing."""
        joined = job.status.group
        if joined is None or joined.leader_uid == job.uid:
            return ""
        leader = next((body for body in bodies if body.uid == joined.leader_uid), None)
        return lingering(job, leader, await self._children(job.namespace, joined.leader, joined.leader_uid))

    async def _children(self, namespace: str, name: str, uid: str) -> Observed:
        """Jobs and pods of the job of that name and UID, as they are now."""
        pods = await self.cluster.list_pods(namespace, uid)
        # Afterwards: a Job that has not ended may have made a pod in between.
        jobs = await self.cluster.list_jobs(namespace, name, uid)
        return collect(
            (view.value for view in jobs.items if isinstance(view.value, ChildJob)),
            (view.value for view in pods.items if isinstance(view.value, Pod)),
        )


def _takes_part(job: QLoRAJob) -> bool:
    """Whether the others must be known before anything is decided about the job."""
    ended = is_finished(job.status) and job.status.group is not None
    return not job.deleting and (not ended or is_to_be_taken_up(job))


def _that_matter(job: QLoRAJob, shown: list[Member]) -> list[Member]:
    """Those of the group by which it is decided now what becomes of the job."""
    joined, own = job.status.group, member_of(job)
    if joined is None and own is not None:
        leaders = [member for member in shown if own.uid in member.leads]
        # Some of them may be suspended, or gone, by now.
        return leaders or [each for each in fitting_members(own, shown)[: 2 * own.size] if each.uid != own.uid]
    members = {member.uid for member in (joined.members or ())} if joined is not None else set[str]()
    return [member for member in shown if member.uid in members or (joined and member.uid == joined.leader_uid)]
