"""GPU seconds: the shares of train pods, and the causes of lost seconds."""

from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.plan import is_settled
from qlora_operator.metrics.metrics import Metrics
from tests.support.builders import (
    PROFILE,
    after,
    child,
    deleted,
    ended,
    follow,
    make_job,
    node,
    plan_of,
    pod,
    present,
    progress,
    resolved,
    result,
    running,
    seen,
    status_in,
    step_status,
    stored_again,
    time,
)
from tests.support.cluster.train_pods import created, scheduled, usage_of

SPEC: dict[str, Any] = {"resources": {"gpus": 2}}


def train_pod(number: int = 1, *, at: float = -100, attempt: int = 1) -> dict[str, Any]:
    """A pod of the train Job that got its node then."""
    return scheduled(pod("train", attempt, number), at)


def lost(status: QLoRAJobStatus) -> dict[str, int]:
    """The causes of lost seconds."""
    return {cause: seconds for cause, seconds in usage_of(status).lost_gpu_seconds if seconds}


def saved(at: float, **more: Any) -> dict[str, Any]:
    """Return progress of a run that trains since -80, with a checkpoint from `at`."""
    return {
        "training_step": 5,
        "total_steps": 20,
        "training_since": time(-80),
        "checkpoint_step": 4,
        "checkpoint_time": time(at),
        **more,
    }


def watched(stored: QLoRAJobStatus | None = None, **spec: Any) -> QLoRAJobStatus:
    """A job whose pod has a node since -100, trains since -80, and saved at -30."""
    job = make_job(stored or status_in("train"), **(SPEC | spec))
    return follow(job, child("train"), running(train_pod(), since=-90), progress=progress(**saved(-30)), log_read=True)


def then(stored: QLoRAJobStatus, *bodies: Any, at: float = 0, **spec: Any) -> QLoRAJobStatus:
    return follow(make_job(stored, **(SPEC | spec)), *bodies, now=after(at))


def test_a_pod_counts_from_its_node_to_its_end_times_its_gpus() -> None:
    stored = watched()
    assert usage_of(stored).dump()["gpuHours"] == "0.0556"
    assert lost(stored) == {"startup": 40}
    body = train_pod()
    done = ended(body, 0, result(body, "train", training_step=20, total_steps=20, loss=1.0), start=-90, end=50)
    status = then(stored, child("train", Complete="Done"), done, at=70)
    assert present(status.step).name == "publish"
    assert (usage_of(status).gpu_seconds, lost(status)) == (300, {"startup": 40})


def test_passing_time_causes_no_write() -> None:
    stored = watched()
    same = child("train"), running(train_pod(), since=-90)
    assert then(stored, *same, at=299) == stored
    newer = progress(**saved(-30), time=time(60))
    status = follow(make_job(stored, **SPEC), *same, progress=newer, log_read=True, now=after(60))
    assert usage_of(status).gpu_seconds == 320


def test_time_without_reports_is_counted_every_five_minutes() -> None:
    """Otherwise a vanished pod without reports would count for a quarter of an hour."""
    same = child("train"), running(train_pod(), since=-90)
    stored, writes = follow(make_job(status_in("train"), **SPEC), *same), 0
    assert plan_of(make_job(stored, **SPEC), stored, seen(*same), after(0)).look_again == after(300)
    for at in range(60, 36_001, 60):
        before, stored = stored, then(stored, *same, at=at)
        writes += stored != before
    assert writes == 120
    assert usage_of(stored).gpu_seconds == 2 * 36_100
    gone = then(stored, child("train"), at=36_010)
    assert usage_of(gone).gpu_seconds == 2 * 36_110


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


def resumed(at: float) -> dict[str, Any]:
    """The train Job, which a queue has resumed then."""
    conditions = [{"type": "Suspended", "status": "False"}]
    return child("train") | {"status": {"startTime": time(at), "conditions": conditions}}


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
        # A queue has suspended its Job, and resumed it since.
        ([resumed(20), deleted(ended(train_pod(), 137, start=-90, end=20), 10)], {}, {"suspension": 100}),
        ([resumed(20)], {}, {"suspension": 100}),
        ([resumed(-95), deleted(ended(train_pod(), 137, start=-90, end=20), 10)], {}, {"disruption": 100}),
        ([resumed(-95)], {}, {"disruption": 100}),
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


@pytest.mark.parametrize("pods", [[deleted(ended(train_pod(), 137, start=-90, end=20), 0)], []], ids=["ended", "gone"])
def test_a_pod_of_a_failed_job_is_stopped_and_not_interrupted(pods: list[Any]) -> None:
    job = {"activeDeadlineSeconds": 60} | SPEC
    stored = then(watched(), child("train"), running(train_pod(), since=-90), **job)
    # The operator has deleted its Job, and the watch of Jobs has not shown that yet.
    status = then(stored, child("train"), *pods, at=20, **job)
    assert [entry.end for entry in usage_of(status).pods] == ["suspension"]


def test_a_pod_of_a_job_that_is_restarted_is_stopped_and_not_interrupted() -> None:
    stored = watched().model_copy(update={"step": step_status("train", 2)})
    stopped = deleted(ended(train_pod(), 137, start=-90, end=20), 0)
    status = then(stored, child("train"), stopped, child("train", 2), at=20)
    assert [entry.end for entry in usage_of(status).pods] == ["suspension"]


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


def brief(number: int, at: float) -> dict[str, Any]:
    """A train pod that runs for a second."""
    return created(ended(train_pod(number, at=at), 0, start=at, end=at + 1), at)


def test_many_foreign_pods_hide_none_and_do_not_fill_the_status() -> None:
    """One waits forever among hundreds of short ones and the train pods: each counts."""
    waits, job = created(pod("train", 1, 1), -1000), child("train", created=-1100)
    many = [brief(number, -1000 + number) for number in range(2, 202)]
    status = then(status_in("train"), job, waits, *many)
    expected = 200
    for number in range(202, 292):
        at = 10.0 * number
        body = created(train_pod(number, at=at), at)
        status = then(status, job, waits, *many, running(body, since=at), at=at + 1)
        many.append(ended(body, 137, start=at, end=at + 7))
        status = stored_again(then(status, job, waits, *many, at=at + 8))
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


def test_a_pod_that_waits_for_its_node_is_not_displaced_by_many_that_end() -> None:
    """Entries are dropped after a while, but this earlier pod is not counted yet."""
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


def test_a_pod_whose_job_is_deleted_before_it_was_seen_counts() -> None:
    stopping = deleted(train_pod(at=-10), -1, grace=3600)
    stored = then(status_in("train"), stopping)
    assert present(stored.step).job_uid == "", "no other object names its Job from here on"
    body = ended(stopping, 143, start=-90, end=3500)
    assert usage_of(then(stored, body, at=3510)).gpu_seconds == 2 * 3510


def test_a_node_that_starts_when_its_job_is_given_up_counts() -> None:
    nodes: dict[str, Any] = {"resources": {"gpus": 2, "nodes": 2}}
    starting, lost_node = scheduled(node(0), -2), evicted(ended(scheduled(node(1), -2), 143, start=-2, end=-1))
    stored = then(status_in("train"), child("train"), starting, lost_node, **nodes)
    assert present(stored.step).job_uid == "", "its Job is about to be deleted, and then names it no more"
    stopped = deleted(ended(starting, 143, start=1, end=30), 5)
    assert usage_of(then(stored, stopped, at=40, **nodes)).gpu_seconds == 2 * (32 + 1)


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


def test_a_failed_job_counts_a_pod_that_gets_its_node_when_it_is_stopped() -> None:
    job = {"retry": {"maxDisruptions": 0}} | SPEC
    stored = then(watched(), child("train"), train_pod(2, at=-1), **job)
    assert stored.phase == "Failed"
    late = scheduled(pod("train", 1, 3), 1)
    assert not is_settled(make_job(stored, **job), seen(deleted(running(late, since=2), 2)))
    status = then(stored, deleted(ended(late, 143, start=2, end=7), 2), at=10, **job)
    assert usage_of(status).gpu_seconds - usage_of(stored).gpu_seconds >= 2 * 6


def test_a_failed_job_counts_its_pod_although_its_end_was_not_seen() -> None:
    job = {"activeDeadlineSeconds": 60} | SPEC
    stored = then(watched(), child("train"), running(train_pod(), since=-90), **job)
    assert not is_settled(make_job(stored, **job), seen())
    status = then(stored, at=30, **job)
    assert [entry.end for entry in usage_of(status).pods] == ["suspension"]
    assert is_settled(make_job(status, **job), seen())


def test_the_counters_get_the_increase_of_each_write() -> None:
    metrics, before, after_it = Metrics(), watched(), then(watched(), child("train"), at=20)
    metrics.gpu_seconds.note(make_job(status_in("train"), **SPEC), before)
    metrics.gpu_seconds.note(make_job(before, **SPEC), after_it)
    page = metrics.page()[0].decode()
    of = 'namespace="team",profile="default"'
    assert f"qlora_gpu_seconds_total{{{of}}} 240.0" in page
    assert f'qlora_gpu_lost_seconds_total{{cause="disruption",{of}}} 100.0' in page
    assert f'qlora_gpu_lost_seconds_total{{cause="startup",{of}}} 40.0' in page
