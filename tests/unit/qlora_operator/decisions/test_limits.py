"""Limits of a job: time without progress, pods that vanish, and waiting that counts for nothing."""

from typing import Any

import pytest

from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.events import progress_event
from qlora_operator.decisions.plan import DeleteJob
from tests.support.builders import (
    NAME,
    NOW,
    after,
    child,
    condition,
    conditions_of,
    deleted,
    ended,
    failed,
    follow,
    make_job,
    message_of,
    plan_of,
    pod,
    present,
    progress,
    reason_of,
    running,
    seen,
    status_in,
    step_status,
    time,
)

RUNNING = (child("train"), running(pod("train"), since=-60))


def watched(**spec: Any) -> QLoRAJobStatus:
    """The status of a job whose train pod runs and has reported progress at NOW."""
    job = make_job(status_in("train"), **spec)
    return follow(make_job(follow(job, *RUNNING), **spec), *RUNNING, progress=progress(training_step=3), log_read=True)


def look(stored: QLoRAJobStatus, seconds: float, /, *bodies: Any, **more: Any) -> QLoRAJobStatus:
    fields = {key: more.pop(key) for key in ("progress", "log_read") if key in more}
    return follow(make_job(stored, **more), *(bodies or RUNNING), now=after(seconds), **fields)


def test_no_progress_for_too_long_is_a_condition_and_one_event() -> None:
    stored = watched()
    assert conditions_of(stored)["Progressing"] == "True"
    assert conditions_of(look(stored, 3599, log_read=True))["Progressing"] == "True"

    status = look(stored, 3600, log_read=True)

    assert (conditions_of(status)["Progressing"], status.phase) == ("False", "Training")
    assert reason_of(status, "Progressing") == "ProgressDeadlineExceeded"
    assert "no progress for 1h" in message_of(status, "Progressing")
    event = present(progress_event(make_job(stored), status, after(3600)))
    assert (event["type"], event["reason"]) == ("Warning", "ProgressDeadlineExceeded")
    # Nothing changes while it runs, whether the log is read or not, and no message is repeated.
    for log_read in (True, False):
        again = look(status, 7200, log_read=log_read)
        assert again.model_copy(update={"usage": status.usage}) == status
    assert progress_event(make_job(status), look(status, 7200, log_read=True), after(7200)) is None


def test_the_job_sets_the_limit_and_any_new_record_is_progress() -> None:
    limit: dict[str, Any] = {"progressDeadlineSeconds": 120}
    stored = watched(**limit)
    assert conditions_of(look(stored, 120, log_read=True, **limit))["Progressing"] == "False"
    later = look(stored, 100, log_read=True, progress=progress(training_step=3, time=time(99)), **limit)
    assert conditions_of(look(later, 219, log_read=True, **limit))["Progressing"] == "True"
    assert conditions_of(look(later, 220, log_read=True, **limit))["Progressing"] == "False"


def test_an_unreadable_log_is_not_a_lack_of_progress() -> None:
    assert conditions_of(look(watched(), 99_999, log_read=False))["Progressing"] == "True"


def test_a_trainers_clock_does_not_matter() -> None:
    ahead = look(watched(), 10, log_read=True, progress=progress(training_step=4, time=time(7200)))
    assert conditions_of(look(ahead, 3609, log_read=True))["Progressing"] == "True"
    assert conditions_of(look(ahead, 3610, log_read=True))["Progressing"] == "False"


def test_resumed_progress_makes_the_condition_true_again() -> None:
    stalled = look(watched(), 3600, log_read=True)
    status = look(stalled, 3700, log_read=True, progress=progress(training_step=4, time=time(3650)))
    assert conditions_of(status)["Progressing"] == "True"


def test_a_requested_restart_counts_as_a_failure() -> None:
    spec: dict[str, Any] = {"retry": {"onNoProgress": "restart", "maxFailures": 1}}
    stored = watched(**spec)

    status = look(stored, 3600, log_read=True, **spec)

    assert status.step is not None
    assert (status.step.job_name, status.step.failures, status.failures) == (f"{NAME}-train-2", 1, 1)
    assert present(status.last_failure).reason == "ProgressDeadlineExceeded"
    assert status.active_seconds == 3660
    # Why is stored before the Job is deleted: a kill in between would hide that it was a failure.
    assert plan_of(make_job(stored, **spec), status, seen(*RUNNING), after(3600)).actions == ()
    actions = plan_of(make_job(status, **spec), status, seen(*RUNNING), after(3600)).actions
    assert actions == (DeleteJob(f"{NAME}-train-1", f"uid-{NAME}-train-1"),)
    # It is restarted as often as it may fail.
    again = status.model_copy(
        update={"step": status.step.model_copy(update={"job_uid": f"uid-{NAME}-train-2"}), "active_until": time()}
    )
    second = (child("train", 2), running(pod("train", 2), since=0))
    again = look(again, 10, *second, log_read=True, **spec)
    status = look(again, 4000, *second, log_read=True, **spec)
    assert (status.phase, reason_of(status)) == ("Failed", "ProgressDeadlineExceeded")


def test_a_suspended_job_without_progress_has_not_failed() -> None:
    spec: dict[str, Any] = {"retry": {"onNoProgress": "restart"}, "suspend": True}
    status = look(watched(), 3600, log_read=True, **spec)
    assert (status.failures, conditions_of(status)["Progressing"]) == (0, "True")


def test_a_pod_that_a_drain_stops_is_interrupted_and_not_without_progress() -> None:
    spec: dict[str, Any] = {"retry": {"onNoProgress": "restart", "maxFailures": 0}}
    drained = running(pod("train"), since=-60)
    drained["status"]["conditions"] = [condition("DisruptionTarget", "True", reason="EvictionByEvictionAPI")]
    status = look(watched(**spec), 3600, child("train"), deleted(drained, 3590), log_read=True, **spec)
    assert (status.phase, status.failures, status.disruptions) == ("Training", 0, 1)


def test_a_deleted_job_is_not_replaced_before_its_pods_count() -> None:
    stored = watched(activeDeadlineSeconds=100)
    # The Job is deleted, its pod is not yet marked.
    status = look(stored, 30, RUNNING[1], activeDeadlineSeconds=100)
    assert status.step == stored.step
    assert look(stored, 41, RUNNING[1], activeDeadlineSeconds=100).phase == "Failed"
    status = look(stored, 30, deleted(RUNNING[1], 30), activeDeadlineSeconds=100)
    assert (present(status.step).attempt, status.active_seconds) == (2, 90)


@pytest.mark.parametrize(("bodies", "disruptions"), [((), 0), ((child("train"),), 1)], ids=["with its Job", "alone"])
def test_a_vanished_pod_counts_for_its_running_time(bodies: tuple[Any, ...], disruptions: int) -> None:
    stored = watched()
    job = make_job(stored)
    status = follow(job, *bodies, now=after(40))
    assert (status.active_seconds, status.disruptions) == (100, disruptions)
    assert follow(make_job(status), *bodies, now=after(90)).active_seconds == 100


def test_an_operator_that_was_away_for_days_charges_a_vanished_pod_for_minutes() -> None:
    three_days = 3 * 86400
    status = follow(make_job(watched()), now=after(three_days))
    assert status.active_seconds == 60 + 15 * 60
    successor = pod("train", number=2)
    successor["metadata"]["creationTimestamp"] = time(30)
    status = follow(make_job(watched()), child("train"), successor, now=after(three_days))
    assert (status.active_seconds, status.disruptions) == (90, 1)
    assert follow(make_job(watched()), child("train", Complete=""), now=after(30)).disruptions == 0


def test_a_counted_pod_is_not_counted_again_after_its_deletion() -> None:
    killed = ended(pod("train"), 143, end=10)
    stored = look(watched(), 20, child("train"), killed)
    rejected = pod("train", number=2, phase="Failed", reason="OutOfcpu")
    stored = look(stored, 30, child("train"), killed, rejected)
    assert (stored.disruptions, stored.active_seconds) == (1, 70)
    status = look(stored, 40, child("train"), rejected)
    assert (status.disruptions, status.active_seconds) == (1, 70)


def test_publish_may_be_silent_for_long() -> None:
    bodies = (child("publish"), running(pod("publish"), since=-60))
    spec: dict[str, Any] = {"retry": {"onNoProgress": "restart"}}
    stored = follow(make_job(status_in("publish"), **spec), *bodies)
    status = look(stored, 99_999, *bodies, log_read=True, **spec)
    assert (conditions_of(status)["Progressing"], status.failures) == ("True", 0)


def test_failures_outlive_their_job_and_a_raised_limit_applies_immediately() -> None:
    own = failed("train", 203, "InternalError", "no luck")
    stored = look(watched(), 10, child("train"), own)
    assert present(stored.step).failures == 1
    gone = follow(make_job(stored), now=after(20))
    assert gone.step is not None
    assert (gone.step.job_name, gone.step.failures) == (f"{NAME}-train-2", 1)
    ended_job = child("train", Failed="BackoffLimitExceeded")
    ended_job["spec"] = {"backoffLimit": 0}
    assert look(watched(), 10, ended_job, own, retry={"maxFailures": 0}).phase == "Failed"
    status = look(watched(), 10, ended_job, own, retry={"maxFailures": 5})
    assert status.step is not None
    assert (status.phase, status.step.job_name, status.step.failures) == ("Queued", f"{NAME}-train-2", 1)


def test_the_pause_after_rejected_pods_grows() -> None:
    job = make_job(status_in("train", step=step_status("train", 9, jobUid="").dump()))
    rejected = [pod("train", 8, number=n, phase="Failed", reason="OutOfcpu") for n in range(1, 5)]
    for count, pause in ((1, 60), (3, 240)):
        bodies = rejected[:count]
        moment = -600 + count + pause
        assert plan_of(job, follow(job, *bodies, now=after(moment - 1)), seen(*bodies), after(moment - 1)).actions == ()
        assert plan_of(job, follow(job, *bodies, now=after(moment)), seen(*bodies), after(moment)).actions


def test_a_retry_after_a_rejected_pod_waits_and_keeps_its_attempts() -> None:
    failure = failed("train", 14, "Diverged", "the loss is not finite", number=2)
    bodies = [child("train", Failed="PodFailurePolicy"), pod("train", phase="Failed", reason="OutOfcpu"), failure]
    stored = follow(make_job(status_in("train")), *bodies, now=after(-590))
    assert stored.phase == "Failed"
    job = make_job(stored, retry={"request": "a"})
    for moment, reason, created in ((-540, "PodRejected", 0), (-539, "Queued", 1)):
        status = follow(job, *bodies, now=after(moment))
        assert reason_of(status) == reason
        assert len(plan_of(job, status, seen(*bodies), after(moment)).actions) == created


def test_a_deadline_is_not_evaded_by_deleting_pods_by_force() -> None:
    running_on = look(watched(), 41, activeDeadlineSeconds=100)
    assert (running_on.phase, running_on.active_seconds) == ("Failed", 101)
    status = follow(make_job(watched(), activeDeadlineSeconds=100), now=after(41))
    assert (status.phase, reason_of(status)) == ("Failed", "DeadlineExceeded")


@pytest.mark.parametrize("started", [False, True], ids=["waiting", "running"])
def test_a_job_ended_by_its_deadline_is_followed_by_another_and_costs_no_retry(started: bool) -> None:
    stored = watched() if started else status_in("train")
    stopped = [deleted(running(pod("train"), since=-60), 0)] if started else []
    expiring = child("train", FailureTarget="DeadlineExceeded")
    stored = look(stored, 10, expiring, *stopped)
    assert (stored.step and stored.step.attempt, stored.disruptions) == (1, 0)
    over = [ended(body, 143, start=-60, end=5) for body in stopped]
    status = look(stored, 20, child("train", Failed="DeadlineExceeded"), *over)
    assert (status.step and status.step.job_name, status.phase) == (f"{NAME}-train-2", "Queued")
    assert (status.disruptions, status.failures, status.active_seconds) == (0, 0, 65 if started else 0)


def test_a_suspension_by_a_queue_is_no_disruption() -> None:
    suspended = child("train")
    suspended["spec"] = {"suspend": True}
    stopped = deleted(RUNNING[1], 0)
    status = look(watched(), 1, suspended, stopped)
    assert (status.disruptions, status.phase, reason_of(status)) == (0, "Queued", "WaitingForQueue")
    # Nor is one that the operator sees only after the queue has resumed the Job.
    resumed = child("train")
    resumed["status"] = {"startTime": time(20), "conditions": [{"type": "Suspended", "status": "False"}]}
    assert look(watched(), 30, resumed, ended(pod("train"), 143, end=10)).disruptions == 0
    never = child("train")
    never["status"] = {"startTime": time(20)}
    assert look(watched(), 30, never, ended(pod("train"), 143, end=10)).disruptions == 1


def test_a_pod_older_than_its_resumed_jobs_start_can_be_preempted() -> None:
    resumed = child("train")
    resumed["status"] = {"startTime": time(-30), "conditions": [{"type": "Suspended", "status": "False"}]}
    fresh = pod("train")
    fresh["metadata"]["creationTimestamp"] = time(-31)
    assert look(watched(), 10, resumed, ended(fresh, 143, start=-20, end=5)).disruptions == 1
    # One that was asked to stop before, and saved until after the resumption, was stopped by the queue.
    assert look(watched(), 10, resumed, deleted(ended(fresh, 143, end=5), -30)).disruptions == 0


def test_a_job_that_a_queue_holds_has_no_pod_and_no_failure() -> None:
    suspended = child("prepare", created=-600)
    suspended["spec"] = {"suspend": True}
    status = follow(make_job(status_in("prepare")), suspended)
    assert (status.phase, reason_of(status)) == ("Queued", "WaitingForQueue")
    # The minute before the report of a missing pod begins when the Job is resumed.
    resumed = child("prepare", created=-600)
    resumed["status"] = {"startTime": time(), "conditions": [{"type": "Suspended", "status": "False"}]}
    for seconds, reason in ((59, "Preparing"), (60, "NoPod")):
        assert reason_of(follow(make_job(status_in("prepare")), resumed, now=after(seconds))) == reason
    assert plan_of(make_job(status_in("prepare")), status, seen(resumed), NOW).look_again == after(60)


def test_late_objects_are_named_and_cost_no_retry() -> None:
    body = pod("prepare")
    body["spec"] = {
        "volumes": [
            {"name": "token", "secret": {"secretName": "hub", "items": [{"key": "read", "path": "token"}]}},
            {"name": "rows", "configMap": {"name": "rows"}},
            {"name": "output", "projected": {"sources": [{"secret": {"name": "write", "optional": True}}]}},
        ]
    }
    body["status"] |= {
        "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": time()}],
        "containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "ContainerCreating"}}}],
    }
    job = make_job(status_in("prepare"))
    assert reason_of(follow(job, child("prepare"), body, now=after(119))) == "Preparing"

    status = follow(job, child("prepare"), body, now=after(120))

    assert (reason_of(status), status.failures) == ("WaitingForVolumes", 0)
    assert "Secret 'hub' with read, ConfigMap 'rows'" in message_of(status)
    assert "write" not in message_of(status)
    assert plan_of(job, status, seen(child("prepare"), body), NOW).look_again == after(120)


def test_an_eviction_caused_by_the_pod_is_a_failure_with_the_kubelets_message() -> None:
    sentence = 'Usage of EmptyDir volume "tmp" exceeds the limit "4Gi".'
    body = ended(pod("train"), 143)
    body["status"] |= {"reason": "Evicted", "message": sentence}

    status = look(watched(), 30, child("train"), body)

    assert (status.failures, status.disruptions) == (1, 0)
    assert status.last_failure is not None
    assert (status.last_failure.reason, sentence in status.last_failure.message) == ("Evicted", True)
    # Its Job ignores exit code 143 without a limit.
    status = look(watched(), 30, child("train"), body, retry={"maxFailures": 0})
    assert (status.phase, reason_of(status)) == ("Failed", "Evicted")
