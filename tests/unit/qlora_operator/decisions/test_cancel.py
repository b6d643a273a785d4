"""spec.cancel ends a job in every phase, cleans up after it, and costs no other job anything."""

from typing import Any

import pytest

from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.events import phase_event
from qlora_operator.decisions.plan import CreateJob, DeleteClaim, DeleteJob, Plan, is_settled, plan
from qlora_operator.decisions.profile_limit import limit_of_jobs
from qlora_operator.decisions.status import next_status
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
    failed,
    follow,
    make_job,
    pod,
    present,
    reason_of,
    running,
    seen,
    status_in,
    step_status,
    succeeded,
    time,
)

QUEUED = child("train") | {"spec": {"suspend": True}}
STOPPING = deleted(running(pod("train")), -5)
LIMITED = {"default": Profile.model_validate(PROFILE.dump() | {"limits": {"jobs": 1}})}
UNPREPARED = {"step": step_status("prepare", jobUid="").dump()}


def decide(stored: QLoRAJobStatus | None, *bodies: dict[str, Any], at: float = 0, **spec: Any) -> tuple[Any, Plan]:
    """Return the next status of a job that is canceled, and its plan."""
    job = make_job(stored, cancel=True, **spec)
    found = facts(job, *bodies, now=after(at))
    decision = next_status(found)
    return decision.status, plan(job, decision, found.observed, found.now)


def canceled(stored: QLoRAJobStatus | None, *bodies: dict[str, Any], **spec: Any) -> QLoRAJobStatus:
    """Return the stored end of the job, which is written before anything else is done."""
    status, planned = decide(stored, *bodies, **spec)
    assert planned == Plan(store_first=True)
    assert (status.phase, reason_of(status, "Failed"), reason_of(status)) == ("Failed", "Cancelled", "Cancelled")
    assert status.completion_time == time()
    assert present(status.last_failure).reason == "Cancelled"
    return QLoRAJobStatus.model_validate(status.dump()).model_copy(update={"resolved": status.resolved})


@pytest.mark.parametrize(
    ("stored", "bodies", "spec", "actions"),
    [
        (None, [], {}, ()),
        (follow(make_job(suspend=True)), [], {"suspend": True}, ()),
        (follow(make_job(), profiles=LIMITED, jobs_of_profile=1), [], {}, ()),
        (status_in("prepare", **UNPREPARED), [], {}, ()),
        (status_in("prepare"), [child("prepare"), running(pod("prepare"))], {}, ("prepare",)),
        (status_in("train"), [QUEUED], {"scheduling": {"queueName": "gpus"}}, ("train",)),
        (status_in("train"), [child("train"), running(pod("train"))], {}, ("train",)),
        (status_in("train"), [child("train"), ended(pod("train"), 203)], {}, ("train",)),
        (status_in("publish"), [child("publish"), running(pod("publish"))], {}, ("publish",)),
        (follow(make_job(status_in("train"), suspend=True)), [], {"suspend": True}, ("",)),
    ],
    ids=[
        "not seen",
        "created suspended",
        "waits for others",
        "waits for its first Job",
        "preparing",
        "in a queue",
        "training",
        "waits for another attempt",
        "publishing",
        "suspended",
    ],
)
def test_a_canceled_job_ends_and_its_job_is_deleted(
    stored: QLoRAJobStatus | None, bodies: Any, spec: dict[str, Any], actions: tuple[str, ...]
) -> None:
    status = canceled(stored, *bodies, **spec)
    assert status.current_revision == (stored.current_revision if stored else None)
    values = conditions_of(status)
    assert {kind for kind, value in values.items() if value == "True"} - {"Prepared"} == {"Failed", "Stalled"}

    _, planned = decide(status, *bodies, **spec)

    deletions = tuple(DeleteJob(f"{NAME}-{step}-1", f"uid-{NAME}-{step}-1") for step in actions if step)
    alive = any(body["status"].get("phase") in ("Pending", "Running") for body in bodies)
    cleans = (CreateJob("clean", 1),) if actions and not alive else ()
    assert planned.actions == (*deletions, *cleans)
    assert is_settled(make_job(status, cancel=True, **spec), seen(*bodies)) == (actions == ())


def test_it_is_cleaned_up_once_its_pod_has_saved_and_stopped() -> None:
    status = canceled(status_in("train"), child("train"), running(pod("train")))
    assert decide(status, STOPPING, at=5)[1].actions == ()
    assert decide(status, at=9)[1].actions == (CreateJob("clean", 1),)
    cleaned, _ = decide(status, child("clean", Complete=""), at=20)
    assert (cleaned.phase, conditions_of(cleaned)["CleanedUp"]) == ("Failed", "True")


def test_its_own_time_of_the_clean_up_counts() -> None:
    status = canceled(status_in("train"), cleanupAfterSeconds=100)
    assert decide(status, at=99, cleanupAfterSeconds=100)[1].actions == ()
    assert decide(status, at=100, cleanupAfterSeconds=100)[1].actions == (CreateJob("clean", 1),)


def test_its_claim_goes_as_after_a_success() -> None:
    policy = {"persistentVolumeClaimRetentionPolicy": {"whenFinished": "Delete"}}
    spec: dict[str, Any] = {"workspace": policy, "output": {"destination": "s3://bucket/adapters"}}
    status = canceled(status_in("train"), **spec)
    assert decide(status, STOPPING, **spec)[1].actions == ()
    assert decide(status, **spec)[1].actions == (DeleteClaim(),)


@pytest.mark.parametrize(
    ("step", "bodies", "phase", "reason"),
    [
        ("publish", [child("publish", Complete=""), succeeded("publish")], "Succeeded", "Succeeded"),
        ("prepare", [child("prepare", Failed="x"), failed("prepare", 11, "BadDataset", "")], "Failed", "BadDataset"),
    ],
)
def test_a_job_that_has_ended_stays_as_it_was(step: Any, bodies: Any, phase: str, reason: str) -> None:
    before = follow(make_job(status_in(step)), *bodies)
    status, planned = decide(before, *bodies)
    assert (status, planned.actions) == (before, ())
    assert (status.phase, reason_of(status)) == (phase, reason)
    # As well if it ends before the operator sees the request.
    assert decide(status_in(step), *bodies)[0].phase == phase


def test_it_is_not_retried() -> None:
    status = canceled(status_in("train"))
    again, _ = decide(status, retry={"request": "a"})
    assert (again.phase, again.step) == ("Failed", status.step)
    before = follow(make_job(status_in("prepare")), child("prepare", Failed="x"), failed("prepare", 11, "BadData", ""))
    assert decide(before, retry={"request": "a"})[0].phase == "Failed"


def test_it_needs_no_place_among_the_jobs_of_its_profile() -> None:
    assert limit_of_jobs(make_job(), LIMITED) == 1
    assert limit_of_jobs(make_job(cancel=True), LIMITED) is None
    assert limit_of_jobs(make_job(canceled(status_in("train")), cancel=True, retry={"request": "a"}), LIMITED) is None


def test_a_job_that_this_operator_cannot_read_is_canceled_too() -> None:
    unreadable: dict[str, Any] = {"training": {"newer": 1}}
    status = canceled(None, **unreadable)
    assert "newer" in make_job(status, cancel=True, **unreadable).problem


def test_its_event_is_no_warning() -> None:
    job = make_job(status_in("train"), cancel=True)
    event = present(phase_event(job, follow(job), NOW))
    assert (event["type"], event["reason"]) == ("Normal", "Cancelled")


@pytest.mark.parametrize(("body", "seconds"), [(running(pod("train")), 60), (ended(pod("train"), 0), 50)])
def test_what_its_pod_has_run_counts(body: dict[str, Any], seconds: int) -> None:
    status = canceled(status_in("train"), child("train"), body)
    assert (status.active_seconds, status.disruptions, status.failures) == (seconds, 0, 0)
