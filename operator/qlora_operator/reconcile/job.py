"""Reconciles one job: read, decide by pure functions, act, write the status once.

A pass decides from what the watches have shown. A decision that cannot be undone is made once more from a live read.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property

from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.continued import is_at_rest, waits_for_other_job
from qlora_operator.decisions.events import (
    announcement_event,
    budget_event,
    phase_event,
    progress_event,
    tracking_event,
    unreadable_event,
)
from qlora_operator.decisions.manifests.objects import DNS_PORTS
from qlora_operator.decisions.observed.conditions import condition, is_finished
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Object, Observed, Pod, QLoRAJob, Reason
from qlora_operator.decisions.observed.parsing import controller_uid, parse_child
from qlora_operator.decisions.observed.shared_pod import SharedPod, waits_for_sweep
from qlora_operator.decisions.observed.stored_job import UnreadableJobError, parse_job
from qlora_operator.decisions.plan import (
    OTHER_JOB_INTERVAL,
    Plan,
    cannot_be_undone,
    creates_first_job,
    is_settled,
    plan,
)
from qlora_operator.decisions.pods.blockers import no_pod_at
from qlora_operator.decisions.pods.detached import (
    hides_a_pod,
    lacks_earlier_pod,
    misses_running_pod,
    with_detached_pods,
)
from qlora_operator.decisions.pods.kueue import queue_reason
from qlora_operator.decisions.profile_limit import held_back, limit_of_jobs
from qlora_operator.decisions.status import next_status
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import ClusterError, ConflictError, NotFoundError, RejectedError, UnavailableError
from qlora_operator.kube.listing import ChildView
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.actions import Actions
from qlora_operator.reconcile.events import post
from qlora_operator.reconcile.pauses import AtOnce, Blocked, Later, NextPass, Pauses, Postponed
from qlora_operator.reconcile.profile_limit import Starts
from qlora_operator.reconcile.progress import LogReading, ProgressReader
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.reconcile.shared_pods import SharedPods
from qlora_operator.watch.store import Store

logger = logging.getLogger(__name__)

# Part of server-side apply's message about it.
_UNKNOWN_FIELD = "field not declared in schema"


@dataclass(frozen=True)
class _View:
    """A job and its children: read live, or as the watches have shown them."""

    job: QLoRAJob
    observed: Observed
    live: bool
    fresh: bool


@dataclass(frozen=True)
class _Around:
    """The state that a pass has read in addition to the job and its children."""

    log: LogReading
    queue: Reason | None
    continued: QLoRAJob | None
    continued_writer: str
    shared: SharedPod | None


@dataclass(frozen=True)
class _Decision:
    facts: Facts
    status: QLoRAJobStatus
    plan: Plan
    held_back: Reason | None
    """Why the job waits for others of its profile, if nothing else blocks it."""


@dataclass(frozen=True)
class _Done:
    """The end of a pass."""

    seconds: float | None = None
    """Until the job is reconciled again; None if the next event is enough."""


@dataclass(frozen=True)
class Reconciler:
    """One pass over one job: all state that matters is in the API."""

    cluster: Cluster
    profiles: Mapping[str, Profile]
    progress: ProgressReader | None
    metrics: Metrics
    clock: Callable[[], datetime]
    starts: Starts
    store: Store = field(default_factory=Store)
    dns_ports: tuple[int, ...] = DNS_PORTS
    blocked: Pauses = field(default_factory=Pauses)
    announcements: Postponed = field(default_factory=Postponed)
    suspect_schema: Callable[[], None] = lambda: None
    """Called when the API server's schema lacks a field of the status."""

    @cached_property
    def _shared_pods(self) -> SharedPods:
        return SharedPods(self.cluster, self.store)

    async def reconcile(self, key: Key) -> float | None:
        """Return the seconds until the next pass, or None if the next event is enough.

        Raises RetryError.
        """
        with self.metrics.reconcile_duration.time():
            try:
                return await self._reconcile(key)
            except (ConflictError, NotFoundError) as error:
                self.store.distrust(key)
                raise RetryError(f"changed or deleted in the meantime: {error}") from error
            except ClusterError as error:
                # Perhaps it was still carried out.
                self.store.distrust(key)
                self.metrics.reconcile_errors.inc()
                if _UNKNOWN_FIELD in str(error):
                    self.suspect_schema()
                raise RetryError(str(error)) from error

    async def _reconcile(self, key: Key) -> float | None:
        view = await self._look(key)
        while view is not None:
            done = await self._counted_pass(key, view)
            if not isinstance(done, _View):
                return done.seconds
            view = done  # live, so that there is no third pass
        return None

    async def _counted_pass(self, key: Key, view: "_View") -> "_Done | _View":
        """Make a pass with a true count of the profile's jobs, if limited and needed."""
        limit = limit_of_jobs(view.job, self.profiles)
        if limit is None:
            return await self._pass(key, view, None)
        async with self.starts.count(view.job, limit) as others:
            return await self._pass(key, view, others)

    async def _pass(self, key: Key, view: "_View", others: int | None) -> "_Done | _View":
        """Decide, confirm, act and write, or return the job for another pass.

        `others`: number of the profile's jobs that have started; None if they were not counted.
        """
        shared = await self._shared_pods.read(view.job, live=view.live)
        log = await self.progress.read(key, view.job, view.observed, shared) if self.progress else LogReading()
        queue = await self._read_queue(view)
        around = _Around(log, queue, *await self._read_continued(view), shared)
        decision = self._decide(view, around, others or 0)
        if not view.live and _must_be_confirmed(view, decision):
            confirmed = await self._read(key)
            if confirmed is None:
                return _Done()
            if self._needs_another_count(confirmed.job, view.job, others):
                return confirmed
            shared = await self._shared_pods.read(confirmed.job, live=True)
            around = _Around(log, queue, *await self._read_continued(confirmed), shared)
            decision = self._decide(confirmed, around, others or 0)
        again = self.blocked.until(key, await self._carry_out(decision))
        return _Done(_soonest(again, log.again, self._follow_waiting(key, decision)))

    def _needs_another_count(self, confirmed: QLoRAJob, counted: QLoRAJob, others: int | None) -> bool:
        """Whether the current job needs a place that was not counted for the observed one."""
        if limit_of_jobs(confirmed, self.profiles) is None:
            return False
        return others is None or confirmed.spec.scheduling.profile != counted.spec.scheduling.profile

    def _follow_waiting(self, key: Key, decision: "_Decision") -> float | None:
        """Requeue the next waiting job after the write, if this one has ended.

        The same if it has started after it waited. Returns the seconds until the job itself is requeued: no event may
        wake the head of the queue.
        """
        job = decision.facts.job
        if decision.held_back is not None:
            return self.starts.wait(job)
        if self.starts.waits(key) or (is_finished(decision.status) and not is_finished(job.status)):
            self.starts.place_may_be_free(key)
        return None

    async def _look(self, key: Key) -> "_View | None":
        """Return the job from the store, else live.

        Returns None if there is nothing to do for it.
        """
        held = self.store.held(key)
        if held is None:
            return await self._read(key)
        job = await self._readable(key, held.body)
        if job is None:
            return None
        view = _View(job, with_detached_pods(job, held.observed), live=False, fresh=held.fresh)
        return None if self._is_settled(key, view) else view

    async def _read(self, key: Key) -> "_View | None":
        """Read the job with its children now, or None if there is nothing to do for it."""
        body = await self.cluster.get_qlora_job(*key)
        if body is None:
            self.store.gone(key)
            self._let_go(key)
            self.metrics.job_is_gone(key)
            return None
        job = await self._readable(key, body)
        if job is None:
            return None
        jobs = await self.cluster.list_jobs(job.namespace, job.name, job.uid)
        pods = await self.cluster.list_pods(job.namespace, job.uid)
        observed = await self._with_current_job(job, self.store.note_live_read(body, jobs, pods))
        observed = with_detached_pods(job, observed, await self._read_hidden_pods(job, observed))
        view = _View(job, observed, live=True, fresh=False)
        return None if self._is_settled(key, view) else view

    async def _with_current_job(self, job: QLoRAJob, observed: Observed) -> Observed:
        """Add the current step's Job if its label or owner was removed: it still runs.

        For a job under deletion, the Job must still have its owner: its Jobs may be left alone on purpose
        (`--cascade=orphan`), and nothing else shows that after the garbage collector has run.
        """
        step = job.status.step
        if step is None or not step.job_uid or observed.child(step.job_name) is not None:
            return observed
        try:
            body = await self.cluster.get_job(job.namespace, step.job_name)
        except NotFoundError:
            return observed
        if job.deleting and controller_uid(body) != job.uid:
            return observed
        found = parse_child(body)
        return replace(observed, children=(*observed.children, found)) if found.uid == step.job_uid else observed

    async def _read_hidden_pods(self, job: QLoRAJob, observed: Observed) -> list[Pod]:
        """Read pods of the current step without the label that watches select by.

        Others may be among them.
        """
        step, found = job.status.step, list[ChildView]()
        if step is None:
            return []
        missing = misses_running_pod(observed, step)
        if missing and step.running_pod_name:
            found += await self.cluster.list_pods_named(job.namespace, step.running_pod_name)
        if hides_a_pod(observed, step) or (missing and not step.running_pod_name):
            found += await self.cluster.list_pods_of_child(job.namespace, step.job_uid)
        # With the label it has only just been created: the watch is about to show it.
        return [replace(view.value, detached=view.job_uid != job.uid) for view in found if isinstance(view.value, Pod)]

    async def _readable(self, key: Key, body: Object) -> QLoRAJob | None:
        """Parse the job, or post an Event and return None if this version cannot read it.

        A job that leaves frees its place.
        """
        try:
            job = parse_job(body)
        except UnreadableJobError as error:
            logger.error("%s", error, extra={"key": key})  # noqa: TRY400 - the message names the fields
            await post(self.cluster, key, unreadable_event(dict(body), str(error), self.clock()))
            self._let_go(key)
            return None
        if job.deleting:
            self.starts.place_may_be_free(key)
        # Of an earlier one no watch may have shown the deletion.
        self.metrics.job_is_gone(key, replaced_by=job.uid)
        return job

    def _let_go(self, key: Key) -> None:
        """Nothing is done for the job any more, so that another one may have its place."""
        self.starts.place_may_be_free(key)
        self._forget(key)

    def _is_settled(self, key: Key, view: "_View") -> bool:
        settled = is_settled(view.job, view.observed)
        self.store.settle(key, settled)
        if settled:
            self._forget(key)
        return settled

    async def _read_queue(self, view: "_View") -> Reason | None:
        """Read why the current step's Job waits in a queue.

        Returns None without a known reason. Nothing else waits for it: without Kueue, the right to read Workloads or an
        answer, the status has less detail.
        """
        job = view.job
        child = view.observed.child(job.status.step.job_name) if job.status.step else None
        if child is None or not child.suspended or child.finished:
            return None
        try:
            workload = await self.cluster.find_workload(job.namespace, child.uid)
        except ClusterError as error:
            logger.debug("Workloads cannot be read: %s", error, extra={"key": (job.namespace, job.name)})
            return None
        return queue_reason(child, workload, condition(job.status, "Succeeded"))

    async def _read_continued(self, view: "_View") -> tuple[QLoRAJob | None, str]:
        """Read the job that spec.continues names, until that is settled, and its writer.

        The writer may still save a checkpoint of that job. Returns None if no job can be read.
        """
        job = view.job
        if not waits_for_other_job(job):
            return None, ""
        body = await self.cluster.get_qlora_job(job.namespace, str(job.spec.continues))
        try:
            other = None if body is None else parse_job(body)
        except UnreadableJobError as error:
            logger.warning("%s: %s", job.spec.continues, error, extra={"key": (job.namespace, job.name)})
            return None, ""
        return other, await self._shared_pods.read_writer(other) if other is not None and is_at_rest(other) else ""

    def _decide(self, view: "_View", around: "_Around", others: int) -> "_Decision":
        facts = Facts(
            job=view.job,
            observed=view.observed,
            profiles=self.profiles,
            now=self.clock(),
            progress=around.log.record,
            progress_beside=around.log.beside,
            log_read=around.log.done,
            queue=around.queue,
            continued=around.continued,
            continued_writer=around.continued_writer,
            shared=around.shared,
            jobs_of_profile=others,
        )
        status = next_status(facts)
        # A job counts once its status has its start, which a Job alone does not.
        counts_itself = limit_of_jobs(view.job, self.profiles) is not None
        again = OTHER_JOB_INTERVAL if waits_for_sweep(status, facts.shared) is not None else None
        planned = plan(view.job, status, view.observed, facts.now, counts_itself=counts_itself, sweep_again=again)
        return _Decision(facts, status, planned, held_back(facts))

    async def _carry_out(self, decision: "_Decision") -> NextPass:
        """Act and store the status."""
        facts, planned = decision.facts, decision.plan
        if planned.store_first:
            return AtOnce(changed=await self._write(facts, decision.status))
        actions = Actions(self.cluster, self.store, self.dns_ports, self.announcements)
        done = await actions.carry_out(facts, decision.status, planned.actions)
        if not done.blocked and any(creates_first_job(action) for action in planned.actions):
            # That Job has the resolved values. Other new jobs need theirs more urgently than this one its status.
            return AtOnce(changed=done.changed)
        await self._write(facts, done.status)
        moments = (moment for moment in (planned.look_again, done.look_again) if moment is not None)
        look_again = _soonest(*((moment - facts.now).total_seconds() for moment in moments))
        return Blocked(look_again) if done.blocked else Later(look_again)

    async def _write(self, facts: Facts, status: QLoRAJobStatus) -> bool:
        """Store the status if it differs, and post an Event if the phase changes.

        Returns whether the stored status has changed: the API server may have kept nothing of it.
        """
        job, key = facts.job, (facts.job.namespace, facts.job.name)
        if status == job.status or (content := status.dump()) == job.status.dump():
            return False
        try:
            written = await self.cluster.apply_status(job, content)
        except (RejectedError, UnavailableError):
            self.metrics.status_write_errors.inc()
            raise
        self.store.job_changed(written)
        self.metrics.status_writes.inc()
        self.metrics.gpu_seconds.note(job, status)
        self.metrics.show(written)
        self.metrics.transitions.written(job, status)
        if event := phase_event(job, status, facts.now):
            logger.info("phase %s, was %s", status.phase, job.status.phase, extra={"key": key})
            await post(self.cluster, key, event)
        if event := progress_event(job, status, facts.now) or budget_event(job, status, facts.now):
            logger.warning("%s", event["message"], extra={"key": key})
            await post(self.cluster, key, event)
        if event := tracking_event(job, status, facts.now) or announcement_event(job, status, facts.now):
            await post(self.cluster, key, event)
        return bool(written["metadata"]["resourceVersion"] != job.resource_version)

    def _forget(self, key: Key) -> None:
        self.blocked.end(key)
        self.announcements.end(key)
        if self.progress is not None:
            self.progress.forget(key)


def _must_be_confirmed(view: _View, decision: _Decision) -> bool:
    actions = decision.plan.actions
    if cannot_be_undone(view.job, decision.status, actions):
        return True
    if _hides_a_pod_for_long(view, decision.facts.now) or lacks_earlier_pod(view.job.status.step, view.observed):
        return True
    # Of a job whose creation a watch has shown, the store has every object.
    return not view.fresh and any(creates_first_job(action) for action in actions)


def _hides_a_pod_for_long(view: _View, now: datetime) -> bool:
    """Whether it hides a pod for longer than the watches of Jobs and pods may differ."""
    step = view.job.status.step
    child = view.observed.child(step.job_name) if step else None
    if step is None or child is None:
        return False
    return now >= no_pod_at(child) and hides_a_pod(view.observed, step)


def _soonest(*moments: float | None) -> float | None:
    return min((seconds for seconds in moments if seconds is not None), default=None)
