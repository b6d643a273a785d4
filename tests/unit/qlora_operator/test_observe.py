"""What the operator reads from Jobs and pods, and what it does not believe."""

from typing import Any

import pytest

from qlora_api.contract import CONTRACT_VERSION
from qlora_operator.decisions.blockers import blocking_reason
from qlora_operator.decisions.observe import UnreadableJobError, observe, parse_job
from tests.support.builders import (
    NAME,
    NOW,
    UID,
    after,
    child,
    deleted,
    ended,
    job_body,
    pod,
    result,
    running,
    seen,
    status_in,
    waiting,
)


def test_a_job_of_another_controller_is_not_ours_whatever_its_labels_say() -> None:
    observed = observe(UID, [child("train", owner="somebody-else"), child("prepare", Complete="")], [])
    assert [job.name for job in observed.children] == [f"{NAME}-prepare-1"]


def test_a_job_of_which_the_qlorajob_is_an_owner_but_not_the_controller_is_not_ours() -> None:
    body = child("train")
    for owner in body["metadata"]["ownerReferences"]:
        owner["controller"] = False
    assert observe(UID, [body], []).children == ()


@pytest.mark.parametrize("status", ["False", "Unknown"])
def test_a_condition_that_does_not_hold_ends_no_job(status: str) -> None:
    body = child("train", Complete="", Failed="BackoffLimitExceeded")
    for entry in body["status"]["conditions"]:
        entry["status"] = status
    assert not seen(body).children[0].finished


@pytest.mark.parametrize(
    ("conditions", "complete", "failure"),
    [
        ({}, False, None),
        ({"SuccessCriteriaMet": ""}, False, None),
        ({"FailureTarget": "PodFailurePolicy"}, False, None),
        ({"Complete": "CompletionsReached"}, True, None),
        ({"Failed": "PodFailurePolicy"}, False, "PodFailurePolicy"),
        ({"Failed": "BackoffLimitExceeded"}, False, "BackoffLimitExceeded"),
    ],
)
def test_a_jobs_end_is_read_from_its_conditions(
    conditions: dict[str, Any], complete: bool, failure: str | None
) -> None:
    job = seen(child("train", **conditions)).children[0]
    assert (job.complete, job.failure.word if job.failure else None) == (complete, failure)


@pytest.mark.parametrize(
    ("body", "live", "runs", "interrupted", "out_of_memory"),
    [
        (pod("train"), True, False, False, False),
        (running(pod("train")), True, True, False, False),
        (ended(pod("train"), 0), False, False, False, False),
        (ended(pod("train"), 203), False, False, False, False),
        (ended(pod("train"), 143), False, False, True, False),
        (ended(pod("train"), 137), False, False, False, False),
        (ended(pod("train"), 137, reason="OOMKilled"), False, False, False, True),
        (ended(pod("train"), 1, reason="OOMKilled"), False, False, False, True),
        (ended(pod("train"), 0, reason="OOMKilled"), False, False, False, False),
        (deleted(running(pod("train")), -5), True, True, True, False),
    ],
    ids=[
        "pending",
        "running",
        "done",
        "failed",
        "asked to stop",
        "killed",
        "OOM",
        "OOM of a child",
        "done despite OOM",
        "deleted",
    ],
)
def test_a_pods_state(body: dict[str, object], live: bool, runs: bool, interrupted: bool, out_of_memory: bool) -> None:
    observed = seen(child("train"), body)
    attempt = observed.pods[0]
    assert bool(observed.live_pods) == live
    assert (attempt.running, attempt.interrupted, attempt.out_of_memory) == (runs, interrupted, out_of_memory)


def test_a_disruption_counts_as_an_interruption_whatever_the_exit_code() -> None:
    body = ended(pod("train"), 137)
    body["status"]["conditions"] = [
        {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}
    ]
    assert seen(body).pods[0].interrupted


def test_a_sidecar_that_somebody_injected_does_not_count() -> None:
    body = running(pod("train"))
    sidecar = {"name": "proxy", "state": {"terminated": {"exitCode": 9, "reason": "Error"}}}
    body["status"]["containerStatuses"].insert(0, sidecar)
    assert seen(body).pods[0].running


@pytest.mark.parametrize(
    ("message", "readable"),
    [
        (result(pod("train"), "train"), True),
        (result(pod("train"), "train") + "\n", True),
        (result(pod("train"), "prepare"), False),
        (result(pod("train", number=2), "train"), False),
        (result(pod("train"), "train", job_uid="another"), False),
        ("", False),
        ("Traceback (most recent call last):", False),
        (result(pod("train"), "train")[:-1], False),
    ],
    ids=["ours", "newline", "other step", "other pod", "other job", "none", "traceback", "cut"],
)
def test_only_a_whole_record_of_this_job_pod_and_step_is_a_result(message: str, readable: bool) -> None:
    attempt = seen(ended(pod("train"), 0, message)).pods[0]
    assert (attempt.result(UID, "train") is not None) == readable


def test_pods_are_given_in_the_order_in_which_they_were_made() -> None:
    observed = seen(child("train"), pod("train", number=2), pod("train", number=1))
    assert [attempt.name for attempt in observed.pods] == [f"{NAME}-train-1-pod1", f"{NAME}-train-1-pod2"]


def _unschedulable() -> dict[str, object]:
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    entry = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod("train", conditions=[entry])


@pytest.mark.parametrize(
    ("bodies", "reason", "words"),
    [
        ([child("train"), pod("train")], None, ""),
        ([child("train"), running(pod("train"))], None, ""),
        ([child("train"), waiting(pod("train"), "ContainerCreating")], None, ""),
        ([child("train"), _unschedulable()], "Unschedulable", "Insufficient nvidia.com/gpu"),
        ([child("train"), waiting(pod("train"), "ErrImagePull", "not found")], "ImagePullBackOff", "the profile"),
        ([child("train"), waiting(pod("train"), "ImagePullBackOff", "Back-off")], "ImagePullBackOff", "the profile"),
        ([child("train"), waiting(pod("train"), "InvalidImageName", "bad")], "InvalidImageName", "in the profile"),
        (
            [child("train"), waiting(pod("train"), "CreateContainerConfigError", "image will run as root")],
            "CreateContainerConfigError",
            "(image will run as root); if its image runs as root, set runAs in the profile",
        ),
        ([child("train", created=-59)], None, ""),
        ([child("train", created=-60)], "NoPod", "kubectl describe job tune-train-1"),
        ([child("train", created=-600, Complete="")], None, ""),
        ([child("train"), deleted(running(pod("train")), -179)], None, ""),
        ([child("train"), deleted(running(pod("train")), -180)], "PodStuckTerminating", "node may be lost"),
        ([deleted(running(pod("train")), -180)], "PodStuckTerminating", "node may be lost"),
    ],
)
def test_what_blocks_a_job_is_one_sentence(bodies: list[dict[str, object]], reason: str | None, words: str) -> None:
    observed = seen(*bodies)
    found = blocking_reason(observed.child(f"{NAME}-train-1"), observed, NOW)
    assert (found.word if found else None) == reason
    assert words in (found.sentence if found else "")


def test_both_names_of_a_failing_pull_read_the_same_so_that_the_status_stays_still() -> None:
    sentences = set()
    for reason in ("ErrImagePull", "ImagePullBackOff"):
        observed = seen(child("train"), waiting(pod("train"), reason, f"message of {reason}"))
        sentences.add(blocking_reason(observed.children[0], observed, NOW))
    assert len(sentences) == 1


def test_a_finished_deletion_is_not_stuck() -> None:
    observed = seen(child("train"), deleted(ended(pod("train"), 143), -1000))
    assert blocking_reason(observed.children[0], observed, after(1000)) is None


def test_a_spec_that_another_release_has_admitted_can_still_be_stopped() -> None:
    body = job_body(lora={"rank": "many"}, dataset={"source": "hf://a/b", "fromTheFuture": 1}, suspend=True)
    body["spec"] |= {"activeDeadlineSeconds": 60, "retry": {"maxFailures": 1, "fromTheFuture": 1}}

    job = parse_job(body)

    assert "lora.rank" in job.problem
    assert (job.spec.suspend, job.spec.active_deadline_seconds, job.spec.retry.max_failures) == (True, 60, 1)


def test_a_new_field_stops_no_job_whose_document_is_fixed() -> None:
    status = status_in("train").dump()
    body = job_body(status, training={"maxSteps": 5, "fromTheFuture": 1})
    assert "fromTheFuture" in parse_job(body).problem
    status["resolved"]["document"] = "{}"

    job = parse_job(body)

    assert (job.problem, job.spec.training.max_steps) == ("", 5)


def test_a_job_of_a_newer_contract_is_left_to_its_operator() -> None:
    status = status_in("train").dump()
    status["resolved"]["contractVersion"] = CONTRACT_VERSION + 1
    assert f"contract version {CONTRACT_VERSION + 1}" in parse_job(job_body(status)).problem


def test_a_status_that_cannot_be_read_is_rejected_with_the_field() -> None:
    with pytest.raises(UnreadableJobError, match=r"failures"):
        parse_job(job_body({"failures": "many"}))


def test_the_queue_of_the_spec_comes_before_that_of_the_label() -> None:
    body = job_body()
    body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "a", "kueue.x-k8s.io/priority-class": "low"}
    assert (parse_job(body).queue_name, parse_job(body).queue_priority) == ("a", "low")
    body["spec"]["scheduling"] = {"queueName": "b"}
    assert (parse_job(body).queue_name, parse_job(body).queue_priority) == ("b", "low")


def test_a_job_that_a_newer_operator_began_can_be_read() -> None:
    status = status_in("train").dump()
    status["resolved"]["profile"] |= {"fromTheFuture": 1, "workspace": {"fromTheFuture": 1}}
    assert parse_job(job_body(status)).status == status_in("train")


def test_a_fresh_job_with_the_default_status_can_be_read() -> None:
    job = parse_job(job_body())
    assert (job.status.observed_generation, job.status.phase, job.deleting) == (-1, None, False)
