"""Fields that the operator reads from Jobs and pods, and values that it does not believe."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api.contract import CONTRACT_VERSION
from qlora_operator.decisions.observed.parsing import observe
from qlora_operator.decisions.observed.stored_job import UnreadableJobError, parse_job
from qlora_operator.decisions.pods.blockers import blocking_reason
from qlora_operator.decisions.pods.detached import with_detached_pods
from qlora_operator.decisions.revision import with_data_of
from qlora_operator.decisions.status import next_status
from qlora_operator.kube.listing import ChildKind
from qlora_operator.watch.store import Store
from tests.fuzz.inputs import BOUNDED, changed
from tests.support.builders import (
    NAME,
    NOW,
    REVISION,
    UID,
    after,
    child,
    condition,
    deleted,
    ended,
    facts,
    job_body,
    make_job,
    node,
    plan_of,
    pod,
    present,
    resolved,
    result,
    revision_body,
    running,
    seen,
    status_in,
    waiting,
)


def test_a_job_of_another_controller_is_foreign_with_any_labels() -> None:
    observed = observe(UID, [child("train", owner="somebody-else"), child("prepare", Complete="")], [])
    assert [job.name for job in observed.children] == [f"{NAME}-prepare-1"]


def test_a_job_that_the_qlorajob_owns_but_does_not_control_is_foreign() -> None:
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


EVICTED = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}


def beside_a_sidecar(body: dict[str, Any]) -> dict[str, Any]:
    """The pod, with an injected container that has failed."""
    sidecar = {"name": "proxy", "state": {"terminated": {"exitCode": 9, "reason": "Error"}}}
    containers = [sidecar, *body["status"]["containerStatuses"]]
    return body | {"status": body["status"] | {"containerStatuses": containers}}


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
        (ended(pod("train", conditions=[EVICTED]), 137), False, False, True, False),
        (beside_a_sidecar(running(pod("train"))), True, True, False, False),
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
        "evicted",
        "beside a sidecar",
    ],
)
def test_a_pods_state_is_read_from_its_status(
    body: dict[str, object], live: bool, runs: bool, interrupted: bool, out_of_memory: bool
) -> None:
    observed = seen(child("train"), body)
    attempt = observed.pods[0]
    assert bool(observed.live_pods) == live
    assert (attempt.running, attempt.interrupted, attempt.out_of_memory) == (runs, interrupted, out_of_memory)


@pytest.mark.parametrize("seconds", [10**10, 200_000_000_000, 2**63 - 1])
def test_a_grace_period_of_centuries_gives_a_deletion_after_the_creation(
    seconds: int,
) -> None:
    # So long a period overflows in the API server, which then writes a time in the past.
    marks = {"deletionTimestamp": "1934-07-23T23:40:12Z", "deletionGracePeriodSeconds": seconds}
    body = running(pod("train"))
    found = seen(body | {"metadata": body["metadata"] | marks}).pods[0]
    assert (found.stopping, found.interrupted, found.unreadable) == (True, True, "")
    assert found.deletion_requested == found.created


@pytest.mark.parametrize("index", ["9" * 5000, "x", "", "-1", "\u00b2"])
def test_a_pod_with_an_invalid_index_is_read(index: str) -> None:
    body = node(1)
    body["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] = index
    found = seen(body).pods[0]
    assert (found.name, found.node, found.unreadable) == (body["metadata"]["name"], 0, "")


def test_an_unreadable_object_exists_and_has_not_ended() -> None:
    body = ended(pod("train"), 0)
    body["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"] = "10000-01-01T00:00:00Z"
    job = child("train", Complete="")
    job["status"]["conditions"][0]["lastTransitionTime"] = "2026-02-30T00:00:00Z"
    observed = seen(job, body)
    assert [pod.name for pod in observed.live_pods] == [body["metadata"]["name"]]
    assert "10000-01-01" in observed.pods[0].unreadable
    assert (observed.pods_of(observed.children[0].uid), observed.children[0].finished) == (observed.pods, False)
    assert "day" in observed.children[0].unreadable


def test_a_pod_that_mounts_more_than_fits_into_a_sentence_costs_no_memory() -> None:
    volumes = [{"name": f"v{n}", "secret": {"secretName": f"s{n}", "items": [{"key": "k" * 9999}]}} for n in range(99)]
    assert sum(map(len, seen(pod("train") | {"spec": {"volumes": volumes}}).pods[0].objects)) < 10_000


VOLUMES = [{"name": "a", "projected": {"sources": [{"secret": {"name": "b", "items": [{"key": "c"}]}}]}}]
DELETED = deleted(node(1), -5)
BODIES: tuple[tuple[ChildKind, dict[str, Any]], ...] = (
    ("pods", running(DELETED) | {"spec": {"volumes": VOLUMES}}),
    ("pods", ended(DELETED, 137)),
    ("pods", pod("train", conditions=[condition("PodScheduled", "False", reason="Unschedulable")])),
    ("pods", waiting(pod("train", conditions=[condition("DisruptionTarget", "True")]), "ErrImagePull")),
    ("jobs", child("train", Suspended="x") | {"spec": {"suspend": False, "backoffLimit": 3}}),
    ("jobs", {**child("train"), "status": {"active": 1, "conditions": [condition("Failed", "True")]}}),
)


def chosen_by_others(place: tuple[Any, ...]) -> bool:
    """Report whether the API server leaves the field free for objects of any kind."""
    free = ("annotations", "deletionTimestamp", "deletionGracePeriodSeconds")
    return bool(place) and (place[0] != "metadata" or (len(place) > 1 and place[1] in free))


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(("kind", "body"), BODIES)
@BOUNDED
@given(data=st.data())
def test_any_object_is_stored_and_its_job_continues(
    kind: ChildKind, body: dict[str, Any], typed: bool, data: st.DataObject
) -> None:
    shown = data.draw(changed(body, chosen_by_others, typed=typed))
    store = Store()
    store.job_changed(job_body(status_in("train").dump()))
    store.child_changed(kind, shown)
    held = present(store.held(("team", NAME)))
    found = [*(each.name for each in held.observed.children), *(each.name for each in held.observed.pods)]
    assert found == [body["metadata"]["name"]]
    if typed:
        # Values of other types the API server does not admit.
        job = make_job(status_in("train"))
        plan_of(job, next_status(facts(job, shown)).status, with_detached_pods(job, held.observed), NOW)


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


def test_pods_are_returned_in_order_of_creation() -> None:
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
def test_a_blocked_job_has_one_message(bodies: list[dict[str, object]], reason: str | None, words: str) -> None:
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
    training = {"maxSteps": 5, "fromTheFuture": 1}
    assert "fromTheFuture" in parse_job(job_body(training=training)).problem

    job = parse_job(job_body(status_in("train").dump(), training=training))

    assert (job.problem, job.spec.training.max_steps) == ("", 5)


def test_a_job_of_a_newer_contract_is_left_to_its_operator() -> None:
    newer = resolved().model_copy(update={"contract_version": CONTRACT_VERSION + 1})
    assert f"contract version {CONTRACT_VERSION + 1}" in make_job(status_in("train", resolved=newer)).problem


def test_a_status_that_cannot_be_read_is_rejected_with_the_field() -> None:
    with pytest.raises(UnreadableJobError, match=r"failures"):
        parse_job(job_body({"failures": "many"}))


def test_the_queue_of_the_spec_comes_before_that_of_the_label() -> None:
    body = job_body()
    body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "a", "kueue.x-k8s.io/priority-class": "low"}
    assert (parse_job(body).queue_name, parse_job(body).queue_priority_class_name) == ("a", "low")
    body["spec"]["scheduling"] = {"queueName": "b"}
    assert (parse_job(body).queue_name, parse_job(body).queue_priority_class_name) == ("b", "low")


def test_a_job_that_a_newer_operator_began_can_be_read() -> None:
    job, revision = make_job(status_in("train")), revision_body()
    revision["data"]["profile"] |= {"fromTheFuture": 1, "workspace": {"fromTheFuture": 1}}
    assert with_data_of(job, revision) == job


def test_a_revision_that_cannot_be_read_is_rejected_with_the_field() -> None:
    revision = revision_body() | {"data": {"claimName": 7}}
    with pytest.raises(UnreadableJobError, match=f"ControllerRevision {REVISION}: contractVersion: Field required"):
        with_data_of(make_job(), revision)


def test_a_fresh_job_with_the_default_status_can_be_read() -> None:
    job = parse_job(job_body())
    assert (job.status.observed_generation, job.status.phase, job.deleting) == (-1, None, False)
