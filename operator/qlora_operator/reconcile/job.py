"""Reconciles one job: read, decide by pure functions, act, write the status once.

A pass decides from what the watches have shown. A decision that cannot be undone is made once more from a live read.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial

from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.announcing import Announced, announced
from qlora_operator.decisions.events import (
    announcement_event,
    budget_event,
    phase_event,
    progress_event,
    tracking_event,
    unreadable_event,
)
from qlora_operator.decisions.expiry import deletion_at
from qlora_operator.decisions.manifests.network import DEFAULT_DNS, Dns
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.holds import hold_of
from qlora_operator.decisions.observed.objects import Object, Observed, QLoRAJob, Reason
from qlora_operator.decisions.observed.parsing import is_managed_elsewhere
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
    with_detached_pods,
)
from qlora_operator.decisions.profile_limit import held_back, limit_of_jobs
from qlora_operator.decisions.profiles.ledger import is_to_be_settled
from qlora_operator.decisions.status import Decision, next_status
from qlora_operator.decisions.unstored import may_stay_unstored
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import ClusterError, ConflictError, NotFoundError, UnavailableError
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.accounts import Accounts
from qlora_operator.reconcile.actions import Actions
from qlora_operator.reconcile.counted import counted
from qlora_operator.reconcile.events import post
from qlora_operator.reconcile.live_reads import read_continued, read_hidden_pods, read_queue, with_current_job
from qlora_operator.reconcile.pauses import AtOnce, Blocked, Later, NextPass, Pauses, Postponed
from qlora_operator.reconcile.profile_limit import Starts
from qlora_operator.reconcile.progress import LogReading, ProgressReader
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.reconcile.revisions import Revisions
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
    run: "_Run | None" = None
    """As the unconfirmed pass has read it; None without one."""


@dataclass(frozen=True)
class _Run:
    """Reports of the pod's log and of the queue about the current step."""

    log: LogReading
    queue: Reason | None


@dataclass(frozen=True)
class _Decided:
    facts: Facts
    decision: Decision
    plan: Plan
    held_back: Reason | None
    """Why the job waits for others of its profile, if nothing else blocks it."""


@dataclass(frozen=True)
class _Done:
    """The end of a pass."""

    seconds: float | None = None
    """Until the job is reconciled again; None if the next event is enough."""


async def _leave_open(_namespace: str) -> None:
    """Create no NetworkPolicies."""


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
    dns: Dns = DEFAULT_DNS
    isolate: Callable[[str], Awaitable[None]] = _leave_open
    """Brings the NetworkPolicies of all jobs to a namespace, before a Job is created there."""
    blocked: Pauses = field(default_factory=Pauses)
    announcements: Postponed = field(default_factory=Postponed)
    accounts: Accounts = field(default_factory=Accounts)
    suspect_schema: Callable[[], None] = lambda: None
    """Called when the API server's schema lacks a field of the status."""
    _announced: dict[Key, Announced] = field(default_factory=dict)
    """The entries for servers, of jobs that may be deleted."""

    @cached_property
    def _actions(self) -> Actions:
        return Actions(self.cluster, self.store, self.dns, self.isolate, self.announcements)

    @cached_property
    def _revisions(self) -> Revisions:
        return Revisions(self.cluster, self.store)

    @cached_property
    def _shared_pods(self) -> SharedPods:
        return SharedPods(self.cluster, self.store)

    async def reconcile(self, key: Key) -> float | None:
        """Return the seconds until the next pass, or None if the next event is enough.

        Raises RetryError.
        """
        with self.metrics.work.jobs.duration.time():
            try:
                return await self._reconcile(key)
            except UnreadableJobError as error:
                logger.error("%s", error, extra={"key": key})  # noqa: TRY400 - the message names the fields
                await post(self.cluster, key, unreadable_event({"metadata": error.metadata}, str(error), self.clock()))
                self._let_go(key)
                return None
            except (ConflictError, NotFoundError) as error:
                self.store.distrust(key)
                raise RetryError(f"changed or deleted in the meantime: {error}") from error
            except ClusterError as error:
                # Perhaps it was still carried out.
                self.store.distrust(key)
                self.metrics.work.jobs.errors.inc()
                if _UNKNOWN_FIELD in str(error):
                    self.suspect_schema()
                if not isinstance(error, UnavailableError):
                    self.starts.pass_over(key)  # the API server rejects this job's write: others may succeed
                raise RetryError(str(error)) from error
            except Exception:
                self.starts.pass_over(key)
                raise

    async def _reconcile(self, key: Key) -> float | None:
        found = await self._look(key)
        while isinstance(found, _View):
            found = await self._counted_pass(key, found)  # live, so that there is no third pass
        return found.seconds

    async def _counted_pass(self, key: Key, view: "_View") -> "_Done | _View":
        """Make a pass with a true count of the profile's jobs, if limited and needed."""
        limit = limit_of_jobs(view.job, self.profiles)
        if limit is None:
            return await self._pass(key, view, 0)
        async with self.starts.count(view.job, limit) as others:
            return await self._pass(key, view, others)

    async def _pass(self, key: Key, view: "_View", others: int) -> "_Done | _View":
        """Decide, act and write, or return the job, read live, for the pass that confirms this one.

        `others`: number of the profile's jobs that have started.
        """
        shared = await self._shared_pods.read(view.job, live=view.live)
        run = view.run or await self._read_run(key, view, shared)
        facts = await self._read_facts(view, run, shared, others)
        decided = self._decide(facts)
        if not view.live and _must_be_confirmed(view, decided):
            confirmed = await self._read(key)
            return replace(confirmed, run=run) if isinstance(confirmed, _View) else confirmed
        again = self.blocked.until(key, await self._carry_out(decided))
        self.store.decided(key, view.observed)
        return _Done(_soonest(again, run.log.again, self._follow_waiting(key, decided)))

    def _follow_waiting(self, key: Key, decided: "_Decided") -> float | None:
        """Requeue the next waiting job after the write, if this one has ended.

        The same if it has started after it waited. Returns the seconds until the job itself is requeued: no event may
        wake the head of the queue.
        """
        if decided.held_back is not None:
            return self.starts.wait(decided.facts.job)
        if self.starts.waits(key) or decided.decision.ends:
            self.starts.place_may_be_free(key)
        return None

    async def _look(self, key: Key) -> "_View | _Done":
        """Return the job from the store, else live, unless there is nothing to do."""
        held = self.store.held(key)
        if held is None:
            return await self._read(key)
        job = await self._readable(key, held.body)
        if job is None:
            return _Done()
        view = _View(job, with_detached_pods(job, held.observed), live=False, fresh=held.fresh)
        found = await self._unless_settled(key, view)
        unnamed = isinstance(found, _View) and found.job.status.resolved is None
        if unnamed and (held.observed.children or job.adopts):
            # It has a revision that its status does not name, or is to adopt one, and only a list shows it.
            return await self._read(key)
        return found

    async def _read(self, key: Key) -> "_View | _Done":
        """Read the job with its children now, unless there is nothing to do for it."""
        body = await self.cluster.get_qlora_job(*key)
        if body is None:
            self.store.gone(key)
            self._let_go(key)
            self.metrics.job_is_gone(key)
            await self._follow_announcement(key, None)
            return _Done()
        job = await self._readable(key, body)
        if job is None:
            return _Done()
        jobs = await self.cluster.list_jobs(job.namespace, job.uid)
        pods = await self.cluster.list_pods(job.namespace, job.uid)
        observed = await with_current_job(self.cluster, job, self.store.note_live_read(body, jobs, pods))
        observed = with_detached_pods(job, observed, await read_hidden_pods(self.cluster, job, observed))
        return await self._unless_settled(key, _View(job, observed, live=True, fresh=False))

    async def _readable(self, key: Key, body: Object) -> QLoRAJob | None:
        """Parse the job, None for another controller's. Raises UnreadableJobError."""
        if is_managed_elsewhere(body):
            self._let_go(key)
            self.metrics.job_is_gone(key)
            await self._follow_announcement(key, None)
            self.store.settle(key, True)
            return None
        job = parse_job(body)
        job = replace(job, hold=hold_of(job, self.profiles, self.accounts.spent_seconds(job)))
        if job.deleting:
            self.starts.place_may_be_free(key)
        # Of an earlier one no watch may have shown the deletion.
        self.metrics.job_is_gone(key, replaced_by=job.uid)
        await self._follow_announcement(key, job)
        return job

    async def _follow_announcement(self, key: Key, job: QLoRAJob | None) -> None:
        """Note the job's entry for servers, and remove that of a job that is gone."""
        before = self._announced.get(key)
        if before is not None and (job is None or job.uid != before.uid):
            await self._actions.withdraw(key[0], before)
            del self._announced[key]
        if job is not None and (found := announced(job)) is not None:
            self._announced[key] = found

    def _let_go(self, key: Key) -> None:
        """Nothing is done for the job any more, so that another one may have its place."""
        self.starts.place_may_be_free(key)
        self._forget(key)

    async def _unless_settled(self, key: Key, view: "_View") -> "_View | _Done":
        """Return the view with the job's revision, unless the job has nothing to do before its deletion."""
        now, expires = self.clock(), deletion_at(view.job, view.job.status, self.profiles)
        is_noted = not is_to_be_settled(view.job, view.job.status, self.accounts.counted_seconds(view.job))
        settled = is_settled(view.job, view.observed) and is_noted and (expires is None or now < expires)
        settled = settled and not view.job.adopts
        self.store.settle(key, settled)
        if not settled:
            if view.job.deleting:
                return view  # it needs no revision
            fixed = await self._revisions.fixed(view.job, live=view.live, adopts=view.live)
            return replace(view, job=fixed)
        self._forget(key)
        return _Done(None if expires is None else (expires - now).total_seconds())

    async def _read_run(self, key: Key, view: "_View", shared: SharedPod | None) -> "_Run":
        log, enqueue = LogReading(), partial(self.starts.enqueue, key)
        if self.progress is not None:
            log = await self.progress.read(key, view.job, view.observed, enqueue, shared)
        return _Run(log, await read_queue(self.cluster, view.job, view.observed))

    async def _read_facts(self, view: "_View", run: "_Run", shared: SharedPod | None, others: int) -> Facts:
        continued, writer = await read_continued(self.cluster, self._shared_pods, self._revisions, view.job)
        return Facts(
            job=view.job,
            observed=view.observed,
            profiles=self.profiles,
            now=self.clock(),
            progress=run.log.record,
            progress_beside=run.log.beside,
            log_read=run.log.done,
            rest=run.log.rest,
            queue=run.queue,
            continued=continued,
            continued_writer=writer,
            shared=shared,
            no_gpu=self.accounts.no_gpu.get(view.job.spec.scheduling.profile_name),
            jobs_of_profile=others,
            counted_seconds=self.accounts.counted_seconds(view.job),
        )

    def _decide(self, facts: Facts) -> "_Decided":
        job, decision = facts.job, next_status(facts)
        # A job counts once its status has its start, which a Job alone does not.
        counts_itself = limit_of_jobs(job, self.profiles) is not None
        again = OTHER_JOB_INTERVAL if waits_for_sweep(decision.status, facts.shared) is not None else None
        planned = plan(
            job,
            decision,
            facts.observed,
            facts.now,
            counts_itself=counts_itself,
            sweep_again=again,
            expires=deletion_at(job, decision.status, facts.profiles),
        )
        return _Decided(facts, decision, planned, held_back(facts))

    async def _carry_out(self, decided: "_Decided") -> NextPass:
        """Act and store the status."""
        facts, planned, status = decided.facts, decided.plan, decided.decision.status
        if (rejected := await self._actions.fix(facts, status)) is not None:
            await self._write(facts, rejected)
            return Blocked()
        if planned.store_first:
            return AtOnce(changed=await self._write(facts, status))
        done = await self._actions.carry_out(facts, status, planned.actions)
        if not done.blocked and any(creates_first_job(action) for action in planned.actions):
            # What they have fixed is in their revision. Other new jobs need theirs more urgently than this its status.
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
        if may_stay_unstored(job.status, status, facts.now, facts.rest):
            self.metrics.jobs.show_unstored(job, content)
            return False
        written = await counted(self.cluster.apply_status(job, content), self.metrics.work.jobs)
        self.store.job_changed(written)
        self.metrics.gpu_seconds.note(job, status)
        self.metrics.show(written)
        self.metrics.transitions.written(job, status, written["metadata"].get("creationTimestamp"))
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


def _must_be_confirmed(view: _View, decided: _Decided) -> bool:
    actions = decided.plan.actions
    if cannot_be_undone(decided.decision, actions):
        return True
    if _hides_a_pod_for_long(view, decided.facts.now) or lacks_earlier_pod(view.job.status.step, view.observed):
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
