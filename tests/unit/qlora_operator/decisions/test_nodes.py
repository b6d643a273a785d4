"""A job of several nodes: its pods are one attempt, which counts once."""

from dataclasses import replace
from typing import Any

import pytest

from qlora_operator.decisions.manifests.objects import build_job, document
from qlora_operator.decisions.observed.conditions import has_trained
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.plan import ConnectNodes, CreateJob, DeleteJob, Plan
from tests.support.builders import (
    NAME,
    NOW,
    PROFILE,
    after,
    child,
    conditions_of,
    deleted,
    ended,
    facts,
    follow,
    make_job,
    message_of,
    node,
    plan_of,
    present,
    reason_of,
    resolved,
    result,
    running,
    status_in,
    step_status,
    time,
    waiting,
)
from tests.support.cluster.nodes import (
    ENDED_BY_ITS_POLICY,
    INTERRUPTED,
    PEER_LOST,
    PEERS_MISSING,
    RUNS,
    UNREACHABLE,
    counts,
    job_in,
    told,
)


def lost(number: int, end: float = -9) -> dict[str, Any]:
    return told(node(number), PEER_LOST, "PeerLost", "lost another process of this run", end=end)


def failed_job(attempt: int = 1, end: float = -10) -> dict[str, Any]:
    """Return a train Job that Kubernetes failed because one of its pods failed."""
    body = child("train", attempt, Failed="BackoffLimitExceeded")
    body["status"]["conditions"][0]["lastTransitionTime"] = time(end)
    return body


FAILED = failed_job()
STOPS = child("train", FailureTarget="BackoffLimitExceeded")
FULL = told(node(1), 13, "GPUOutOfMemory", "the GPU is out of memory")


def decide(job: QLoRAJob, *bodies: dict[str, Any], at: float = 0) -> Plan:
    found = facts(job, *bodies, now=after(at))
    return plan_of(job, job.status, found.observed, found.now)


def test_the_pod_that_failed_gives_the_reason_and_not_the_one_that_lost_it() -> None:
    status = follow(job_in(), ENDED_BY_ITS_POLICY, lost(0, end=-12), FULL)

    assert conditions_of(status)["Failed"] == "True"
    assert (reason_of(status), message_of(status)) == ("GPUOutOfMemory", "the GPU is out of memory")
    assert counts(status) == (1, 0, 1)


@pytest.mark.parametrize(
    "others",
    [
        [lost(0)],
        [lost(0), ended(node(2), INTERRUPTED)],
        [ended(node(0), 137, reason="Error") | {"metadata": deleted(node(0), -60)["metadata"]}, lost(2)],
    ],
    ids=["the others have lost it", "one was stopped with the failed Job", "one was killed as it did not stop in time"],
)
def test_a_vanished_pod_costs_one_disruption_and_a_new_job_for_all(others: list[dict[str, Any]]) -> None:
    status = follow(job_in(nodes=3), FAILED, *others, lost(1))

    assert counts(status) == (0, 1, 2)
    again = follow(job_in(status, nodes=3), FAILED, *others, lost(1))
    assert counts(again) == (0, 1, 2)
    assert decide(job_in(again, nodes=3), FAILED, *others, lost(1)).actions == (ConnectNodes(), CreateJob("train", 2))


def test_the_pods_of_a_drained_node_are_a_disruption_and_no_failure() -> None:
    drained = ended(node(1), 137)
    drained["status"]["conditions"] = [
        {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": ""}
    ]
    assert counts(follow(job_in(), FAILED, lost(0), drained)) == (0, 1, 2)


def test_pods_that_stopped_together_are_replaced_together_and_count_once() -> None:
    """The Job ignores them and would replace the deleted one alone."""
    bodies = (RUNS, ended(node(0), INTERRUPTED), ended(node(1), INTERRUPTED))
    status = follow(job_in(), *bodies)

    assert counts(status) == (0, 1, 2)
    successor = node(1, created=-5)
    stored = job_in(follow(job_in(status), *bodies, successor))
    assert counts(stored.status) == (0, 1, 2)
    assert decide(stored, *bodies, successor).actions == (DeleteJob(f"{NAME}-train-1", f"uid-{NAME}-train-1"),)
    # No pod of the next Job starts while one of this one may still write.
    assert decide(stored, successor).actions == ()
    assert decide(stored).actions == (ConnectNodes(), CreateJob("train", 2))


def test_the_reason_is_not_reported_before_the_last_pod_has_ended() -> None:
    running_on = running(node(1))
    status = follow(job_in(), FAILED, lost(0), running_on)
    assert counts(status) == (0, 0, 1)

    status = follow(job_in(status), ENDED_BY_ITS_POLICY, lost(0), told(node(1), 11, "BadDataset", "line 7"))

    assert (reason_of(status), message_of(status)) == ("BadDataset", "line 7")


@pytest.mark.parametrize("failing", [RUNS, STOPS], ids=["soon", "now"])
def test_a_pod_that_is_stopped_with_its_failing_job_is_not_taken_for_the_reason(failing: dict[str, Any]) -> None:
    """The kubelet of the pod that has failed may be the last to report."""
    stopped = ended(node(2), INTERRUPTED)
    status = follow(job_in(nodes=3), failing, lost(0), running(node(1)), stopped)
    assert counts(status) == (0, 0, 1)

    assert counts(follow(job_in(status, nodes=3), ENDED_BY_ITS_POLICY, lost(0), FULL, stopped)) == (1, 0, 1)


def test_a_failure_that_all_pods_report_counts_once_and_is_retried_after_a_pause() -> None:
    bodies = (FAILED, *(told(node(number), UNREACHABLE, "Unreachable", "no route") for number in range(2)))
    status = follow(job_in(), *bodies)

    assert counts(status) == (1, 0, 2)
    assert decide(job_in(status), *bodies, at=-1).actions == ()
    assert decide(job_in(status), *bodies, at=0).actions == (ConnectNodes(), CreateJob("train", 2, failures=1))


def test_jobs_that_fail_one_after_the_other_are_followed_after_pauses_that_grow() -> None:
    """Also for disruptions: a broken interconnect would use them up in a minute."""
    status = follow(job_in(), FAILED, lost(0), lost(1))
    assert (reason_of(status), status.last_failure and status.last_failure.reason) == ("Retrying", "PeerLost")
    assert "PeerLost: lost another process of this run" in message_of(status)
    assert decide(job_in(status), FAILED, lost(0), lost(1), at=-1).actions == ()

    def next_after(*ends: float) -> float:
        last = status_in("train", len(ends) + 1, step=step_status("train", len(ends) + 1, jobUid="").dump())
        jobs = [failed_job(number, end) for number, end in enumerate(ends, start=1)]
        return (present(decide(job_in(last), *jobs, at=ends[-1]).look_again) - after(ends[-1])).total_seconds()

    assert [next_after(*range(count)) for count in range(1, 9)] == [10, 20, 40, 80, 160, 320, 360, 360]
    # Occasional losses of nodes do not lengthen the pause.
    assert next_after(0, 4000, 8000) == 10


def test_more_failures_than_are_allowed_end_the_job() -> None:
    failure = told(node(0), UNREACHABLE, "Unreachable", "no route")
    stored = status_in("train", 1, step=step_status("train", failures=3).dump(), failures=3)

    status = follow(job_in(stored), FAILED, failure, lost(1))

    assert (conditions_of(status)["Failed"], reason_of(status)) == ("True", "Unreachable")
    assert counts(status) == (4, 0, 1)


def test_more_disruptions_than_are_allowed_end_the_job() -> None:
    status = follow(job_in(retry={"maxDisruptions": 0}), FAILED, lost(0), lost(1))

    assert reason_of(status) == "RetriesExhausted"
    assert "the latest report is PeerLost: lost another process of this run" in message_of(status)


def test_pods_whose_peers_never_came_count_nothing_and_retry_with_backoff() -> None:
    waited = told(node(0), PEERS_MISSING, "PeersMissing", "has met 1 of 2 processes")
    bodies = (FAILED, waited, ended(node(1), INTERRUPTED))
    status = follow(job_in(), *bodies)

    assert counts(status) == (0, 0, 2)
    assert reason_of(status) == "Retrying"
    assert "PeersMissing: has met 1 of 2 processes" in message_of(status)
    assert decide(job_in(status), *bodies, at=30).actions == ()
    planned = decide(job_in(status), *bodies, at=30)
    assert planned.look_again is not None
    assert after(50) <= planned.look_again <= after(120)
    assert decide(job_in(status), *bodies, at=120).actions == (ConnectNodes(), CreateJob("train", 2))


def test_two_jobs_that_wait_for_one_anothers_nodes_never_try_again_at_the_same_time() -> None:
    """Not even when their pauses have grown as long as they get."""
    waited = [told(node(0, attempt), PEERS_MISSING, "PeersMissing") for attempt in range(1, 8)]
    stored = status_in("train", 8, step=step_status("train", 8, jobUid="").dump())

    def pause(number: int) -> float:
        job = replace(job_in(stored), uid=f"0a1b2c3d-0000-4000-8000-{number:012}")
        due = present(plan_of(job, stored, facts(job, *waited).observed, NOW).look_again)
        return (due - after(-10)).total_seconds()

    pauses = [pause(number) for number in range(40)]

    assert len(set(pauses)) == 40
    assert 1800 <= min(pauses) < max(pauses) <= 3600


def test_a_job_whose_spec_has_lost_its_nodes_keeps_their_number() -> None:
    """An earlier release's CustomResourceDefinition drops the field in mid-run."""
    two = job_in()
    fixed = resolved().model_copy(update={"document": document(two, PROFILE), "contract_version": 3})
    status = status_in("train", 1, resolved=fixed.dump(), step=step_status("train").dump())
    pruned = make_job(status, resources={})

    body = build_job(pruned, fixed, "train", 2)

    assert (body["spec"]["completions"], body["spec"]["backoffLimit"]) == (2, 0)
    assert counts(follow(pruned, FAILED, lost(0), lost(1))) == (0, 1, 2)


def test_losing_all_pods_is_one_disruption() -> None:
    seen_running = status_in(
        "train", 1, step=step_status("train", runningPod="uid-0", runningSince="2026-01-02T11:59:00Z").dump()
    )
    assert counts(follow(job_in(seen_running), RUNS)) == (0, 1, 2)
    # As long as another pod exists, its status has the cause.
    assert counts(follow(job_in(seen_running), RUNS, running(node(1)))) == (0, 0, 1)


def test_pods_lost_before_node_0_runs_cost_only_another_job_after_a_pause() -> None:
    """A drain while pods start: the Job fails, and deletes all of them."""
    evicted = deleted(node(1), -5)
    disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": ""}
    evicted["status"] = {"phase": "Failed", "conditions": [disrupted]}
    killed = deleted(ended(node(1), 137), -15)
    for gone in (evicted, killed):
        status = follow(job_in(), RUNS, waiting(node(0), "ContainerCreating"), gone)
        status = follow(job_in(status), STOPS, deleted(node(0), -4))
        assert counts(status) == (0, 0, 1)
        status = follow(job_in(status), FAILED)
        assert conditions_of(status)["Failed"] == "False"
        assert counts(status) == (0, 0, 2)
        assert decide(job_in(status), FAILED, at=-1).actions == ()
        assert decide(job_in(status), FAILED, at=0).actions == (ConnectNodes(), CreateJob("train", 2))


def test_losing_node_0_after_the_other_pods_are_done_is_one_disruption() -> None:
    """It leaves samples of the model when the other pods have ended."""
    done = told(node(1), 0, "Done")
    status = follow(job_in(), RUNS, running(node(0), since=-600), done)
    status = follow(job_in(status), RUNS, deleted(ended(node(0), 137, start=-600), -40), done)
    status = follow(job_in(status), STOPS, done)
    assert counts(status) == (0, 0, 1)

    status = follow(job_in(status), FAILED, done)

    assert counts(status) == (0, 1, 2)
    assert status.active_seconds == 590


@pytest.mark.parametrize(
    ("bodies", "seconds"),
    [
        ([RUNS, running(node(0), since=-3000), ended(node(1), INTERRUPTED)], 3000),
        ([FAILED, running(node(0), since=-3000), told(node(1), UNREACHABLE, "Unreachable")], 3000),
        ([FAILED, lost(1)], 2990),
        ([deleted(running(node(0), since=-3000), -5), deleted(running(node(1), since=-3000), -5)], 2995),
        ([RUNS, running(node(1), since=-3000)], 3000),
    ],
    ids=["another pod has stopped", "another pod has failed", "gone", "the Job was deleted", "gone before the others"],
)
def test_the_time_of_node_0_counts_however_the_attempt_ends(bodies: list[dict[str, Any]], seconds: int) -> None:
    ran = follow(job_in(), RUNS, running(node(0), since=-3000), running(node(1), since=-3000))

    status = follow(job_in(ran), *bodies)

    assert status.active_seconds == seconds
    # And not twice, when the same is seen again.
    assert follow(job_in(status), *bodies, now=after(1)).active_seconds <= seconds + 1


def test_a_node_0_that_ends_in_its_first_second_counts_no_time_once_it_is_gone() -> None:
    status = follow(job_in(), RUNS, running(node(0), since=-60), node(1))
    stopped = deleted(ended(node(0), INTERRUPTED, start=-60, end=-60), -60)
    for left in ([stopped, deleted(node(1), -60)], [deleted(node(1), -60)], []):
        status = follow(job_in(status, suspend=True), *left)
        assert status.active_seconds == 0


def test_a_node_0_that_saves_late_reports_its_checkpoint_and_its_time() -> None:
    ran = follow(job_in(), RUNS, running(node(0), since=-3000), running(node(1), since=-3000))
    status = follow(job_in(ran), RUNS, running(node(0), since=-3000), ended(node(1), INTERRUPTED))
    assert counts(status) == (0, 1, 2)

    body = node(0)
    saved = ended(body, INTERRUPTED, result(body, "train", INTERRUPTED, training_step=70), start=-3000, end=20)
    status = follow(job_in(status), saved, ended(node(1), INTERRUPTED), now=after(30))

    assert status.active_seconds == 3020
    assert present(status.checkpoint).step == 70


def test_the_result_is_that_of_node_0() -> None:
    done = told(node(0), 0, "Done"), told(node(1), 0, "Done")
    complete = child("train", Complete="CompletionsReached")

    assert has_trained(follow(job_in(), complete, *done))
    assert not has_trained(follow(job_in(), complete, ended(node(0), 0), done[1]))


def test_only_node_0_counts_for_the_time_that_the_steps_have_run() -> None:
    job = job_in(activeDeadlineSeconds=100)
    bodies = (RUNS, running(node(0), since=-60), running(node(1), since=-60))
    assert conditions_of(follow(job, *bodies))["Failed"] == "False"

    status = follow(job_in(), FAILED, lost(0, end=-9), lost(1))
    assert status.active_seconds == 51


def test_the_status_shows_the_running_nodes_and_why_others_wait() -> None:
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    entry = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    without_node = node(1) | {"status": {"phase": "Pending", "conditions": [entry]}}

    status = follow(job_in(), RUNS, running(node(0)), without_node)

    assert status.step is not None
    assert (status.step.nodes, status.step.running_nodes) == (2, 1)
    assert (status.phase, reason_of(status)) == ("Queued", "Unschedulable")
    assert message in message_of(status)
    status = follow(job_in(), RUNS, running(node(0)), running(node(1)))
    assert (present(status.step).running_nodes, status.phase) == (2, "Training")


def test_progress_is_read_from_node_0() -> None:
    status = follow(job_in(), RUNS, running(node(1), since=-90), running(node(0), since=-60))
    assert present(status.step).running_pod == node(0)["metadata"]["uid"]


def test_pods_that_hang_are_restarted_together_and_that_is_one_failure() -> None:
    stalled = step_status(
        "train", runningPod=node(0)["metadata"]["uid"], runningSince=time(-600), progressedAt=time(-600)
    ).dump()
    job = job_in(status_in("train", 1, step=stalled), progressDeadlineSeconds=300, retry={"onNoProgress": "restart"})
    bodies = (RUNS, running(node(0), since=-600), running(node(1), since=-600))

    status = follow(job, *bodies, log_read=True)

    assert counts(status) == (1, 0, 2)
    assert status.active_seconds == 600
    stored = job_in(follow(job_in(status), *bodies))
    assert decide(stored, *bodies).actions == (DeleteJob(f"{NAME}-train-1", f"uid-{NAME}-train-1"),)
