"""Messages of a job that a queue holds, with sentences recorded from Kueue."""

from typing import Any

import pytest

from qlora_api.status import Condition, QLoRAJobStatus, StepName
from qlora_operator.decisions.events import phase_event
from qlora_operator.decisions.observed.objects import Object, Reason
from qlora_operator.decisions.observed.parsing import observe
from qlora_operator.decisions.plan import DeleteJob
from qlora_operator.decisions.pods.kueue import queue_reason
from tests.support.builders import (
    NOW,
    UID,
    after,
    child,
    condition,
    deleted,
    ended,
    follow,
    make_job,
    message_of,
    plan_of,
    pod,
    reason_of,
    resolved,
    running,
    seen,
    status_in,
    time,
)

MULTIKUEUE = "kueue.x-k8s.io/multikueue"
NO_QUOTA = (
    "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor any, 1 more needed"
)
NEVER = (
    "couldn't assign flavors to pod set main: insufficient quota for nvidia.com/gpu in flavor any, previously "
    "considered podsets requests (0) + current podset request (1) > maximum capacity (0)"
)
PREEMPTED = (
    "Preempted to accommodate a workload (UID: 1, JobUID: 2) due to prioritization in the ClusterQueue; preemptor "
    "path: /one; preemptee path: /one"
)
RESERVED = "Quota reserved in ClusterQueue one"


def workload(**conditions: tuple[str, str]) -> Object:
    """A Workload; keywords are conditions with value and message."""
    found = [{"type": kind, "status": value, "message": text} for kind, (value, text) in conditions.items()]
    return {"spec": {"queueName": "gpus"}, "status": {"conditions": found}}


def held() -> dict[str, Any]:
    """A Job whose `suspend` is true."""
    return child("train", Suspended="JobSuspended") | {"spec": {"suspend": True}}


def said(workload: Object | None = None, shown: str | None = None, reason: str = "WaitingForQueue") -> str:
    """The message of the job, given the one `shown` until now."""
    (job,) = observe(UID, [held()], []).children
    before = condition("Succeeded", "Unknown", reason=reason) | {"message": shown}
    found = queue_reason(job, workload, Condition.model_validate(before) if shown is not None else None)
    assert found.word == "WaitingForQueue"
    return found.sentence


@pytest.mark.parametrize(
    ("conditions", "sentence"),
    [
        ({"QuotaReserved": ("False", NO_QUOTA)}, f"Kueue: {NO_QUOTA}"),
        ({"QuotaReserved": ("False", "LocalQueue nosuch doesn't exist")}, "Kueue: LocalQueue nosuch doesn't exist"),
        ({"QuotaReserved": ("False", NO_QUOTA), "Evicted": ("True", PREEMPTED)}, f"Kueue: {PREEMPTED}"),
        (
            {"QuotaReserved": ("False", NO_QUOTA), "Evicted": ("False", f"Previously: {PREEMPTED}")},
            f"Kueue: {NO_QUOTA}",
        ),
        ({"QuotaReserved": ("True", RESERVED)}, f"Kueue: {RESERVED}; the queue's admission checks have not ended"),
        ({"QuotaReserved": ("True", RESERVED), "Admitted": ("True", "")}, "Kueue has admitted the job"),
        ({}, "Kueue has not admitted the job yet: equal jobs may wait before it"),
    ],
)
def test_a_held_job_has_the_message_of_its_workload(conditions: dict[str, tuple[str, str]], sentence: str) -> None:
    assert said(workload(**conditions)) == sentence


def test_a_step_without_a_queue_reports_the_missing_local_queue() -> None:
    stray = {"status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": "LocalQueue  doesn't"}]}}
    assert "add a LocalQueue named default to the namespace, then delete Job tune-train-1" in said(stray)


def test_a_job_without_a_workload_reports_the_missing_workload() -> None:
    assert "has no Workload: Kueue must run" in said()


def test_alternating_messages_leave_the_status_unchanged_and_others_do_not() -> None:
    pending = f"{NO_QUOTA}. Pending the preemption of 1 workload(s)"
    others = (
        pending,
        "Workload no longer fits after processing another workload",
        NO_QUOTA.replace("1 more", "3 more"),
    )
    for sentence in others:
        assert said(workload(QuotaReserved=("False", sentence)), shown=f"Kueue: {NO_QUOTA}") == f"Kueue: {NO_QUOTA}"
    for sentence in (NEVER, "ClusterQueue one is inactive"):
        assert said(workload(QuotaReserved=("False", sentence)), shown=f"Kueue: {NO_QUOTA}") == f"Kueue: {sentence}"
        assert said(workload(QuotaReserved=("False", NO_QUOTA)), shown=f"Kueue: {sentence}") == f"Kueue: {NO_QUOTA}"
    # A message of another reason is not kept.
    assert said(workload(QuotaReserved=("False", NO_QUOTA)), shown=pending, reason="Queued") == f"Kueue: {NO_QUOTA}"


def test_a_new_message_is_one_status_and_no_event() -> None:
    stored = follow(make_job(status_in("train")), held(), queue=Reason("WaitingForQueue", "one"))
    job = make_job(stored)
    status = follow(job, held(), queue=Reason("WaitingForQueue", "another"))
    assert (status.phase, reason_of(status)) == ("Queued", "WaitingForQueue")
    assert phase_event(job, status, NOW) is None


@pytest.mark.parametrize(("seconds", "pause"), [(5, 3), (31, 60)])
def test_a_queue_is_polled_often_until_it_has_a_reason_and_then_once_a_minute(seconds: float, pause: float) -> None:
    job, observed = make_job(status_in("train")), held()
    (observed["status"]["conditions"][0]) |= {"lastTransitionTime": time()}
    status = follow(job, observed, now=after(seconds))
    assert plan_of(job, status, seen(observed), after(seconds)).look_again == after(seconds + pause)


def resumed_but_not_seen() -> dict[str, Any]:
    """Return a resumed Job that the Job controller has not given a start time yet."""
    return child("train", Suspended="JobSuspended") | {"spec": {"suspend": False}}


def test_a_job_resumed_before_the_job_controller_saw_it_has_lost_no_pod() -> None:
    running_job = follow(make_job(status_in("train")), child("train"), running(pod("train")))
    status = follow(make_job(running_job), resumed_but_not_seen(), ended(pod("train"), 143), now=after(30))
    assert (status.disruptions, status.phase, reason_of(status)) == (0, "Queued", "WaitingForQueue")
    # Nor is the pod missing that it will get.
    assert reason_of(follow(make_job(status), resumed_but_not_seen(), now=after(300))) == "WaitingForQueue"


def test_a_pod_deleted_before_its_jobs_suspension_was_not_disrupted() -> None:
    stored = follow(make_job(status_in("train")), child("train"), running(pod("train")))
    stored = follow(make_job(stored), child("train"), deleted(running(pod("train")), -20))
    status = follow(make_job(stored), held(), deleted(ended(pod("train"), 143), -20))
    assert (status.disruptions, status.active_seconds) == (0, 50)


@pytest.mark.parametrize(("reason", "failures"), [("Error", 0), ("OOMKilled", 1)])
def test_a_preempted_pod_killed_at_the_end_of_its_grace_period_is_no_failure(reason: str, failures: int) -> None:
    stored: QLoRAJobStatus = follow(make_job(status_in("train")), child("train"), running(pod("train")))
    killed = deleted(ended(pod("train"), 137, reason=reason), -130)
    status = follow(make_job(stored), held(), killed)
    assert (status.failures, status.disruptions) == (failures, 0)


@pytest.mark.parametrize("step", ["prepare", "train", "publish"])
def test_a_job_that_kueue_gives_to_another_cluster_fails_and_goes(step: StepName) -> None:
    # The API server has it with MultiKueue's report, and without a pod.
    dispatched = child(step, Complete="x") | {"spec": {"managedBy": MULTIKUEUE}}
    job = make_job(status_in(step, resolved=resolved().model_copy(update={"queue_name": "gpus"})))
    status = follow(job, dispatched)
    queue = "LocalQueue 'gpus' gives" if step == "train" else "the LocalQueue 'default', or a webhook, gives"
    sentence = f"{queue} Job tune-{step}-1 to {MULTIKUEUE}, perhaps in another cluster"
    assert (status.phase, reason_of(status), message_of(status)[: len(sentence)]) == (
        "Failed",
        "QueueNotSupported",
        sentence,
    )
    assert plan_of(job, status, seen(dispatched), NOW).store_first
    stored = make_job(status)
    assert plan_of(stored, status, seen(dispatched), NOW).actions == (
        DeleteJob(f"tune-{step}-1", f"uid-tune-{step}-1"),
    )


def test_a_clean_up_in_another_cluster_has_failed() -> None:
    job = make_job(follow(make_job(status_in("publish")), child("publish", Failed="x")), cleanupAfterSeconds=0)
    elsewhere = child("clean", Complete="x") | {"spec": {"managedBy": MULTIKUEUE}}
    found = next(each for each in follow(job, elsewhere).conditions if each.type == "CleanedUp")
    assert (found.status, found.reason) == ("False", "CleanupFailed")


@pytest.mark.parametrize("managed_by", [None, "kubernetes.io/job-controller"])
def test_a_job_of_kubernetes_own_controller_is_followed(managed_by: str | None) -> None:
    own = child("train") | {"spec": {"managedBy": managed_by}}
    assert follow(make_job(status_in("train")), own, running(pod("train"))).phase == "Training"
