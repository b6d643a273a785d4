"""A failed job that its user takes up: where it goes on, with what, and what it may not lose."""

from typing import Any

import pytest

from qlora_api.contract import CONTRACT_VERSION
from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.cleanup import cleanup_at
from qlora_operator.decisions.plan import CreateJob, DeleteJob, plan
from tests.support.builders import (
    NAME,
    NOW,
    PROFILE,
    after,
    child,
    conditions_of,
    facts,
    failed,
    follow,
    make_job,
    message_of,
    pod,
    reason_of,
    resolved,
    running,
    seen,
    status_in,
)

FORBIDDEN = (child("publish", Failed="PodFailurePolicy"), failed("publish", 12, "ModelUnavailable", "the key expired"))


def failed_job(**spec: Any) -> QLoRAJobStatus:
    """The stored status of a job whose publication failed."""
    return follow(make_job(status_in("publish", failures=2, disruptions=3), **spec), *FORBIDDEN)


def take_up(stored: QLoRAJobStatus, request: int = 1, /, *bodies: Any, **more: Any) -> QLoRAJobStatus:
    profiles = more.pop("profiles", {"default": PROFILE})
    return follow(make_job(stored, retry={"request": request}, **more), *(bodies or FORBIDDEN), profiles=profiles)


def test_a_raised_request_takes_up_the_job_at_the_step_that_failed() -> None:
    status = take_up(failed_job())

    assert status.step is not None
    assert (status.step.job_name, status.step.job_uid, status.step.counted_pod) == (f"{NAME}-publish-2", "", "")
    assert (status.phase, status.completion_time, status.retry_request) == ("Publishing", None, 1)
    assert (status.failures, status.disruptions) == (0, 0)
    expected = {"Prepared": "True", "Trained": "True", "Failed": "False", "Stalled": "False", "Succeeded": "Unknown"}
    assert expected.items() <= conditions_of(status).items()
    assert "Failed" not in message_of(status)
    # The next Job gets another number, and is made as soon as no pod is left.
    job = make_job(status, retry={"request": 1})
    assert plan(job, status, seen(*FORBIDDEN), NOW).actions == (CreateJob("publish", 2),)


def test_the_same_or_a_lower_request_takes_nothing_up() -> None:
    stored = failed_job().model_copy(update={"retry_request": 2})
    for request in (0, 1, 2):
        assert take_up(stored, request).phase == "Failed"
    assert follow(make_job(stored), *FORBIDDEN).phase == "Failed"
    assert take_up(stored, 3).phase == "Publishing"


def test_a_request_that_was_made_before_the_failure_is_spent() -> None:
    running = follow(make_job(status_in("publish"), retry={"request": 5}), child("publish"))
    assert running.retry_request == 5
    end = follow(make_job(running, retry={"request": 5}), *FORBIDDEN)
    assert take_up(end, 5).phase == "Failed"


def test_a_job_that_succeeded_is_not_taken_up() -> None:
    stored = failed_job()
    conditions = tuple(
        entry.model_copy(update={"status": "False" if entry.type == "Failed" else "True"})
        for entry in stored.conditions
    )
    done = stored.model_copy(update={"conditions": conditions, "phase": "Succeeded"})
    assert take_up(done).phase == "Succeeded"


def test_the_profile_of_today_is_used_because_the_administrator_may_have_mended_it() -> None:
    mended = Profile.model_validate(PROFILE.dump() | {"image": "example.org/mended"})
    stored = failed_job()
    assert stored.resolved is not None
    old = stored.model_copy(update={"resolved": stored.resolved.model_copy(update={"contract_version": 1})})

    status = take_up(old, profiles={"default": mended})

    assert status.resolved is not None
    assert (status.resolved.profile, status.resolved.contract_version) == (mended, CONTRACT_VERSION)
    without = take_up(old, profiles={"other": mended})
    assert without.resolved is not None
    assert without.resolved.profile == PROFILE


@pytest.mark.parametrize("cleaning", [child("clean"), child("clean", Complete="")], ids=["cleaning", "cleaned"])
def test_after_a_clean_up_it_goes_on_at_prepare(cleaning: dict[str, Any]) -> None:
    stored = failed_job(cleanupAfterSeconds=0)

    status = take_up(stored, 1, cleaning)

    assert status.step is not None
    assert (status.step.name, status.step.job_name) == ("prepare", f"{NAME}-prepare-2")
    assert {"Prepared": "Unknown", "Trained": "Unknown"}.items() <= conditions_of(status).items()
    assert "CleanedUp" not in conditions_of(status)


def test_a_clean_up_that_runs_is_stopped_first() -> None:
    job = make_job(failed_job(cleanupAfterSeconds=0), retry={"request": 1})
    cleaning = child("clean")
    status = follow(job, cleaning)
    uid = cleaning["metadata"]["uid"]
    assert plan(job, status, seen(cleaning), NOW).actions[:1] == (DeleteJob(f"{NAME}-clean-1", uid),)


def test_a_suspended_job_is_taken_up_when_it_is_resumed() -> None:
    status = take_up(failed_job(), suspend=True)
    assert status.phase == "Suspended"
    job = make_job(status, retry={"request": 1})
    assert plan(job, follow(job, *FORBIDDEN), seen(*FORBIDDEN), NOW).actions == (CreateJob("publish", 2),)


def test_what_an_old_trainer_would_delete_of_a_failed_job_is_not_cleaned_up() -> None:
    begun = resolved().model_copy(update={"contract_version": 1}).dump()
    stored = follow(make_job(status_in("publish", resolved=begun), cleanupAfterSeconds=0), *FORBIDDEN)
    assert cleanup_at(make_job(stored, cleanupAfterSeconds=0), stored) is None
    assert cleanup_at(make_job(failed_job(), cleanupAfterSeconds=0), failed_job()) == NOW


def test_a_trainer_of_another_release_is_waited_for_and_costs_no_failure() -> None:
    old = (
        child("train", Failed="PodFailurePolicy"),
        failed("train", 19, "UnsupportedContract", "set the profile's image"),
    )
    status = follow(make_job(status_in("train")), *old)
    assert (status.phase, status.failures, reason_of(status)) == ("Queued", 0, "UnsupportedContract")
    assert "set the profile's image" in message_of(status)
    assert follow(make_job(status), *old) == status

    newer = Profile.model_validate(PROFILE.dump() | {"image": "example.org/newer"})
    status = follow(make_job(status), *old, profiles={"default": newer})

    assert status.step is not None
    assert status.step.job_name == f"{NAME}-train-2"
    assert status.resolved is not None
    assert status.resolved.profile.image == "example.org/newer"


def test_a_clean_up_that_is_no_longer_asked_for_is_no_longer_announced() -> None:
    stored = follow(make_job(failed_job(), cleanupAfterSeconds=60), *FORBIDDEN)
    assert reason_of(stored, "CleanedUp") == "Scheduled"
    status = follow(make_job(stored), *FORBIDDEN, now=after(120))
    assert reason_of(status, "CleanedUp") == "NotScheduled"


def test_facts_of_a_job_with_a_problem_make_no_new_job() -> None:
    stored = status_in("train").model_copy(update={"resolved": resolved().model_copy(update={"contract_version": 99})})
    job = make_job(stored)
    found = facts(job)
    status = follow(job)
    assert (status.phase, reason_of(status), status.step) == ("Queued", "InvalidSpec", stored.step)
    assert plan(job, status, found.observed, NOW).actions == ()
    stopping = make_job(stored, suspend=True)
    actions = plan(stopping, follow(stopping, child("train")), seen(child("train")), NOW).actions
    assert actions == (DeleteJob(f"{NAME}-train-1", f"uid-{NAME}-train-1"),)
    limited = make_job(stored, activeDeadlineSeconds=30)
    assert follow(limited, child("train"), running(pod("train"), since=-60)).phase == "Failed"
