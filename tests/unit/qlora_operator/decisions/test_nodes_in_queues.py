"""Jobs of several nodes whose pods a queue stops and resumes."""

from typing import Any

from tests.support.builders import NOW, after, child, deleted, ended, follow, node, reason_of, running, time
from tests.support.cluster.nodes import ENDED_BY_ITS_POLICY, INTERRUPTED, RUNS, counts, job_in, told


def _suspended(body: dict[str, Any]) -> dict[str, Any]:
    return body | {"spec": {"suspend": True}}


def test_a_queue_that_stops_the_pods_costs_nothing_and_resumes_the_same_job() -> None:
    stopped = (ended(node(0), INTERRUPTED), ended(node(1), INTERRUPTED))
    status = follow(job_in(), _suspended(child("train", Suspended="JobSuspended")), *stopped)
    assert counts(status) == (0, 0, 1)
    assert status.phase == "Queued"

    resumed = child("train")
    resumed["status"] = {
        "startTime": NOW.isoformat(),
        "conditions": [{"type": "Suspended", "status": "False", "reason": "JobResumed"}],
    }
    fresh = (running(node(0, created=5), since=6), running(node(1, created=5), since=6))
    status = follow(job_in(status), resumed, *stopped, *fresh, now=after(10))
    assert counts(status) == (0, 0, 1)
    assert status.phase == "Training"

    # A pod that is lost afterwards is a disruption again.
    gone = (ended(node(0, created=5), INTERRUPTED, end=20), ended(node(1, created=5), INTERRUPTED, end=20))
    assert counts(follow(job_in(status), resumed, *stopped, *gone, now=after(30))) == (0, 1, 2)


def _resumed(body: dict[str, Any], at: float) -> dict[str, Any]:
    resumed = {"type": "Suspended", "status": "False", "reason": "JobResumed"}
    conditions = [*body["status"]["conditions"], resumed]
    return body | {"status": body["status"] | {"startTime": time(at), "conditions": conditions}}


def test_pods_older_than_their_resumed_jobs_start_give_its_failure() -> None:
    """The Job controller creates pods, and then notes when it has resumed their Job."""

    def fresh(number: int) -> dict[str, Any]:
        return node(number, created=-301)

    started = follow(job_in(), _resumed(child("train"), -300), *(running(fresh(n), since=-290) for n in (0, 1)))
    assert started.phase == "Training"
    told_why = [told(fresh(number), 11, "BadDataset", "row 3 is broken") for number in (0, 1)]
    status = follow(job_in(started), _resumed(ENDED_BY_ITS_POLICY, -300), *told_why)
    assert (status.phase, reason_of(status, "Failed"), status.disruptions) == ("Failed", "BadDataset", 0)


def test_a_pod_that_saves_after_its_job_was_resumed_was_stopped_by_the_queue() -> None:
    saving = deleted(node(0), -310)
    saved = [deleted(ended(node(number), INTERRUPTED, end=-290), -310) for number in (0, 1)]
    resumed = _resumed(RUNS, -300)
    assert counts(follow(job_in(), resumed, running(saving), saved[1])) == (0, 0, 1)
    assert counts(follow(job_in(), resumed, *saved)) == (0, 0, 1)


def test_a_node_0_that_a_queue_stops_in_its_first_second_was_stopped_by_the_queue() -> None:
    started = follow(job_in(), RUNS, running(node(0), since=-310), node(1))
    stopped = deleted(ended(node(0), INTERRUPTED, start=-310, end=-310), -310)
    status = follow(job_in(started), _suspended(child("train", Suspended="JobSuspended")), stopped)
    status = follow(job_in(status), _resumed(RUNS, -300))
    assert (counts(status), status.active_seconds) == ((0, 0, 1), 0)


def test_pods_killed_while_a_queue_stops_them_cost_another_job_and_nothing_else() -> None:
    killed = ended(node(1), 137) | {"metadata": deleted(node(1), -120)["metadata"]}
    failed = _suspended(child("train", Suspended="JobSuspended", Failed="BackoffLimitExceeded"))

    assert counts(follow(job_in(), failed, ended(node(0), INTERRUPTED), killed)) == (0, 0, 2)
