"""The status that follows from the stored one and the seen objects."""

from typing import Any

import pytest

from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.cleanup import cleanup_at
from qlora_operator.decisions.observed.objects import Reason
from qlora_operator.decisions.status import next_status, with_child, with_rejection
from tests.support.builders import (
    ADAPTER,
    NAME,
    after,
    child,
    conditions_of,
    deleted,
    ended,
    facts,
    failed,
    follow,
    make_job,
    message_of,
    pod,
    present,
    reason_of,
    running,
    status_in,
    step_status,
    stored_again,
    succeeded,
    time,
    waiting,
)


@pytest.mark.parametrize(
    ("step", "bodies", "phase", "reason"),
    [
        ("prepare", [child("prepare", created=-5)], "Preparing", "Preparing"),
        ("prepare", [child("prepare"), running(pod("prepare"))], "Preparing", "Preparing"),
        ("train", [child("train")], "Queued", "NoPod"),
        ("train", [child("train"), pod("train")], "Queued", "Queued"),
        ("train", [child("train"), running(pod("train"))], "Training", "Training"),
        ("train", [child("train"), ended(pod("train"), 0)], "Training", "Training"),
        ("train", [child("train"), ended(pod("train"), 14)], "Training", "Training"),
        ("train", [child("train"), ended(pod("train"), 200)], "Queued", "Retrying"),
        ("train", [child("train"), ended(pod("train"), 143), pod("train", number=2)], "Queued", "Queued"),
        ("publish", [child("publish"), running(pod("publish"))], "Publishing", "Publishing"),
        ("train", [child("train"), waiting(pod("train"), "ImagePullBackOff")], "Queued", "ImagePullBackOff"),
    ],
)
def test_phase_and_reason_show_the_current_step(step: Any, bodies: Any, phase: str, reason: str) -> None:
    status = follow(make_job(status_in(step)), *bodies)
    assert (status.phase, reason_of(status)) == (phase, reason)
    assert conditions_of(status)["Reconciling"] == "False"


def test_once_the_next_job_is_made_the_phase_moves_on_in_the_same_write() -> None:
    found = facts(make_job(status_in("prepare")), child("prepare", Complete=""), succeeded("prepare"))
    status = with_child(next_status(found).status, found, "uid-new")
    assert (present(status.step).job_uid, status.phase) == ("uid-new", "Queued")


def test_the_clean_up_job_is_not_recorded_as_the_last_steps_job() -> None:
    found = facts(make_job(FINISHED, cleanupAfterSeconds=0))
    assert with_child(FINISHED, found, "uid-clean") == FINISHED


def test_a_step_waits_for_the_last_pod_of_the_attempt_before() -> None:
    stored = status_in("train", step=step_status("train", 2, jobUid="").dump())
    status = follow(make_job(stored), running(pod("train")))
    assert (status.phase, reason_of(status)) == ("Queued", "WaitingForPod")
    assert f"{NAME}-train-1-pod1" in message_of(status)


def test_the_end_decides_both_summary_conditions() -> None:
    status = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))
    assert (status.phase, status.adapter, status.completion_time) == ("Succeeded", ADAPTER, time())
    assert conditions_of(status) == {
        "Prepared": "True",
        "Succeeded": "True",
        "Failed": "False",
        "Suspended": "False",
        "Progressing": "Unknown",
        "Reconciling": "False",
        "Stalled": "False",
    }
    # Conditions that do not apply do not repeat its message.
    assert {entry.type for entry in status.conditions if ADAPTER.uri in entry.message} == {"Succeeded"}
    assert (reason_of(status, "Failed"), reason_of(status, "Stalled")) == ("NotFailed", "NotStalled")


def test_a_suspension_ends_when_no_pod_is_left() -> None:
    stored = status_in("train", progress={"remaining": "1h12m"})
    job = make_job(stored, suspend=True)
    status = follow(job, child("train"), running(pod("train")))
    assert (status.phase, reason_of(status, "Suspended")) == ("Training", "Suspending")
    status = follow(make_job(status, suspend=True), deleted(running(pod("train")), -5))
    assert conditions_of(status)["Suspended"] == "False"
    status = follow(make_job(status, suspend=True))
    assert (status.phase, conditions_of(status)["Suspended"]) == ("Suspended", "True")
    assert present(status.step).attempt == 1
    assert present(status.progress).remaining == ""
    resumed = follow(make_job(status))
    assert (resumed.phase, resumed.step) == ("Queued", step_status("train", 2, jobUid=""))


def test_a_suspension_does_not_end_while_a_job_may_still_create_a_pod() -> None:
    status = follow(make_job(status_in("train"), suspend=True), child("train"))
    assert (conditions_of(status)["Suspended"], reason_of(status, "Suspended")) == ("False", "Suspending")


def test_a_suspension_that_a_lost_node_blocks_is_reported() -> None:
    status = follow(make_job(status_in("train"), suspend=True), deleted(running(pod("train")), -180))
    assert reason_of(status, "Suspended") == reason_of(status) == "PodStuckTerminating"
    assert "node may be lost" in message_of(status)


@pytest.mark.parametrize(
    ("limit", "earlier", "bodies", "exceeded"),
    [
        (100, 0, [child("train"), running(pod("train"), since=-99)], False),
        (100, 0, [child("train"), running(pod("train"), since=-100)], True),
        (100, 60, [child("train"), running(pod("train"), since=-40)], True),
        (100, 60, [child("train"), pod("train")], False),
        (100, 100, [child("train"), pod("train")], True),
        (100, 0, [child("train", Complete=""), succeeded("train")], False),
    ],
)
def test_the_deadline_counts_running_time_over_all_steps(limit: int, earlier: int, bodies: Any, exceeded: bool) -> None:
    job = make_job(status_in("train", activeSeconds=earlier), activeDeadlineSeconds=limit)
    status = follow(job, *bodies)
    assert (reason_of(status) == "DeadlineExceeded") == exceeded
    assert (status.phase == "Failed") == exceeded


def test_a_step_that_has_ended_well_counts_although_the_deadline_has_passed() -> None:
    job = make_job(status_in("publish", activeSeconds=500), activeDeadlineSeconds=100)
    assert follow(job, child("publish", Complete=""), succeeded("publish")).phase == "Succeeded"


def test_the_transition_time_moves_only_when_the_status_flips() -> None:
    job = make_job(follow(make_job()))
    status = follow(make_job(job.status, generation=2, suspend=True), now=after(60))
    found = {entry.type: entry for entry in status.conditions}
    assert found["Suspended"].last_transition_time == time(60)
    assert found["Failed"].last_transition_time == time(0)
    assert found["Failed"].observed_generation == 2
    assert status.observed_generation == 2


@pytest.mark.parametrize(
    ("step", "bodies"),
    [
        ("prepare", [child("prepare")]),
        ("train", [child("train"), running(pod("train"))]),
        ("train", [child("train"), ended(pod("train"), 200)]),
        ("train", [child("train"), waiting(pod("train"), "ImagePullBackOff")]),
        ("publish", [child("publish", Failed="PodFailurePolicy"), failed("publish", 16, "StorageFull", "full")]),
        ("publish", [child("publish", Complete=""), succeeded("publish")]),
    ],
)
def test_a_later_pass_changes_nothing(step: Any, bodies: Any) -> None:
    once = follow(make_job(status_in(step)), *bodies)
    assert follow(make_job(stored_again(once)), *bodies, now=after(30)).dump() == once.dump()


FINISHED = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))


def test_a_finished_job_stays_finished_after_any_deletion_or_change() -> None:
    status = follow(make_job(FINISHED, generation=2, suspend=True), now=after(1000))
    assert status == FINISHED.model_copy(update={"observed_generation": 2})


def test_clean_up_is_announced_done_and_recorded() -> None:
    def look(status: QLoRAJobStatus, *bodies: dict[str, Any], at: float) -> QLoRAJobStatus:
        return follow(make_job(status, cleanupAfterSeconds=100), *bodies, now=after(at))

    rest = [child("publish", Complete="")]
    status = look(FINISHED, *rest, at=1)
    assert (reason_of(status, "CleanedUp"), time(100) in message_of(status, "CleanedUp")) == ("Scheduled", True)
    assert cleanup_at(make_job(status, cleanupAfterSeconds=100), status) == after(100)
    assert look(status, *rest, child("clean", Complete=""), at=101) == status
    done = look(status, child("clean", Complete=""), at=102)
    assert conditions_of(done)["CleanedUp"] == "True"
    assert (done.phase, done.adapter) == ("Succeeded", ADAPTER)
    assert look(done, at=103) == done


def test_a_failed_clean_up_is_reported_and_keeps_the_jobs_phase() -> None:
    status = follow(
        make_job(FINISHED, cleanupAfterSeconds=0), child("publish", Complete=""), child("clean", Failed="Backoff")
    )
    assert (status.phase, reason_of(status, "CleanedUp")) == ("Succeeded", "CleanupFailed")


def test_a_rejection_by_the_api_server_is_shown_and_the_phase_stays() -> None:
    found = facts(make_job(follow(make_job())))
    status = with_rejection(next_status(found).status, found.job, found.now, Reason("JobRejected", "exceeded quota"))
    assert (status.phase, reason_of(status), message_of(status)) == ("Pending", "JobRejected", "exceeded quota")
    again = facts(make_job(status), now=after(30))
    assert (
        with_rejection(next_status(again).status, again.job, again.now, Reason("JobRejected", "exceeded quota")).dump()
        == status.dump()
    )


def test_a_message_of_any_length_fits_the_schema() -> None:
    found = facts(make_job(follow(make_job())))
    status = with_rejection(next_status(found).status, found.job, found.now, Reason("JobRejected", "x" * 5000))
    assert len(message_of(status)) == 1024
    assert stored_again(status) == status
