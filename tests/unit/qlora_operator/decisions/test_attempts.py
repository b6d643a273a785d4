"""Failures, interruptions and lost pods: how attempts count, and which reason the status has."""

from typing import Any

import pytest

from tests.support.builders import (
    NAME,
    after,
    child,
    conditions_of,
    deleted,
    ended,
    failed,
    follow,
    make_job,
    message_of,
    node,
    pod,
    present,
    reason_of,
    result,
    running,
    status_in,
    step_status,
    succeeded,
    time,
)


@pytest.mark.parametrize(
    ("step", "bodies", "reason", "words"),
    [
        (
            "prepare",
            [child("prepare", Failed="PodFailurePolicy"), failed("prepare", 11, "BadDataset", "row 3 is cut")],
            "BadDataset",
            "row 3 is cut",
        ),
        (
            "train",
            [child("train", Failed="BackoffLimitExceeded"), failed("train", 203, "InternalError", "no luck")],
            "InternalError",
            "no luck",
        ),
        (
            "train",
            [child("train", Failed="BackoffLimitExceeded"), ended(pod("train"), 137)],
            "InternalError",
            "kubectl logs tune-train-1-pod1",
        ),
        (
            "train",
            [child("train", Failed="BackoffLimitExceeded"), ended(pod("train"), 1)],
            "InternalError",
            "the end of records/train.log in the workspace",
        ),
        (
            "train",
            [child("train", Failed="BackoffLimitExceeded"), ended(node(1), 1)],
            "InternalError",
            "the end of records/train.node-1.log in the workspace",
        ),
        (
            "train",
            [child("train", Failed="PodFailurePolicy"), ended(pod("train"), 12, "{not a record")],
            "ModelUnavailable",
            "exit code 12",
        ),
        ("train", [child("train", Failed="BackoffLimitExceeded")], "BackoffLimitExceeded", "why"),
        ("train", [child("train"), ended(pod("train"), 137, reason="OOMKilled")], "HostOutOfMemory", "24Gi"),
        ("prepare", [child("prepare"), ended(pod("prepare"), 1, reason="OOMKilled")], "HostOutOfMemory", "4Gi"),
    ],
)
def test_a_failures_message_prefers_the_most_specific_source(step: Any, bodies: Any, reason: str, words: str) -> None:
    status = follow(make_job(status_in(step)), *bodies)
    assert status.phase == "Failed"
    assert {"Succeeded": "False", "Failed": "True", "Stalled": "True"}.items() <= conditions_of(status).items()
    for kind in ("Succeeded", "Failed", "Stalled"):
        assert reason_of(status, kind) == reason
    assert words in message_of(status)
    assert status.last_failure is not None
    assert (status.last_failure.reason, status.last_failure.step) == (reason, step)
    assert status.completion_time == time()


def test_only_the_conditions_that_tools_read_have_the_failure_message() -> None:
    sentence = "row 3 is cut" * 80
    bodies = [child("prepare", Failed="PodFailurePolicy"), failed("prepare", 11, "BadDataset", sentence)]
    running_job = follow(make_job(status_in("prepare")), child("prepare"), running(pod("prepare")))
    status = follow(make_job(running_job), *bodies)
    found = {entry.type: (entry.status, entry.reason) for entry in status.conditions}
    assert {entry.type for entry in status.conditions if sentence in entry.message} == {
        "Succeeded",
        "Failed",
        "Stalled",
    }
    assert {kind: found[kind] for kind in ("Prepared", "Suspended", "Reconciling")} == {
        "Prepared": ("False", "BadDataset"),
        "Suspended": ("False", "NotSuspended"),
        "Reconciling": ("False", "Finished"),
    }


def test_an_attempt_that_is_retried_is_explained_once() -> None:
    job = make_job(status_in("prepare"))
    status = follow(job, child("prepare"), failed("prepare", 200, "Unreachable", "secret hub is missing"))
    assert [entry.type for entry in status.conditions if "secret hub" in entry.message] == ["Succeeded"]
    assert reason_of(status, "Prepared") == "NotEnded"
    assert (status.failures, status.disruptions, status.phase) == (1, 0, "Preparing")
    failure = present(status.last_failure)
    assert (failure.exit_code, failure.time) == (200, time(-10))


def test_a_failure_without_its_pods_is_reported_from_the_last_status() -> None:
    def last_failure(step: str) -> dict[str, Any]:
        return {"step": step, "reason": "InternalError", "message": "no luck", "time": time(-90), "exitCode": 203}

    failure = child("train", Failed="BackoffLimitExceeded")
    status = follow(make_job(status_in("train", lastFailure=last_failure("train"))), failure)
    assert (status.phase, reason_of(status), message_of(status)) == ("Failed", "InternalError", "no luck")
    assert present(status.last_failure).exit_code == 203
    status = follow(make_job(status_in("train", lastFailure=last_failure("prepare"))), failure)
    assert reason_of(status) == "BackoffLimitExceeded"


def rejected_by_the_kubelet(step: Any) -> dict[str, Any]:
    """A pod that failed without a container, as after the restart of a node."""
    return pod(step, phase="Failed", reason="UnexpectedAdmissionError", message="no healthy devices present")


def test_a_pod_that_the_kubelet_rejects_is_reported_and_uses_up_no_retry() -> None:
    status = follow(make_job(status_in("train")), child("train"), rejected_by_the_kubelet("train"))
    assert (status.failures, status.disruptions, status.active_seconds) == (0, 0, 0)
    assert status.last_failure is not None
    assert (status.last_failure.reason, status.last_failure.exit_code) == ("UnexpectedAdmissionError", None)
    sentence = f"pod {NAME}-train-1-pod1 failed before the trainer ran: no healthy devices present"
    assert (reason_of(status), status.last_failure.message) == ("Retrying", sentence)


def test_a_job_whose_pods_the_kubelet_rejected_is_followed_by_another() -> None:
    own = failed("train", 203, "InternalError", "no luck", number=2)
    rejected = pod("train", number=3, phase="Failed", reason="OutOfcpu")
    bodies = [child("train", Failed="BackoffLimitExceeded"), rejected_by_the_kubelet("train"), own, rejected]

    status = follow(make_job(status_in("train"), retry={"maxFailures": 2}), *bodies)

    assert (status.phase, status.failures) == ("Queued", 1)
    assert status.step is not None
    assert (status.step.job_name, status.step.failures) == (f"{NAME}-train-2", 1)
    # Failures of the step itself count as before.
    status = follow(make_job(status_in("train"), retry={"maxFailures": 0}), *bodies)
    assert status.phase == "Failed"


@pytest.mark.parametrize(("step", "phase"), [("prepare", "Preparing"), ("train", "Queued"), ("publish", "Publishing")])
def test_a_step_that_waits_after_a_rejected_pod_reports_reason_and_time(step: Any, phase: str) -> None:
    bodies = [child(step, Failed="BackoffLimitExceeded"), rejected_by_the_kubelet(step)]
    status = follow(make_job(status_in(step)), *bodies, now=after(-590))
    assert (status.phase, reason_of(status), status.failures) == (phase, "PodRejected", 0)
    assert message_of(status) == (
        f"a node has rejected a pod, which uses no retry: Job {NAME}-{step}-2 is created at {time(-539)}, or soon "
        f"after that; UnexpectedAdmissionError: pod {NAME}-{step}-1-pod1 failed before the trainer ran: no healthy "
        "devices present"
    )
    assert conditions_of(status) | {"Reconciling": "False", "Failed": "False"} == conditions_of(status)
    later = follow(make_job(status), *bodies, now=after(-540))
    assert (later.phase, later.conditions) == (status.phase, status.conditions)

    created = follow(make_job(status), *bodies, child(step, 2, created=-539), now=after(-539))
    assert (created.phase, reason_of(created)) == (phase, "Retrying")


def test_out_of_memory_names_the_jobs_limit_and_the_remedy() -> None:
    job = make_job(status_in("train"), resources={"memory": "9Gi"})
    status = follow(job, child("train"), ended(pod("train"), 137, reason="OOMKilled"))
    assert "9Gi" in message_of(status)
    assert "spec.resources.memory" in message_of(status)


def test_an_interruption_is_not_a_failure() -> None:
    status = follow(make_job(status_in("train")), child("train"), ended(pod("train"), 143), pod("train", number=2))
    assert (status.failures, status.disruptions, status.last_failure, status.active_seconds) == (0, 1, None, 50)


@pytest.mark.parametrize(("earlier", "phase"), [(1, "Preparing"), (2, "Failed")])
def test_a_step_that_is_interrupted_too_often_ends_the_job(earlier: int, phase: str) -> None:
    job = make_job(status_in("prepare", disruptions=earlier), retry={"maxDisruptions": 2})
    evicted = ended(pod("prepare"), 137)
    evicted["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]
    status = follow(job, child("prepare"), evicted)
    assert (status.phase, status.disruptions) == (phase, earlier + 1)
    if phase == "Failed":
        assert reason_of(status) == "RetriesExhausted"
        assert "spec.retry.maxDisruptions allows 2" in message_of(status)


def test_unseen_interruptions_do_not_end_a_finished_step() -> None:
    job = make_job(status_in("prepare", disruptions=9), retry={"maxDisruptions": 2})
    status = follow(job, child("prepare", Complete=""), succeeded("prepare"))
    assert (status.phase, conditions_of(status)["Prepared"]) == ("Preparing", "True")


def test_attempts_are_counted_once_while_they_come_and_go() -> None:
    job = make_job(status_in("train"))
    first = running(pod("train"), since=-60)
    steps = [
        ([first], (0, 0, 0)),
        ([deleted(first, -20)], (0, 0, 0)),
        ([deleted(ended(pod("train"), 143, start=-60, end=-10), -20)], (0, 1, 50)),
        ([], (0, 1, 50)),
        ([running(pod("train", number=2), since=-8)], (0, 1, 50)),
        ([ended(pod("train", number=2), 203, start=-8, end=-5)], (1, 1, 53)),
        ([ended(pod("train", number=2), 203, start=-8, end=-5), pod("train", number=3)], (1, 1, 53)),
        ([ended(pod("train", number=n), 203, start=4 * n - 16, end=4 * n - 13) for n in (2, 3)], (2, 1, 56)),
    ]
    for pods, expected in steps:
        for _ in range(2):
            status = follow(job, child("train"), *pods)
            assert (status.failures, status.disruptions, status.active_seconds) == expected
            job = make_job(status)


def test_an_attempt_is_not_counted_again_after_its_pod_is_deleted() -> None:
    """It ended in the same second as the start and deletion of the next attempt."""
    stored = status_in(
        "train",
        step=step_status("train", countedPod="uid-of-a-pod-that-is-gone").dump(),
        failures=1,
        disruptions=1,
        activeSeconds=50,
        activeUntil=time(-10),
    )
    status = follow(make_job(stored), child("train"), ended(pod("train"), 203, start=-60, end=-10))
    assert (status.failures, status.disruptions, status.active_seconds) == (1, 1, 50)


def test_an_attempt_that_begins_and_is_deleted_within_a_second_counts_once() -> None:
    job = make_job(status_in("train", active_until=time(-60)))
    first = deleted(running(pod("train"), since=-60), -60)
    status = follow(job, child("train"), first)
    status = follow(make_job(status), child("train"), deleted(ended(pod("train"), 143, start=-60, end=-50), -60))
    assert (status.disruptions, status.active_seconds) == (1, 10)


def test_a_pod_that_ends_because_of_a_suspension_was_not_disturbed() -> None:
    status = follow(make_job(status_in("train"), suspend=True), ended(pod("train"), 143))
    assert (status.disruptions, status.active_seconds) == (0, 50)


def test_a_pod_that_ends_because_its_job_is_being_deleted_was_not_disturbed() -> None:
    going = child("train")
    going["metadata"]["deletionTimestamp"] = time(-20)
    status = follow(make_job(status_in("train")), going, ended(pod("train"), 143))
    assert (status.disruptions, status.active_seconds) == (0, 50)


def test_a_child_job_that_was_deleted_is_followed_by_the_next_number() -> None:
    status = follow(make_job(status_in("train", 3)))
    assert status.step == step_status("train", 4, jobUid="")
    assert status.phase == "Queued"


def test_a_job_that_was_made_just_before_the_operator_died_is_found() -> None:
    job = make_job(status_in("prepare"))
    status = follow(job, child("prepare", Complete=""), succeeded("prepare"), child("train"), running(pod("train")))
    assert status.step == step_status("train")
    assert status.phase == "Training"


def test_attempts_of_a_job_created_just_before_a_crash_are_counted() -> None:
    stored = status_in("train", step=step_status("train", jobUid="").dump())
    status = follow(make_job(stored), child("train"), ended(pod("train"), 203))
    assert status.step == step_status("train", countedPod=f"uid-{NAME}-train-1-pod1", failures=1)
    assert (status.failures, status.active_seconds) == (1, 50)


def test_a_step_killed_and_then_finished_without_an_operator_is_done() -> None:
    second = pod("train", number=2)
    bodies = [
        child("train", Complete=""),
        ended(pod("train"), 137, reason="OOMKilled", start=-60, end=-40),
        ended(second, 0, result(second, "train", training_step=10, total_steps=10), start=-30),
    ]
    status = follow(make_job(status_in("train")), *bodies)
    assert (present(status.step).name, status.failures) == ("publish", 1)


def test_several_steps_that_ended_without_an_operator_are_recorded_in_one_pass() -> None:
    bodies: list[dict[str, Any]] = []
    for step in ("prepare", "train", "publish"):
        bodies += [child(step, Complete=""), succeeded(step)]
    assert follow(make_job(status_in("prepare")), *bodies).phase == "Succeeded"
