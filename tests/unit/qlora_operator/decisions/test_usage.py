"""GPU seconds: the share of each train pod, the causes of lost seconds, and each second counts once."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.contract import ExitCode, ProgressRecord
from qlora_api.status import QLoRAJobStatus
from qlora_api.usage import PodUsage, UsageStatus
from qlora_operator.decisions.observed.conditions import is_finished
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.members import GroupFacts, member_of
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.plan import is_settled, plan
from qlora_operator.decisions.usage.budget import budget_at, enforce_budget
from qlora_operator.decisions.usage.usage import count_usage
from qlora_operator.metrics.metrics import Metrics
from tests.support import grouped
from tests.support.builders import (
    NAME,
    PROFILE,
    after,
    child,
    deleted,
    ended,
    facts,
    follow,
    make_job,
    node,
    pod,
    progress,
    resolved,
    result,
    running,
    seen,
    status_in,
    time,
)

SPEC: dict[str, Any] = {"resources": {"gpus": 2}}


def scheduled(body: dict[str, Any], at: float) -> dict[str, Any]:
    """The pod, with a node since then."""
    known = {"type": "PodScheduled", "status": "True", "lastTransitionTime": time(at)}
    return body | {"status": body["status"] | {"conditions": [known]}}


def train_pod(number: int = 1, *, at: float = -100, attempt: int = 1) -> dict[str, Any]:
    """A pod of the train Job that got its node then."""
    return scheduled(pod("train", attempt, number), at)


def usage_of(status: QLoRAJobStatus) -> UsageStatus:
    assert status.usage is not None
    return status.usage


def lost(status: QLoRAJobStatus) -> dict[str, int]:
    """The causes of lost seconds."""
    return {cause: seconds for cause, seconds in usage_of(status).lost_gpu_seconds if seconds}


def saved(at: float, **more: Any) -> dict[str, Any]:
    """The fields of a progress record of a run that trains since -80 and has a checkpoint of that time."""
    return {
        "training_step": 5,
        "total_steps": 20,
        "training_since": time(-80),
        "checkpoint_step": 4,
        "checkpoint_time": time(at),
        **more,
    }


def watched(stored: QLoRAJobStatus | None = None, **spec: Any) -> QLoRAJobStatus:
    """A job whose pod has a node since -100, trains since -80 and has saved a checkpoint at -30; seen at NOW."""
    job = make_job(stored or status_in("train"), **(SPEC | spec))
    return follow(job, child("train"), running(train_pod(), since=-90), progress=progress(**saved(-30)), log_read=True)


def then(stored: QLoRAJobStatus, *bodies: Any, at: float = 0, **spec: Any) -> QLoRAJobStatus:
    return follow(make_job(stored, **(SPEC | spec)), *bodies, now=after(at))


def test_a_pod_counts_from_its_node_to_its_end_times_its_gpus() -> None:
    stored = watched()
    assert (usage_of(stored).gpu_seconds, usage_of(stored).gpu_hours) == (200, "0.06")
    assert lost(stored) == {"startup": 40}
    body = train_pod()
    done = ended(body, 0, result(body, "train", training_step=20, total_steps=20, loss=1.0), start=-90, end=50)
    status = then(stored, child("train", Complete="Done"), done, at=70)
    assert status.step is not None
    assert status.step.name == "publish"
    assert (usage_of(status).gpu_seconds, lost(status)) == (300, {"startup": 40})


def test_passing_time_causes_no_write() -> None:
    stored = watched()
    same = child("train"), running(train_pod(), since=-90)
    assert then(stored, *same, at=299) == stored
    newer = progress(**saved(-30), time=time(60))
    status = follow(make_job(stored, **SPEC), *same, progress=newer, log_read=True, now=after(60))
    assert usage_of(status).gpu_seconds == 320


def test_time_without_reports_is_counted_every_five_minutes() -> None:
    """Without reports of progress, all of it would be lost with a pod that vanishes but the last quarter of an hour."""
    same = child("train"), running(train_pod(), since=-90)
    stored, writes = follow(make_job(status_in("train"), **SPEC), *same), 0
    assert plan(make_job(stored, **SPEC), stored, seen(*same), after(0)).look_again == after(300)
    for at in range(60, 36_001, 60):
        before, stored = stored, then(stored, *same, at=at)
        writes += stored != before
    assert writes == 120
    assert usage_of(stored).gpu_seconds == 2 * 36_100
    gone = then(stored, child("train"), at=36_010)
    assert usage_of(gone).gpu_seconds == 2 * 36_110


def test_a_deleted_leader_causes_no_repeated_writes() -> None:
    leader, own = leader_with_pod(), grouped.job("prepared", NAME, grouped.FOLLOWER)
    group = GroupFacts((member_of(leader) or pytest.fail("it is in a group"),))
    status = count_usage(own.status, facts(own, group=group), until_now=True)
    bodies = child("train"), running(train_pod(), since=-90)
    status = count_usage(status, facts(replace(own, status=status), *bodies, now=after(400)))
    later = count_usage(status, facts(replace(own, status=status), *bodies, now=after(401)))
    assert later == status


def test_without_gpus_in_the_profile_nothing_is_counted() -> None:
    cpu = PROFILE.model_copy(update={"gpu_resource": None})
    assert watched(status_in("train", resolved=resolved(cpu).dump())).usage is None


def interrupted(code: int = 143, **record: Any) -> dict[str, Any]:
    body = train_pod()
    return ended(body, code, result(body, "train", code, **record), start=-90, end=20)


def evicted(body: dict[str, Any]) -> dict[str, Any]:
    known = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
    conditions = [*body["status"]["conditions"], known]
    return body | {"status": body["status"] | {"phase": "Failed", "reason": "Evicted", "conditions": conditions}}


@pytest.mark.parametrize(
    ("bodies", "spec", "expected"),
    [
        # Killed: its work since the checkpoint at -30 is lost, 50 seconds on 2 GPUs.
        ([child("train"), deleted(ended(train_pod(), 137, start=-90, end=20), 10)], {}, {"disruption": 100}),
        ([child("train"), ended(train_pod(), 203, start=-90, end=20)], {}, {"failure": 100}),
        # Asked to stop, it saved a checkpoint.
        ([child("train"), deleted(interrupted(training_step=6), 10)], {}, {}),
        ([deleted(interrupted(training_step=6), 10)], {"suspend": True}, {}),
        ([deleted(ended(train_pod(), 137, start=-90, end=20), 10)], {"suspend": True}, {"suspension": 100}),
        # The kubelet evicts it, and does not report when the trainer has ended.
        ([child("train"), evicted(train_pod())], {}, {"disruption": 100}),
        # It vanishes with its node: it was last heard of at 0.
        ([child("train")], {}, {"disruption": 100}),
    ],
)
def test_time_in_no_checkpoint_is_lost_to_the_cause_of_the_pods_end(
    bodies: list[Any], spec: dict[str, Any], expected: dict[str, int]
) -> None:
    stored = watched()
    status = then(stored, *bodies, at=20, **spec)
    assert lost(status) == {"startup": 40} | expected
    # A repeated pass, also by an operator that has just started, changes nothing.
    again = follow(make_job(QLoRAJobStatus.model_validate(status.dump()), **(SPEC | spec)), *bodies, now=after(500))
    assert again.usage == status.usage


@pytest.mark.parametrize(
    "last",
    [
        ended(train_pod(), 137, start=-90, end=20),
        # It was asked to stop while it loaded, with a checkpoint of an earlier pod.
        ended(train_pod(), 143, result(train_pod(), "train", 143, training_step=4), start=-90, end=20),
    ],
)
def test_a_pod_that_never_trained_is_lost_as_a_whole(last: dict[str, Any]) -> None:
    before = status_in("train", checkpoint={"step": 4, "savedAt": time(-200)})
    stored = follow(make_job(before, **SPEC), child("train"), running(train_pod(), since=-90))
    status = then(stored, child("train"), deleted(last, 10), at=20)
    assert lost(status) == {"disruption": 240}


def test_a_node_whose_peers_never_come_has_only_started() -> None:
    nodes: dict[str, Any] = {"resources": {"nodes": 2}}
    waited = ended(scheduled(node(0), -100), int(ExitCode.PEERS_MISSING), start=-90, end=0)
    status = follow(make_job(status_in("train"), **nodes), child("train", Failed="BackoffLimitExceeded"), waited)
    assert lost(status) == {"startup": 100}


def test_a_pod_that_vanishes_without_an_operator_is_not_charged_for_days() -> None:
    status = then(watched(), child("train"), at=86_400)
    assert usage_of(status).gpu_seconds == 200 + 2 * 900


def created(body: dict[str, Any], at: float) -> dict[str, Any]:
    return body | {"metadata": body["metadata"] | {"creationTimestamp": time(at)}}


def brief(number: int, at: float) -> dict[str, Any]:
    """A train pod that runs for a second."""
    return created(ended(train_pod(number, at=at), 0, start=at, end=at + 1), at)


def test_many_foreign_pods_hide_none_and_do_not_fill_the_status() -> None:
    """One that waits for ever, hundreds that run for a second, and then the train pods: each of these counts."""
    waits, job = created(pod("train", 1, 1), -1000), child("train", created=-1100)
    many = [brief(number, -1000 + number) for number in range(2, 202)]
    status = then(status_in("train"), job, waits, *many)
    expected = 200
    for number in range(202, 292):
        at = 10.0 * number
        body = created(train_pod(number, at=at), at)
        status = then(status, job, waits, *many, running(body, since=at), at=at + 1)
        many.append(ended(body, 137, start=at, end=at + 7))
        status = QLoRAJobStatus.model_validate(then(status, job, waits, *many, at=at + 8).dump())
        expected += 7
        assert usage_of(status).gpu_seconds == 2 * expected
        assert len(usage_of(status).pods) <= 10
    assert then(status, job, waits, *many, at=9000) == status


def test_a_pod_that_waits_for_its_image_while_hundreds_end_counts_from_its_node() -> None:
    first, job = created(train_pod(1, at=-30), -100), child("train", created=-120)
    many = [brief(number, -60) for number in range(2, 400)]
    status = then(status_in("train"), job, first, *many)
    status = then(status, job, running(first, since=50), *many, at=60)
    done = child("train", created=-120, Complete="Done")
    status = then(status, done, ended(first, 0, start=50, end=70), *many, at=90)
    assert usage_of(status).gpu_seconds == 2 * (398 + 100)


def test_a_member_counts_its_leaders_pod_after_many_later_ones() -> None:
    leader, own = grouped.job("training", "alpha", grouped.ALL), grouped.job("prepared", NAME, grouped.FOLLOWER)
    late = PodUsage(name="alpha-train-1-x", uid="late", created=time(-900), since=time(10), jobs=3)
    numbers: dict[str, Any] = {"jobs": 3, "seconds": 3, "end": "failure"}
    many = [
        PodUsage(name=f"alpha-train-1-{n}", uid=str(n), created=time(n), since=time(n), **numbers)
        for n in range(-800, 0, 40)
    ]
    status = own.status
    for at, pods in [
        (0, tuple(many)),
        (310, (*many[-8:], late.model_copy(update={"seconds": 300}))),
        (320, (late.model_copy(update={"seconds": 306, "end": "completed"}),)),
        (330, (late.model_copy(update={"seconds": 306, "end": "completed"}),)),
    ]:
        leader = replace(leader, status=leader.status.model_copy(update={"usage": UsageStatus(pods=pods)}))
        group = GroupFacts((member_of(leader) or pytest.fail("it is in a group"),))
        status = count_usage(status, facts(replace(own, status=status), group=group, now=after(at)))
    assert usage_of(status).gpu_seconds == 20 + 102


def test_a_pod_that_waits_for_its_node_is_not_displaced_by_many_that_end() -> None:
    """Entries are dropped after a while, and pods created before then count as counted: this one is not yet."""
    first = created(pod("train", 1, 1), -100)
    many = [
        created(ended(train_pod(number, at=-60 + number), 0, start=-60 + number, end=-59 + number), -60 + number)
        for number in range(2, 400)
    ]
    job = child("train", created=-120)
    status = then(status_in("train"), job, first, *many, at=390)
    assert len(usage_of(status).pods) <= 16
    status = then(status, job, running(scheduled(first, 400), since=410), *many, at=420)
    assert [entry.uid for entry in usage_of(status).pods if entry.end is None] == [first["metadata"]["uid"]]
    assert len(usage_of(status).pods) <= 16


def test_a_second_of_a_pod_that_vanishes_and_is_seen_again_is_lost_once() -> None:
    same = child("train"), running(train_pod(), since=-90)
    stored = follow(make_job(status_in("train"), **SPEC), *same)
    gone = then(stored, child("train"), at=20)
    assert lost(gone) == {"disruption": 240}
    record = progress(training_step=1, total_steps=20, training_since=time(30), time=time(40))
    status = follow(make_job(gone, **SPEC), *same, progress=record, log_read=True, now=after(40))
    assert usage_of(status).gpu_seconds == 280
    assert usage_of(status).lost_gpu_seconds.total <= 280


def test_several_nodes_count_each() -> None:
    nodes: dict[str, Any] = {"resources": {"gpus": 2, "nodes": 2}}
    pods = [running(scheduled(node(0), -100), since=-90), running(scheduled(node(1), -60), since=-50)]
    stored = follow(
        make_job(status_in("train"), **nodes), child("train"), *pods, progress=progress(**saved(-30)), log_read=True
    )
    assert usage_of(stored).gpu_seconds == 2 * (100 + 60)
    # Node 0 reports for both; node 1 got its GPUs after that, so it had nothing to start.
    assert lost(stored) == {"startup": 2 * 20}


def test_foreign_pods_do_not_count() -> None:
    stranger = running(train_pod(7), since=-90)
    owner = stranger["metadata"]["ownerReferences"][0] | {"uid": "made-up"}
    stranger = stranger | {"metadata": stranger["metadata"] | {"ownerReferences": [owner]}}
    status = follow(make_job(status_in("train"), **SPEC), child("train"), stranger)
    assert status.usage is None


def test_a_status_has_room_for_all_pods_with_the_jobs_labels() -> None:
    crowd = [running(train_pod(number), since=-90) for number in range(400)]
    status = follow(make_job(status_in("train"), **SPEC), child("train"), *crowd)
    later = [ended(train_pod(number), 203, start=-90, end=20) for number in range(400)]
    for at in (30, 40, 50):
        status = QLoRAJobStatus.model_validate(then(status, child("train"), *later, at=at).dump())
    assert len(usage_of(status).pods) <= 256


def test_a_failed_job_counts_its_pod_until_that_has_stopped() -> None:
    job = {"activeDeadlineSeconds": 60} | SPEC
    stored = then(watched(), child("train"), running(train_pod(), since=-90), **job)
    assert stored.phase == "Failed"
    stopping = deleted(running(train_pod(), since=-90), 0)
    assert not is_settled(make_job(stored, **job), seen(stopping))
    stopped = deleted(interrupted(training_step=6), 0)
    status = then(stored, stopped, at=30, **job)
    assert usage_of(status).gpu_seconds == 240
    assert is_settled(make_job(status, **job), seen(stopped))


def test_a_failed_job_counts_its_pod_although_its_end_was_not_seen() -> None:
    job = {"activeDeadlineSeconds": 60} | SPEC
    stored = then(watched(), child("train"), running(train_pod(), since=-90), **job)
    assert not is_settled(make_job(stored, **job), seen())
    status = then(stored, at=30, **job)
    assert [entry.end for entry in usage_of(status).pods] == ["suspension"]
    assert is_settled(make_job(status, **job), seen())


def leader_with_pod() -> QLoRAJob:
    """A job whose pod trains three jobs, has a node since -100 and is counted until NOW."""
    leader = grouped.job("training", "alpha", grouped.ALL)
    pods = grouped.alphas(child("train")), grouped.alphas(running(train_pod(), since=-90))
    counted = count_usage(leader.status, facts(leader, *pods), until_now=True)
    return replace(leader, status=counted)


def test_jobs_that_one_pod_trains_share_its_time() -> None:
    leader = leader_with_pod()
    assert usage_of(leader.status).gpu_seconds == 33
    own = grouped.job("prepared", NAME, grouped.FOLLOWER)
    group = GroupFacts((member_of(leader) or pytest.fail("it is in a group"),))
    status = count_usage(own.status, facts(own, group=group), until_now=True)
    assert usage_of(status).gpu_seconds == 33
    # Once that pod has ended it is known for good, and its leader may be gone.
    pods = grouped.alphas(child("train")), grouped.alphas(ended(train_pod(), 203, start=-90, end=20))
    leader = replace(leader, status=count_usage(leader.status, facts(leader, *pods, now=after(30))))
    group = GroupFacts((member_of(leader) or pytest.fail("it is in a group"),))
    status = count_usage(status, facts(own, group=group, now=after(40)))
    assert (usage_of(status).gpu_seconds, lost(status)) == (40, {"failure": 40})
    assert count_usage(status, facts(own, group=GroupFacts(), now=after(900))) == status


class Group:
    """Three jobs that the pod of `alpha` trains, which has a node since -100."""

    def __init__(self, **spec: Any) -> None:
        followers = {name: grouped.job("prepared", name, grouped.FOLLOWER, **spec) for name in (NAME, "zulu")}
        self.jobs = {"alpha": grouped.job("training", "alpha", grouped.ALL, **spec)} | followers
        self.counted = dict.fromkeys(self.jobs, 0)
        """GPU seconds, also of those that are deleted."""

    def facts(self, name: str, at: float, pod: dict[str, Any], report: ProgressRecord | None = None) -> Facts:
        others = (member_of(job) for other, job in self.jobs.items() if other != name)
        group = GroupFacts(tuple(other for other in others if other is not None))
        bodies = grouped.alphas(child("train")), grouped.alphas(pod)
        own = bodies if name == "alpha" else ()
        return facts(self.jobs[name], *own, group=group, now=after(at), progress=report if own else None)

    def count(
        self, name: str, at: float, pod: dict[str, Any] | None = None, report: ProgressRecord | None = None
    ) -> None:
        """A pass over the job, if it exists; the pod runs unless given."""
        if name not in self.jobs:
            return  # deleted
        found = self.facts(name, at, pod or running(train_pod(), since=-90), report)
        job = self.jobs[name]
        # The next pass has only the stored state.
        status = QLoRAJobStatus.model_validate(count_usage(job.status, found, until_now=True).dump())
        self.jobs[name], usage = replace(job, status=status), status.usage or UsageStatus()
        assert self.counted.get(name, 0) <= usage.gpu_seconds
        assert usage.lost_gpu_seconds.total <= usage.gpu_seconds
        self.counted[name] = usage.gpu_seconds

    def count_all(self, at: float, pod: dict[str, Any] | None = None) -> None:
        for name in list(self.jobs):
            self.count(name, at, pod)

    def not_copied(self, name: str) -> int:
        """Seconds of the pod that the job has not counted yet, in part."""
        entries, own = self._entries("alpha"), sum(entry.seconds for entry in self._entries(name))
        uid = self.jobs[name].uid
        until = (part.after_seconds for entry in entries for part in entry.taken_over or () if part.uid == uid)
        return next(until, sum(entry.seconds for entry in entries)) - own

    def _entries(self, name: str) -> tuple[PodUsage, ...]:
        usage = self.jobs[name].status.usage
        return usage.pods if usage is not None else ()

    def end(self, name: str) -> None:
        """Let it fail, as it does by a deadline that a user has set."""
        failed = grouped.job("failed", name, grouped.FOLLOWER).status
        self.retry(name, failed)

    def retry(self, name: str, as_status: QLoRAJobStatus | None = None) -> None:
        """Give it the status of one that waits for its leader again, or that one, with its usage."""
        status = as_status or grouped.job("prepared", name, grouped.FOLLOWER).status
        kept = {"usage": self.jobs[name].status.usage}
        self.jobs[name] = replace(self.jobs[name], status=status.model_copy(update=kept))


def test_the_leader_gets_the_shares_of_deleted_members() -> None:
    group = Group()
    del group.jobs[NAME], group.jobs["zulu"]
    group.count("alpha", 3600)
    assert group.counted["alpha"] == 3700


def test_a_member_deleted_during_the_run_keeps_its_counted_time() -> None:
    group = Group()
    group.count_all(200)
    del group.jobs[NAME]
    group.count_all(500)
    assert group.counted == {"alpha": 100 + 200, NAME: 100, "zulu": 200}
    # Of the same name, but not the job that the pod trains.
    group.jobs["again"] = replace(grouped.job("prepared", NAME), uid="another")
    group.count_all(800)
    assert group.counted == {"alpha": 300 + 200, NAME: 100, "zulu": 300, "again": 0}
    # With a finalizer it may stay for long, and counts nothing.
    group.jobs["zulu"] = replace(group.jobs["zulu"], deleting=True)
    group.count("alpha", 1100)
    assert group.counted["alpha"] == 500 + 300


def test_a_member_that_ends_and_is_retried_counts_no_second_twice() -> None:
    group = Group()
    group.count_all(200)
    group.end(NAME)
    group.count("alpha", 500)
    group.retry(NAME)
    group.count_all(800)
    assert group.counted == {"alpha": 100 + 400, NAME: 100, "zulu": 300}
    group.count_all(830, ended(train_pod(), 203, start=-90, end=800))
    group.count_all(840, ended(train_pod(), 203, start=-90, end=800))
    assert group.counted == {"alpha": 500, NAME: 100, "zulu": 300}
    losses = [lost(job.status) for job in group.jobs.values()]
    assert losses == [{"failure": 500}, {"failure": 100}, {"failure": 300}]


def test_the_limit_of_gpu_hours_includes_shares_of_deleted_members() -> None:
    group, limit = Group(), 1000 / 3600
    for name, job in group.jobs.items():
        fixed = job.status.resolved or pytest.fail("it has started")
        limited = job.status.model_copy(update={"resolved": fixed.model_copy(update={"gpu_hours": limit})})
        group.jobs[name] = replace(job, status=limited)
    pod = running(train_pod(), since=-90)
    group.count_all(200)
    del group.jobs[NAME], group.jobs["zulu"]
    group.count("alpha", 500)
    leader = group.jobs["alpha"]
    assert group.counted["alpha"] == 100 + 300
    observed = group.facts("alpha", 500, pod).observed
    # All of its time: 600 seconds are left, and not three times as many.
    assert budget_at(leader, leader.status, observed, after(500)) == after(1100)
    assert budget_at(leader, leader.status, observed, after(700)) == after(1100)
    assert not is_finished(enforce_budget(leader.status, group.facts("alpha", 1099, pod)))
    assert is_finished(enforce_budget(leader.status, group.facts("alpha", 1100, pod)))
    # Also if it was not counted since they were deleted.
    fresh = Group()
    fresh.jobs = {"alpha": replace(leader, status=leader.status.model_copy(update={"usage": None}))}
    assert is_finished(enforce_budget(fresh.jobs["alpha"].status, fresh.facts("alpha", 900, pod)))


def test_an_entry_of_an_earlier_release_stays_as_it_is() -> None:
    group = Group()
    group.count_all(200)
    assert all("takenOver" not in str(job.status.dump()) for job in group.jobs.values())


def test_copies_of_other_members_do_not_block_a_job() -> None:
    """Their statuses list the copied pods, where the leader and the other followers see them too."""
    group = Group()
    for at in (10, 400, 800):
        group.count_all(at)
        assert list(group.counted.values()) == [(100 + at) // 3] * 3


def test_the_counters_get_the_increase_of_each_write() -> None:
    metrics, before, after_it = Metrics(), watched(), then(watched(), child("train"), at=20)
    metrics.gpu_seconds.note(make_job(status_in("train"), **SPEC), before)
    metrics.gpu_seconds.note(make_job(before, **SPEC), after_it)
    page = metrics.page()[0].decode()
    of = 'namespace="team",profile="default"'
    assert f"qlora_gpu_seconds_total{{{of}}} 240.0" in page
    assert f'qlora_gpu_lost_seconds_total{{cause="disruption",{of}}} 100.0' in page
    assert f'qlora_gpu_lost_seconds_total{{cause="startup",{of}}} 40.0' in page


def test_a_follower_copies_each_pod_of_its_leader_once() -> None:
    """Also pods that the leader still lists, but not the follower, which has trained by itself since."""

    def entry(name: str, number: int, at: float, jobs: int) -> PodUsage:
        began = time(at + number)
        uid = f"uid-{name}-{number}"
        numbers: dict[str, Any] = {"jobs": jobs, "seconds": 90, "end": "disruption"}
        return PodUsage(name=f"{name}-train-1-{number}", uid=uid, created=began, since=began, **numbers)

    leader = grouped.job("training", "alpha", grouped.ALL)
    led = UsageStatus(gpu_seconds=150, pods=tuple(entry("alpha", number, -9000, 3) for number in range(5)))
    leader = replace(leader, status=leader.status.model_copy(update={"usage": led}))
    group = GroupFacts((member_of(leader) or pytest.fail("it is in a group"),))
    own = grouped.job("prepared", NAME, grouped.FOLLOWER)
    alone = UsageStatus(gpu_seconds=630, pods=tuple(entry(NAME, number, -3000, 1) for number in range(7)))
    status = own.status.model_copy(update={"usage": alone})
    for _ in range(4):
        status = count_usage(status, facts(replace(own, status=status), group=group))
        assert usage_of(status).gpu_seconds == 630 + 5 * 30


_MOMENTS = st.integers(0, 400)
_LIVES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 60), st.sampled_from([0, 137, 143, 203])), min_size=1, max_size=12
)
"""Pods one after the other: seconds until each has its node, seconds that it runs, and its exit code."""


_NEWS = st.none() | st.integers(0, 60)
"""For how many seconds the newest pod has trained by its report; None without one."""


def trains_since(body: dict[str, Any], since: float, now: float) -> ProgressRecord:
    """The pod's report then."""
    uid = body["metadata"]["uid"]
    return progress(pod_uid=uid, training_step=3, total_steps=9, training_since=time(since), time=time(now))


def as_at(lives: list[tuple[int, int, int]], moment: int) -> list[dict[str, Any]]:
    """The pods at that moment, including ended ones."""
    bodies, created = [], 0
    for number, (waits, runs, code) in enumerate(lives, 1):
        start, end = created + waits, created + waits + runs
        if created > moment:
            break
        body = pod("train", 1, number)
        body = body | {"metadata": body["metadata"] | {"creationTimestamp": time(created)}}
        if moment >= start:
            body = scheduled(body, start)
            body = ended(body, code, start=start, end=end) if moment >= end else running(body, since=start)
        bodies.append(body)
        created = end + 1
    return bodies


@settings(max_examples=60, deadline=None)
@given(lives=_LIVES, looks=st.lists(st.tuples(_MOMENTS, st.integers(0, 2**12 - 1), _NEWS), max_size=12))
def test_usage_never_decreases_and_never_counts_twice(
    lives: list[tuple[int, int, int]], looks: list[tuple[int, int, int | None]]
) -> None:
    """Any order of observations, with pods missing: watches show changes late, or lose them."""
    whole = sum(runs for _, runs, _ in lives)
    status, highest = status_in("train"), 0
    for moment, shown, news in looks:
        bodies = [body for number, body in enumerate(as_at(lives, moment)) if shown >> number & 1]
        report = None if news is None or not bodies else trains_since(bodies[-1], moment - news, moment)
        found = facts(make_job(status), child("train", created=-900), *bodies, now=after(moment), progress=report)
        status = QLoRAJobStatus.model_validate(count_usage(status, found, until_now=news is not None).dump())
        usage = status.usage or UsageStatus()
        # A pod that is not seen ending is taken to have run until then, or until the next one was created.
        assert highest <= usage.gpu_seconds <= whole + 400
        assert usage.lost_gpu_seconds.total <= usage.gpu_seconds
        assert len(usage.pods) <= 14
        assert all(entry.startup_seconds + entry.lost_seconds <= entry.seconds for entry in usage.pods)
        highest = usage.gpu_seconds


@settings(max_examples=25, deadline=None)
@given(looks=st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.booleans()), min_size=15, max_size=30))
def test_a_member_counts_each_pod_once_under_any_leader(looks: list[tuple[int, bool, bool]]) -> None:
    """Pods of the leader and of the job come one after the other, and each lists its latest only."""
    own, whole = grouped.job("prepared", NAME, grouped.FOLLOWER), 0
    led, alone = list[PodUsage](), list[dict[str, Any]]()
    status = own.status
    for moment, (runs, leads, news) in enumerate(looks):
        start = moment * 50
        if leads:
            name = f"alpha-train-1-{moment}"
            numbers: dict[str, Any] = {"jobs": 3, "seconds": 3 * runs, "end": "disruption"}
            led = [
                *led[-8:],
                PodUsage(name=name, uid=name, created=time(start), since=time(start), **numbers),
            ]
        else:
            body = created(scheduled(pod("train", 1, moment), start), start)
            alone.append(ended(body, 203, start=start, end=start + runs))
        whole += runs
        leader = grouped.job("training", "alpha", grouped.ALL)
        usage = UsageStatus(pods=tuple(led))
        leader = replace(leader, status=leader.status.model_copy(update={"usage": usage}))
        group = GroupFacts((member_of(leader) or pytest.fail("it is in a group"),))
        bodies = [child("train", created=-900), *alone]
        found = facts(replace(own, status=status), *bodies, group=group, now=after(start + 45))
        status = count_usage(status, found, until_now=news)
        assert (status.usage or UsageStatus()).gpu_seconds == whole


_EVENTS = st.lists(
    st.tuples(
        st.integers(1, 400),
        st.sampled_from(["delete", "end", "retry", "nothing"]),
        st.sampled_from([NAME, "zulu"]),
        st.lists(st.sampled_from(["alpha", NAME, "zulu"]), max_size=4),
    ),
    max_size=10,
)
"""Seconds that pass, what happens to whom then, and whose passes follow."""


@settings(max_examples=120, deadline=None)
@given(events=_EVENTS, trains=st.none() | st.integers(-99, 999), code=st.sampled_from([137, 203]))
def test_the_time_of_a_groups_pod_counts_once_after_any_deletion(
    events: list[tuple[int, str, str, list[str]]], trains: int | None, code: int
) -> None:
    """All of it, except the leader's counted time that a deleted job had not yet copied."""
    group, now, lags = Group(), 0, dict[str, int]()
    for passed, event, whom, passes in events:
        now += passed
        if event == "delete" and whom in group.jobs:
            lags[whom] = group.not_copied(whom)
            del group.jobs[whom]
        elif event == "end" and whom in group.jobs:
            group.end(whom)
        elif event == "retry" and whom in group.jobs:
            group.retry(whom)
        report = trains_since(grouped.alphas(train_pod()), trains, now) if trains is not None and trains < now else None
        for name in passes:
            if name in group.jobs and not is_finished(group.jobs[name].status):
                group.count(name, now, report=report)
        assert sum(group.counted.values()) <= 100 + now
    for whom in list(group.jobs):
        if is_finished(group.jobs[whom].status):
            group.retry(whom)
    for _ in range(2):
        group.count_all(now + 20, ended(train_pod(), code, start=-90, end=now + 10))
    whole = 3 * (100 + now + 10) - sum(lags.values())
    assert whole - 3 * 3 < 3 * sum(group.counted.values()) <= whole
    # No checkpoint has any of it.
    for usage in (usage_of(job.status) for job in group.jobs.values()):
        assert usage.gpu_seconds - 2 <= usage.lost_gpu_seconds.total <= usage.gpu_seconds


@settings(max_examples=60, deadline=None)
@given(lives=_LIVES, moments=st.lists(_MOMENTS, max_size=10), news=st.booleans())
def test_in_the_end_each_pod_has_counted_once(
    lives: list[tuple[int, int, int]], moments: list[int], news: bool
) -> None:
    status = status_in("train")
    for moment in [*moments, 10_000, 10_001]:
        found = facts(make_job(status), child("train", created=-900), *as_at(lives, moment), now=after(moment))
        status = count_usage(status, found, until_now=news)
    found = facts(make_job(status), child("train", Complete="Done"), *as_at(lives, 10_000), now=after(10_000))
    status = count_usage(status, found)
    assert usage_of(status).gpu_seconds == sum(runs for _, runs, _ in lives)


@settings(max_examples=60, deadline=None)
@given(
    lives=st.lists(st.tuples(_MOMENTS, st.integers(0, 300), st.integers(1, 60)), min_size=12, max_size=40),
    moments=st.lists(st.integers(0, 800), max_size=10).map(sorted),
)
def test_pods_that_wait_and_run_at_the_same_time_count_once_each(
    lives: list[tuple[int, int, int]], moments: list[int]
) -> None:
    """Each is created at any moment, waits for its node, and runs: more end than are listed before others begin."""

    def at(moment: int) -> list[dict[str, Any]]:
        bodies = []
        for number, (made, waits, runs) in enumerate(lives):
            if made > moment:
                continue
            body, start, end = created(pod("train", 1, number), made), made + waits, made + waits + runs
            if moment >= start:
                body = scheduled(body, start)
                body = ended(body, 137, start=start, end=end) if moment >= end else running(body, since=start)
            bodies.append(body)
        return bodies

    status, job = status_in("train"), child("train", created=-900)
    for moment in [*moments, 10_000, 10_001]:
        found = facts(make_job(status), job, *at(moment), now=after(moment))
        status = QLoRAJobStatus.model_validate(count_usage(status, found).dump())
    assert usage_of(status).gpu_seconds == sum(runs for *_, runs in lives)
    assert len(usage_of(status).pods) <= 9
